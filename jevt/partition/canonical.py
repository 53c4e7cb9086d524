"""Keys under which equal pieces of a program are solved and built once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var


class Keys:
    """Makes keys; remembers each equation's part, as an equation is asked about many times."""

    def __init__(self) -> None:
        # The equation is kept beside its part so that its id stays its own.
        self._known: dict[int, tuple[JaxprEqn, Hashable]] = {}

    def key(self, jaxpr: Jaxpr) -> Hashable:
        """Equal for jaxprs that differ in nothing but the names of their variables.

        Twenty-four equal layers have equal keys, so they are solved once.
        """
        number: dict[Var, int] = {}

        def atom(value: Any) -> int:
            return -1 if isinstance(value, Literal) else number.setdefault(value, len(number))

        for var in (*jaxpr.constvars, *jaxpr.invars):
            atom(var)
        eqns = tuple(
            (self._equation(eqn), tuple(map(atom, eqn.invars)), tuple(map(atom, eqn.outvars)))
            for eqn in jaxpr.eqns
        )
        ends = tuple(_literal(v) if isinstance(v, Literal) else atom(v) for v in jaxpr.outvars)
        return tuple(_aval(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)), eqns, ends

    def _equation(self, eqn: JaxprEqn) -> Hashable:
        """What of an equation does not depend on the names of variables."""
        known = self._known.get(id(eqn))
        if known is not None:
            return known[1]
        part = (
            eqn.primitive,
            tuple(_literal(v) if isinstance(v, Literal) else _aval(v.aval) for v in eqn.invars),
            tuple(_aval(v.aval) for v in eqn.outvars),
            tuple((name, self._parameter(value)) for name, value in sorted(eqn.params.items())),
        )
        self._known[id(eqn)] = (eqn, part)
        return part

    def _parameter(self, value: Any) -> Hashable:
        if isinstance(value, Jaxpr):
            return self.key(value)
        if isinstance(value, (tuple, list)):
            return tuple(map(self._parameter, value))
        try:
            hash(value)
        except TypeError:
            return repr(value)
        return type(value).__name__, value


def _literal(literal: Literal) -> Hashable:
    """Values as printed, because 0.0 and -0.0, 1 and True compare equal, and NaN to nothing."""
    value = np.asarray(literal.val)
    return repr(value.item() if value.ndim == 0 else value.tolist()), _aval(literal.aval)


def _aval(aval: Any) -> Hashable:
    dtype = getattr(aval, "dtype", None)
    return (
        getattr(aval, "shape", None),
        str(aval) if dtype is None else dtype,
        getattr(aval, "weak_type", None),
    )
