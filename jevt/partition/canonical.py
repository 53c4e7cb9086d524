"""Keys under which equal pieces of a program are solved and built once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from jax.extend.core import Jaxpr, Literal, Var


def key(jaxpr: Jaxpr) -> Hashable:
    """Equal for jaxprs that differ in nothing but the names of their variables.

    Twenty-four equal layers have equal keys, so they are solved once and share one kernel. Literals enter as
    printed, because 0.0 and -0.0, 1 and True compare equal, and NaN to nothing.
    """
    number: dict[Var, int] = {}

    def atom(value: Any) -> Hashable:
        if isinstance(value, Literal):
            return ("literal", repr(value.val), _aval(value.aval))
        return number.setdefault(value, len(number))

    inputs = tuple(_aval(v.aval) for v in jaxpr.invars)
    for var in (*jaxpr.constvars, *jaxpr.invars):
        atom(var)
    eqns = tuple(
        (
            eqn.primitive,
            tuple(atom(v) for v in eqn.invars),
            tuple((atom(v), _aval(v.aval)) for v in eqn.outvars),
            tuple((name, _parameter(value)) for name, value in sorted(eqn.params.items())),
        )
        for eqn in jaxpr.eqns
    )
    return inputs, eqns, tuple(atom(v) for v in jaxpr.outvars)


def _aval(aval: Any) -> Hashable:
    return getattr(aval, "shape", None), str(getattr(aval, "dtype", aval)), getattr(aval, "weak_type", None)


def _parameter(value: Any) -> Hashable:
    if isinstance(value, Jaxpr):
        return key(value)
    if isinstance(value, (tuple, list)):
        return tuple(_parameter(v) for v in value)
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return type(value).__name__, value
