from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jevt.passes import dce


def run(fun, *args):
    return dce.run(jax.make_jaxpr(fun)(*args))


def test_drops_what_nothing_reads():
    def f(x):
        jnp.cos(jnp.exp(x))
        return jnp.sin(x)

    assert [e.primitive.name for e in run(f, 1.0).eqns] == ["sin"]


def test_inputs_and_outputs_stay():
    jaxpr = run(lambda x, y, z: (y, 1.0, jnp.sin(y)), 1.0, 2.0, 3.0)
    assert len(jaxpr.invars) == 3 and len(jaxpr.outvars) == 3


def test_effects_stay():
    def f(x):
        jax.debug.print("{}", jnp.cos(x))
        return jnp.sin(x)

    assert run(f, 1.0).eqns[0].primitive.name == "cos"


def test_dead_carries_and_outputs_of_a_loop():
    def f(x):
        def body(carry, _):
            a, dead = carry
            return (jnp.sin(a), jnp.cos(dead)), (a, jnp.exp(a))

        (a, _), (_, kept) = lax.scan(body, (x, x), None, length=3)
        return a, kept

    (scan,) = run(f, 1.0).eqns
    assert {e.primitive.name for e in scan.params["jaxpr"].eqns} == {"exp", "sin"}


def test_dead_outputs_of_branches():
    def f(x):
        return lax.cond(x > 0, lambda v: (v + 1, jnp.sin(v)), lambda v: (v, jnp.cos(v)), x)[0]

    cond = run(f, 1.0).eqns[-1]
    assert "sin" not in str(cond.params["branches"]) and "cos" not in str(cond.params["branches"])


def test_constants_stay_with_their_variables():
    table = jnp.arange(3.0)
    jaxpr = run(lambda x: (jnp.sin(table), x * table)[1], np.ones(3))
    assert len(jaxpr.consts) == 1 and len(jaxpr.eqns) == 1


def test_alive_programs_are_returned_as_they_are():
    jaxpr = jax.make_jaxpr(lambda x: lax.scan(lambda c, r: (c + r, c), 0.0, x))(np.ones(3))
    assert dce.run(jaxpr) is jaxpr
