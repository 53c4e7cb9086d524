"""What is known of the values of a jaxpr that is being rewritten, from the equations so far.

Purpose: rules ask, and every answer is a look-up. What an equation makes known is noted when it is
added, and forgotten when it is dropped again, so that nothing is found through an equation that is
not in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Primitive, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes import _facts


class Knowledge:
    """Where values come from, and what can be said of their elements."""

    def __init__(self) -> None:
        self._definitions: dict[Var, JaxprEqn] = {}
        self._nonnegative: set[Var] = set()
        self._null: set[Var] = set()
        self._uniform: dict[Var, Literal] = {}
        self._sums: dict[tuple[Var, tuple[int, ...]], Var] = {}
        self._products: dict[frozenset[Var], Var] = {}
        self._choices: dict[Var, list[JaxprEqn]] = {}

    def definition(self, atom: Atom, primitive: Primitive | None = None) -> JaxprEqn | None:
        """The equation that computes ``atom``; None for inputs, literals, or another primitive."""
        if not isinstance(atom, Var):
            return None
        eqn = self._definitions.get(atom)
        if primitive is None or eqn is None:
            return eqn
        return eqn if eqn.primitive is primitive else None

    def constant(self, atom: Atom) -> Any:
        """The number that every element of ``atom`` is, None if that is not known."""
        literal = self.uniform(atom)
        if literal is None:
            return None
        aval: Any = literal.aval
        return np.asarray(literal.val, aval.dtype)[()]

    def uniform(self, atom: Atom) -> Literal | None:
        """The literal of which ``atom`` is a broadcast, or that it is."""
        if isinstance(atom, Var):
            return self._uniform.get(atom)
        return atom if _is_number(atom) else None

    def is_nonnegative(self, atom: Atom) -> bool:
        """Whether every element is NaN or at least +0.0 (not -0.0)."""
        if isinstance(atom, Var) and atom in self._nonnegative:
            return True
        value = self.constant(atom)
        return value is not None and _facts.is_nonnegative_number(value)

    def is_null(self, atom: Atom) -> bool:
        """Whether every element is NaN, 0.0 or -0.0."""
        if isinstance(atom, Var) and atom in self._null:
            return True
        value = self.constant(atom)
        return value is not None and _facts.is_null_number(value)

    def sum_of(self, atom: Atom, axes: tuple[int, ...]) -> Var | None:
        """An existing ``reduce_sum`` of ``atom`` over ``axes``."""
        return self._sums.get((atom, axes)) if isinstance(atom, Var) else None

    def product_of(self, x: Atom, y: Atom) -> Var | None:
        """An existing ``mul`` of two variables, in either order."""
        if not isinstance(x, Var) or not isinstance(y, Var):
            return None
        return self._products.get(frozenset((x, y)))

    def choices_of(self, atom: Atom) -> Sequence[JaxprEqn]:
        """The existing ``select_n`` of which ``atom`` is the last case."""
        return self._choices.get(atom, ()) if isinstance(atom, Var) else ()

    # What an equation makes known

    def note(self, eqn: JaxprEqn) -> None:
        """Makes known what the equation, of one result, computes."""
        out = eqn.outvars[0]
        self._definitions[out] = eqn
        if _facts.makes_nonnegative(eqn, self.is_nonnegative):
            self._nonnegative.add(out)
        if _facts.makes_null(eqn, self.is_null):
            self._null.add(out)
        # A cast to varying over mesh axes has no number of its own either.
        if eqn.primitive is p.broadcast_in_dim_p or _is_pvary(eqn):
            value = self.uniform(eqn.invars[0])
            if value is not None:
                self._uniform[out] = value
        elif (key := _sum(eqn)) is not None:
            self._sums[key] = out
        elif (pair := _product(eqn)) is not None:
            self._products.setdefault(pair, out)
        elif (last := _chosen(eqn)) is not None:
            self._choices.setdefault(last, []).append(eqn)

    def forget(self, eqn: JaxprEqn) -> None:
        """The opposite, for an equation that is dropped."""
        (out,) = eqn.outvars
        self._definitions.pop(out, None)
        self._uniform.pop(out, None)
        self._nonnegative.discard(out)
        self._null.discard(out)
        if (key := _sum(eqn)) is not None:
            if self._sums.get(key) is out:
                del self._sums[key]
        elif (pair := _product(eqn)) is not None:
            if self._products.get(pair) is out:
                del self._products[pair]
        elif (last := _chosen(eqn)) is not None:
            self._choices[last].remove(eqn)


def _sum(eqn: JaxprEqn) -> tuple[Var, tuple[int, ...]] | None:
    """What a sum is of, and its axes."""
    if eqn.primitive is not p.reduce_sum_p or not isinstance(eqn.invars[0], Var):
        return None
    return eqn.invars[0], tuple(eqn.params["axes"])


def _product(eqn: JaxprEqn) -> frozenset[Var] | None:
    """The two factors of a product."""
    variables = frozenset(a for a in eqn.invars if isinstance(a, Var))
    is_pair = eqn.primitive is p.mul_p and all(isinstance(a, Var) for a in eqn.invars)
    return variables if is_pair else None


def _chosen(eqn: JaxprEqn) -> Var | None:
    """The last case of a choice."""
    last = eqn.invars[-1] if eqn.primitive is p.select_n_p else None
    return last if isinstance(last, Var) else None


def _is_number(literal: Literal) -> bool:
    aval: Any = literal.aval
    return getattr(aval, "shape", None) == () and isinstance(aval.dtype, np.dtype)


def _is_pvary(eqn: JaxprEqn) -> bool:
    # By name: the cast that says that a value varies over mesh axes has no public object.
    return eqn.primitive.name == "pvary"
