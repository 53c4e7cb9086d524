"""Tools on jaxprs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jevt import _jaxpr


def _equation(function, *args):
    (eqn,) = (e for e in jax.make_jaxpr(function)(*args).eqns if list(_jaxpr.subjaxprs(e)))
    return eqn


@pytest.mark.parametrize(
    "function",
    [
        lambda x: lax.while_loop(lambda c: c < 9, lambda c: c * 2, x),
        lambda x: lax.cond(x > 0, lambda v: v + 1, lambda v: v - 1, x),
        lambda x: lax.scan(lambda c, _: (c + 1, c), x, None, length=3),
    ],
    ids=["while", "cond", "scan"],
)
def test_mapping_visits_bodies_in_their_order(function):
    eqn = _equation(function, jnp.float32(1))
    visited = []

    def copy(body):
        visited.append(body)
        return body.replace(eqns=list(body.eqns))

    mapped = _jaxpr.map_subjaxprs(eqn, copy)
    assert [id(body) for *_, body in _jaxpr.subjaxprs(eqn)] == [id(body) for body in visited]
    assert [(k, i) for k, i, _ in _jaxpr.subjaxprs(mapped)] == [
        (k, i) for k, i, _ in _jaxpr.subjaxprs(eqn)
    ]
    assert _jaxpr.map_subjaxprs(eqn, lambda body: body) is eqn


def test_extract_has_what_is_read_and_what_is_needed():
    def function(x, y):
        a = x + y
        b = a * 2
        return jnp.exp(b), a

    jaxpr = jax.make_jaxpr(function)(1.0, 2.0)
    middle = _jaxpr.extract(jaxpr, [1])
    assert middle.invars == [jaxpr.eqns[0].outvars[0]]
    assert middle.outvars == [jaxpr.eqns[1].outvars[0]]
    first = _jaxpr.extract(jaxpr, [0, 1])
    assert first.invars == jaxpr.invars
    assert set(first.outvars) == {jaxpr.eqns[0].outvars[0], jaxpr.eqns[1].outvars[0]}
