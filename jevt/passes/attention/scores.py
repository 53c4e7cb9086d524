"""What happens to Q·Kᵀ before the softmax: scale, biases and masks.

Read backwards from the exponential's operand. Numbers that are the same for all keys of a query
(the maximum) change nothing: the softmax does not see them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from jax.extend.core import JaxprEqn, Literal, Primitive, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.lowering.axes import Factor
from jevt.passes.attention.labels import Labels
from jevt.passes.attention.operations import VIEWS, NoMatch
from jevt.passes.attention.region import Region, number

#: A number this low, or lower, hides a key. (BERT's own mask adds −10000.)
HIDDEN = -9000.0


@dataclasses.dataclass(frozen=True)
class Scores:
    """``scale·Q·Kᵀ + Σ factor·bias``, but hidden where a mask says so.

    Attributes:
      scale: factor of the product.
      biases: (factor, value) of what is added.
      masks: (value, what it is where a key is seen) of boolean values.
    """

    scale: float
    biases: tuple[tuple[float, Var], ...]
    masks: tuple[tuple[Var, bool], ...]


class _Walk:
    """The way back from the exponential to the product."""

    def __init__(self, region: Region, labels: Labels, keys: set[Factor]) -> None:
        self.region = region
        self.labels = labels
        self.keys = keys
        self.factor = 1.0
        self.biases: list[tuple[float, Var]] = []
        self.masks: list[tuple[Var, bool]] = []

    def is_derived(self, atom: Atom) -> bool:
        return isinstance(atom, Var) and atom in self.region.derived

    def see(self, atom: Atom) -> float | None:
        return number(self.region.program, atom)

    def shift(self, atom: Atom, sign: float) -> None:
        """Something is added to the scores."""
        if not self.keys.isdisjoint(self.labels.of(atom)):
            if self.is_derived(atom) or not isinstance(atom, Var):
                raise NoMatch("the scores are added to something computed from them")
            mask = self.added_mask(atom, sign * self.factor)
            if mask is None:
                self.biases.append((sign * self.factor, atom))
            else:
                self.masks.append(mask)

    def added_mask(self, atom: Var, factor: float) -> tuple[Var, bool] | None:
        """The mask that an added value is: 0 where a key is seen, very low elsewhere."""
        program = self.region.program
        eqn = program.definition(atom)
        while eqn is not None and program.maker[eqn.outvars[0]] in self.region.inner:
            if eqn.primitive is p.select_n_p and len(eqn.invars) == 3:
                values = [self.see(case) for case in eqn.invars[1:]]
                predicate = eqn.invars[0]
                for seen in (False, True):
                    open_, low = values[seen], values[not seen]
                    if open_ == 0 and low is not None and low * factor <= HIDDEN:
                        return (predicate, seen) if isinstance(predicate, Var) else None
                return None
            if not _is_view(eqn) and eqn.primitive is not p.convert_element_type_p:
                return None
            eqn = program.definition(eqn.invars[0])
        return None


def read(region: Region, labels: Labels, keys: set[Factor]) -> Scores:
    """How the operand of the exponential is made from the product.

    Raises:
      NoMatch: in a way that attention does not know.
    """
    program = region.program
    goal = program.eqns[region.score].outvars[0]
    walk = _Walk(region, labels, keys)
    atom: Atom = program.eqns[region.exp].invars[0]
    while atom is not goal:
        eqn = program.definition(atom)
        step = None if eqn is None else _STEPS.get(eqn.primitive)
        if eqn is None or step is None:
            name = "nothing" if eqn is None else eqn.primitive.name
            raise NoMatch(f"{name} between the product and the softmax")
        atom = step(eqn, walk)
    if not (math.isfinite(walk.factor) and walk.factor):
        raise NoMatch(f"scores times {walk.factor}")
    return Scores(walk.factor, tuple(walk.biases), tuple(walk.masks))


def _through(eqn: JaxprEqn, walk: _Walk) -> Atom:
    return eqn.invars[0]


def _negated(eqn: JaxprEqn, walk: _Walk) -> Atom:
    walk.factor = -walk.factor
    return eqn.invars[0]


def _added(eqn: JaxprEqn, walk: _Walk) -> Atom:
    return _sum(eqn, 1.0, walk)


def _subtracted(eqn: JaxprEqn, walk: _Walk) -> Atom:
    return _sum(eqn, -1.0, walk)


def _sum(eqn: JaxprEqn, sign: float, walk: _Walk) -> Atom:
    a, b = eqn.invars
    if walk.is_derived(a) and not walk.keys.isdisjoint(walk.labels.of(a)):
        walk.shift(b, sign)
        return a
    walk.shift(a, 1.0)
    walk.factor *= sign
    return b


def _multiplied(eqn: JaxprEqn, walk: _Walk) -> Atom:
    a, b = eqn.invars
    if not walk.is_derived(a):
        a, b = b, a
    walk.factor *= _known(b, "times", walk)
    return a


def _divided(eqn: JaxprEqn, walk: _Walk) -> Atom:
    a, b = eqn.invars
    walk.factor /= _known(b, "divided by", walk)
    return a


def _known(atom: Atom, what: str, walk: _Walk) -> float:
    value = walk.see(atom)
    if value is None or value == 0:
        raise NoMatch(f"scores {what} something that is not a known number")
    return value


def _selected(eqn: JaxprEqn, walk: _Walk) -> Atom:
    """``select_n(predicate, where it is False, where it is True)``."""
    predicate, *cases = eqn.invars
    if len(cases) == 2 and isinstance(predicate, Var):
        for seen, (scores, hidden) in enumerate((cases, cases[::-1])):
            value = walk.see(hidden)
            if value is not None and walk.is_derived(scores) and value * walk.factor <= HIDDEN:
                walk.masks.append((predicate, bool(seen)))
                return scores
    raise NoMatch("a selection among the scores that hides no keys")


_STEPS: dict[Primitive, Callable[[JaxprEqn, _Walk], Atom]] = {
    **dict.fromkeys((*VIEWS, p.convert_element_type_p, p.copy_p, p.stop_gradient_p), _through),
    p.reduce_precision_p: _through,
    internals.pvary_p: _through,
    p.neg_p: _negated,
    p.add_p: _added,
    p.add_jaxvals_p: _added,
    p.sub_p: _subtracted,
    p.mul_p: _multiplied,
    p.div_p: _divided,
    p.select_n_p: _selected,
}


def _is_view(eqn: JaxprEqn) -> bool:
    return eqn.primitive in VIEWS or eqn.primitive is internals.pvary_p


def _choice(region: Region, eqn: JaxprEqn) -> tuple[Var, bool] | None:
    """The predicate of a selection between True and False, and what it is for True."""
    if eqn.primitive is not p.select_n_p or not isinstance(eqn.invars[0], Var):
        return None
    values = [number(region.program, case) for case in eqn.invars[1:]]
    if values == [0.0, 1.0] or values == [1.0, 0.0]:
        return eqn.invars[0], values[1] == 1.0
    return None


def parts(region: Region, mask: Var, seen: bool) -> list[tuple[Var, bool]]:
    """The masks that all must let a key through, for this one to do so; without views."""
    result: list[tuple[Var, bool]] = []
    stack = [(mask, seen)]
    while stack:
        var, seen = stack.pop()
        eqn = region.program.definition(var)
        joins = p.and_p if seen else p.or_p
        if eqn is None or region.program.maker[var] not in region.inner:
            result.append((var, seen))
        elif _is_view(eqn) and isinstance(eqn.invars[0], Var):
            stack.append((eqn.invars[0], seen))
        elif (choice := _choice(region, eqn)) is not None:
            stack.append((choice[0], choice[1] == seen))
        elif eqn.primitive is p.not_p and isinstance(eqn.invars[0], Var):
            stack.append((eqn.invars[0], not seen))
        elif eqn.primitive is joins and all(isinstance(a, Var) for a in eqn.invars):
            stack.extend((a, seen) for a in reversed(eqn.invars) if isinstance(a, Var))
        elif isinstance(eqn.invars[0] if eqn.invars else None, Literal):
            if number(region.program, var) != float(seen):
                result.append((var, seen))
        else:
            result.append((var, seen))
    return result
