from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun

from jevt.passes import cse, inline


def primitives(jaxpr):
    return [e.primitive.name for e in jaxpr.eqns]


def inlined(fun, *args):
    return inline.run(jax.make_jaxpr(fun)(*args))


def test_calls_become_their_equations():
    @jax.custom_vjp
    def doubled(x):
        return x * 2.0

    doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (g,))

    @jax.custom_batching.custom_vmap
    def plus(x):
        return x + 1.0

    plus.def_vmap(lambda size, batched, x: (x, True))
    fun = jax.jit(lambda x: plus(jax.nn.relu(doubled(jax.jit(jnp.sin)(x)))))
    assert primitives(inlined(fun, 1.0)) == ["sin", "mul", "max", "add"]


def test_a_function_called_twice_has_variables_of_its_own():
    f = jax.jit(lambda x: jnp.sin(x) * x)
    jaxpr = inlined(lambda x: f(f(x)), 1.0)
    variables = [v for e in jaxpr.eqns for v in e.outvars]
    assert len(set(variables)) == len(variables) == 4


def test_result_that_is_an_argument_or_a_literal():
    f = jax.jit(lambda x, y: (y, 3.0, x))
    jaxpr = inlined(f, 1.0, 2.0)
    assert jaxpr.eqns == []
    assert jaxpr.outvars[0] is jaxpr.invars[1] and jaxpr.outvars[2] is jaxpr.invars[0]
    assert jaxpr.outvars[1].val == 3.0


def test_bodies_are_inlined_within_themselves():
    relu = jax.nn.relu

    def f(x):
        x, _ = lax.scan(lambda c, _: (relu(c), ()), x, None, length=2)
        x = lax.while_loop(lambda c: relu(c) < 3.0, lambda c: relu(c) + 1.0, x)
        return lax.cond(x > 0, relu, jnp.sin, x)

    jaxpr = inlined(f, 1.0)
    assert [n for n in primitives(jaxpr) if n in ("scan", "while", "cond")] == [
        "scan",
        "while",
        "cond",
    ]
    assert "custom_jvp_call" not in str(jaxpr) and "jit[" not in str(jaxpr)


def test_a_shared_body_stays_shared():
    def body(c, _):
        return jax.nn.relu(c) * 2.0, ()

    def f(x):
        a, _ = lax.scan(body, x, None, length=2)
        b, _ = lax.scan(body, x + 1.0, None, length=2)
        return a + b

    bodies = [e.params["jaxpr"] for e in inlined(f, 1.0).eqns if e.primitive.name == "scan"]
    assert bodies[0] is bodies[1]


def test_constants_of_calls_are_hoisted_once():
    table = jnp.arange(3.0)
    f = jax.jit(lambda x: x * table)
    g = jax.jit(lambda x: x - table)
    jaxpr = jax.make_jaxpr(lambda x: f(x) + g(f(x)))(np.ones(3))
    result = inline.run(jaxpr)
    assert len(result.consts) == 1 and result.consts[0] is table
    assert primitives(result) == ["mul", "mul", "sub", "add"]
    assert inline.run(result) is result


def test_constants_do_not_leave_a_body():
    table = jnp.arange(3.0)
    f = jax.jit(lambda x: jax.nn.relu(x) * table)
    jaxpr = inlined(lambda x: lax.scan(lambda c, _: (f(c), ()), x, None, length=2)[0], np.ones(3))
    (scan,) = jaxpr.eqns
    body = scan.params["jaxpr"]
    assert not body.consts
    np.testing.assert_array_equal(jaxpr_as_fun(jaxpr)(np.ones(3, np.float32))[0], [0, 1, 4])


def test_transformation_only_equations_go():
    jaxpr = inlined(lambda x: lax.stop_gradient(checkpoint_name(jnp.sin(x), "s")) + 1.0, 1.0)
    assert primitives(jaxpr) == ["sin", "add"]


def test_jit_with_options_of_its_own_is_kept_and_entered():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.jit(jax.nn.relu, out_shardings=where)
    jaxpr = inlined(lambda x: placed(x) + 1.0, 1.0)
    assert primitives(jaxpr) == ["jit", "add"]
    assert primitives(jaxpr.eqns[0].params["jaxpr"]) == ["max"]


def test_unknown_carriers_are_left_alone():
    f = jax.custom_derivatives.linear_call
    jaxpr = jax.make_jaxpr(lambda x: f(lambda r, v: v * 2.0, lambda r, t: t * 2.0, (), x))(1.0)
    assert inline.run(jaxpr) is jaxpr


# jax.checkpoint


def layer(x):
    return jnp.sin(jnp.sin(x) * 3.0)


def barriers(jaxpr):
    return [e for e in jaxpr.eqns if e.primitive is lax.optimization_barrier_p]


def test_recomputation_stays_behind_a_barrier():
    jaxpr = inlined(jax.grad(jax.checkpoint(layer)), 1.0)
    assert "remat" not in str(jaxpr)
    (barrier,) = barriers(jaxpr)
    first = next(i for i, e in enumerate(jaxpr.eqns) if e is barrier)
    fresh = set(barrier.outvars)
    assert any(set(e.invars) & fresh for e in jaxpr.eqns[first + 1 :] if e.primitive.name == "sin")
    # The recomputed sines are not merged with those of the forward pass.
    assert primitives(cse.run(jaxpr)).count("sin") == primitives(jaxpr).count("sin")


def test_lowers_to_the_barriers_of_jax():
    fun = jax.grad(lambda x: jax.checkpoint(layer)(jax.checkpoint(layer)(x)))
    jaxpr = jax.make_jaxpr(fun)(1.0)

    def count(jaxpr):
        return jax.jit(jaxpr_as_fun(jaxpr)).lower(1.0).as_text().count("optimization_barrier")

    assert count(jaxpr) == count(inline.run(jaxpr)) == 2


@pytest.mark.parametrize(("prevent", "expected"), [(True, 1), (False, 0)])
def test_prevent_cse(prevent, expected):
    jaxpr = inlined(jax.grad(jax.checkpoint(layer, prevent_cse=prevent)), 1.0)
    assert len(barriers(jaxpr)) == expected


def test_forward_pass_has_no_barrier():
    assert barriers(inlined(jax.checkpoint(layer), 1.0)) == []


def test_policy_is_respected():
    everything = jax.checkpoint(layer, policy=jax.checkpoint_policies.everything_saveable)
    sines = {
        policy: primitives(inlined(jax.grad(f), 1.0)).count("sin")
        for policy, f in {"all": everything, "none": jax.checkpoint(layer)}.items()
    }
    assert sines["all"] < sines["none"]


def test_scopes_are_those_of_jax():
    @jax.jit
    def block(x):
        with jax.named_scope("mlp"):
            return jax.checkpoint(layer)(x)

    jaxpr = jax.make_jaxpr(block)(1.0)
    ours = {str(e.source_info.name_stack) for e in inline.run(jaxpr).eqns}
    assert ours == {"jit(block)/mlp/checkpoint"}
    text = jax.jit(block).lower(1.0).compile().as_text()
    assert "/jit(block)/mlp/checkpoint/sin" in text
