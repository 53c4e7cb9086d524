from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal

from jevt.passes import dce, fold_constants


def run(fun, *args):
    return dce.run(fold_constants.run(jax.make_jaxpr(fun)(*args)))


def primitives(jaxpr):
    return [e.primitive.name for e in jaxpr.eqns]


X = np.ones((2, 3), np.float32)


def test_scalars_become_literals():
    jaxpr = run(lambda x: x * lax.sqrt(np.float32(2)) + lax.exp(np.float32(0)), X)
    assert primitives(jaxpr) == ["mul", "add"]
    assert [float(e.invars[1].val) for e in jaxpr.eqns] == [np.sqrt(np.float32(2)), 1.0]


def test_scalar_out_of_a_small_array():
    jaxpr = run(lambda x: x * jnp.arange(4, dtype=jnp.float32)[3], X)
    assert primitives(jaxpr) == ["mul"] and jaxpr.eqns[0].invars[1].val == 3.0


def test_uniform_arrays_become_their_element():
    jaxpr = run(lambda x: x * (jnp.full((2, 3), 2.0) * 3.0) > jnp.ones((2, 3)), X)
    assert primitives(jaxpr) == ["mul", "gt"]
    assert [e.invars[1].val for e in jaxpr.eqns] == [6.0, 1.0]


def test_one_operand_keeps_the_shape():
    jaxpr = run(lambda x: x[:1] + jnp.full((2, 3), 2.0), np.ones((2, 1), np.float32))
    (value,) = jax.core.eval_jaxpr(jaxpr, [], np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(value, np.full((2, 3), 3.0))


def test_result_that_is_constant():
    jaxpr = run(lambda x: (lax.sqrt(np.float32(4)), jnp.full((2, 3), 2.0) * 2.0), X)
    assert isinstance(jaxpr.outvars[0], Literal) and jaxpr.outvars[0].val == 2.0
    assert primitives(jaxpr) == ["broadcast_in_dim"]
    value = jax.core.eval_jaxpr(jaxpr, [], X)
    assert value[0].dtype == np.float32 and value[1].shape == (2, 3)


def test_zeros_of_both_signs_are_told_apart():
    def f(x):
        signs = jnp.concatenate([jnp.zeros(1), -jnp.zeros(1)])
        return x / signs

    np.testing.assert_array_equal(
        jax.core.eval_jaxpr(run(f, np.ones(2, np.float32)), [], np.ones(2, np.float32))[0],
        [np.inf, -np.inf],
    )


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "int8", "uint32", "int32", "bool"]
)
def test_types_stay(dtype):
    jaxpr = run(
        lambda x: x == lax.convert_element_type(np.int32(1), dtype), np.ones(2).astype(dtype)
    )
    literal = jaxpr.eqns[-1].invars[1]
    assert isinstance(literal, Literal) and literal.aval.dtype == dtype
    assert jax.core.eval_jaxpr(jaxpr, [], jnp.ones(2, dtype))[0].all()


def test_weak_types_stay():
    def f(x):
        return lax.mul(lax.full_like(x, 0), 1.0) + jnp.asarray(3.0) * 2.0

    jaxpr = jax.make_jaxpr(lambda x: (lax.sqrt(2.0), x))(1.0)
    result = fold_constants.run(jaxpr)
    assert result.out_avals == jaxpr.out_avals and result.out_avals[0].weak_type
    (value, _) = jax.core.eval_jaxpr(result, [], 1.0)
    assert jax.typeof(jnp.asarray(value)).weak_type


def test_large_arrays_stay():
    n = fold_constants.MAX_SIZE
    assert "iota" in primitives(
        run(lambda x: x + jnp.sin(jnp.arange(n + 1, dtype=jnp.float32)), np.float32(1))
    )
    assert len(fold_constants.run(jax.make_jaxpr(lambda: jnp.arange(2 * n).sum())()).eqns) == 2


def test_random_effects_and_bodies_stay():
    def f(x):
        noise = jax.random.normal(jax.random.key(0), (2, 3))
        jax.debug.print("{}", 1.0)
        return x + noise + lax.cond(True, lambda: 1.0, lambda: 2.0)

    jaxpr = run(f, X)
    assert {"random_seed", "cond"} <= set(primitives(jaxpr)) and jaxpr.effects


def test_within_bodies():
    jaxpr = run(
        lambda x: lax.scan(lambda c, _: (c * lax.sqrt(np.float32(4)), ()), x, None, length=2)[0], X
    )
    body = jaxpr.eqns[0].params["jaxpr"]
    assert primitives(body) == ["mul"] and body.eqns[0].invars[1].val == 2.0


def test_surroundings_do_not_matter():
    """Folding runs while a program is being lowered, whatever the user has set."""
    jaxpr = jax.make_jaxpr(
        lambda x: x * lax.log(np.float32(-1)) + lax.div(np.float32(1), np.float32(0))
    )(X)
    with (
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.transfer_guard("disallow"),
        jax.disable_jit(),
    ):
        result = dce.run(fold_constants.run(jaxpr))
    assert primitives(result) == ["mul", "add"]

    @jax.jit
    def during_a_trace(x):
        assert primitives(dce.run(fold_constants.run(jaxpr))) == ["mul", "add"]
        return x

    during_a_trace(1.0)


def test_wide_types_traced_elsewhere():
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(lambda x: x * lax.sqrt(np.float64(2)))(np.float64(1))
    result = fold_constants.run(jaxpr)
    with jax.enable_x64(True):
        assert jax.core.eval_jaxpr(result, [], np.float64(1))[0] == np.sqrt(2)


def test_devices_in_types():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(lambda x: x * jnp.full((2, 3), 2.0))(jnp.ones((2, 3)))
        result = fold_constants.run(jaxpr)
    jax.extend.core.check_jaxpr(result)
