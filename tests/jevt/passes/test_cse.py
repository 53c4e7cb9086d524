from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jevt.passes import cse


def run(fun, *args):
    return cse.run(jax.make_jaxpr(fun)(*args))


def count(jaxpr, name):
    return sum(e.primitive.name == name for e in jaxpr.eqns)


def test_merges_equal_equations_and_what_follows():
    jaxpr = run(lambda x: jnp.sin(jnp.exp(x)) + jnp.sin(jnp.exp(x)), 1.0)
    assert (count(jaxpr, "exp"), count(jaxpr, "sin")) == (1, 1)


def test_merged_outputs():
    jaxpr = run(lambda x: (jnp.exp(x), jnp.exp(x)), 1.0)
    assert len(jaxpr.eqns) == 1 and jaxpr.outvars[0] is jaxpr.outvars[1]


def test_tells_parameters_and_types_apart():
    def f(x):
        return (
            jnp.sum(x, 0), jnp.sum(x, 1), x.astype(jnp.int8), x.astype(jnp.int16),
            lax.reduce_precision(x, 5, 10), lax.reduce_precision(x, 8, 7),
        )  # fmt: skip

    jaxpr = jax.make_jaxpr(f)(np.ones((3, 3)))
    assert cse.run(jaxpr) is jaxpr


def test_tells_literals_apart():
    x = np.float32(1)
    jaxpr = jax.make_jaxpr(lambda x: (x * 0.0, x * -0.0, x * 1.0, x * 1, x + np.int32(1)))(x)
    result = cse.run(jaxpr)
    zeros = [e.invars[1].val for e in result.eqns[:2]]
    assert len(result.eqns) >= 4 and [np.signbit(z) for z in zeros] == [False, True]
    assert len(run(lambda x: x * np.nan + x * np.nan, x).eqns) == 2


def test_effects_are_not_merged():
    def f(x):
        jax.debug.print("{}", x)
        jax.debug.print("{}", x)
        return x

    assert len(run(f, 1.0).eqns) == 2


def test_callbacks_barriers_and_copies_are_not_merged():
    def f(x):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        calls = [jax.pure_callback(np.sin, shape, x) for _ in range(2)]
        barriers = [lax.optimization_barrier(x) for _ in range(2)]
        copies = [jnp.array(x, copy=True) for _ in range(2)]
        return calls, barriers, copies

    jaxpr = jax.make_jaxpr(f)(np.float32(1))
    assert len(cse.run(jaxpr).eqns) == len(jaxpr.eqns)


def test_settings_tell_equations_apart():
    def f(key):
        a = jax.random.bits(key, (2048,))
        with jax.threefry_partitionable(False):
            return a, jax.random.bits(key, (2048,))

    assert count(run(f, jax.random.key(0)), "random_bits") == 2


def test_values_of_no_input_are_not_shared_across_a_barrier():
    def mask():
        return lax.broadcasted_iota(jnp.int32, (64, 64), 0) > 3

    def f(x):
        a = jnp.where(mask(), x, 0.0) + jnp.where(mask(), x, 1.0)
        x = lax.optimization_barrier(x)
        return a + jnp.where(mask(), x, 0.0) + jnp.where(mask(), x, 1.0)

    jaxpr = cse.run(jax.make_jaxpr(f)(np.ones((64, 64))))
    assert count(jaxpr, "iota") == 2


def test_within_bodies_but_not_out_of_them():
    def f(x):
        s = jnp.sin(x)
        return s + lax.cond(x > 0, lambda v: jnp.sin(v) + jnp.sin(v), lambda v: v, x)

    jaxpr = run(f, 1.0)
    assert count(jaxpr, "sin") == 1
    assert [count(b, "sin") for b in jaxpr.eqns[-2].params["branches"]].count(1) == 1


def test_equal_loops_are_one():
    def f(x):
        def body(c, _):
            return jnp.sin(c), ()

        return lax.scan(body, x, None, length=3)[0] + lax.scan(body, x, None, length=3)[0]

    assert count(run(f, 1.0), "scan") == 1


def test_dropped_results_do_not_hide_a_read_one():
    split = lax.split_p.bind

    def f(x):
        a, _ = split(x, sizes=(1, 1), axis=0)
        _, b = split(x, sizes=(1, 1), axis=0)
        return a + b

    jaxpr = jax.make_jaxpr(f)(np.arange(2.0))
    np.testing.assert_array_equal(
        jax.core.eval_jaxpr(cse.run(jaxpr), [], jnp.arange(2.0))[0], [1.0]
    )
