"""What values are computed from: the places through which all of it goes.

A *cone* is the equations that lead from one value, its source, to others. Its source dominates
them: whatever way back one takes, one comes through it. Walking back from the targets, always
expanding the value that was made last, one stands at a dominator whenever a single value is left.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import math
from collections.abc import Callable, Collection, Iterator, Sequence

from jax.extend.core import JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes.attention.operations import VIEWS, is_known
from jevt.passes.attention.region import Program, is_upcast, number

#: More equations than any spelling of a norm's or softmax's forward or backward pass has.
MAX_EQUATIONS = 80

#: How far back it is asked what a value depends on.
_DEPTH = 14


def size(atom: Atom) -> int:
    """Number of elements."""
    return math.prod(shape_of(atom))


@dataclasses.dataclass(frozen=True)
class Cone:
    """Equations between a value and what is computed from it.

    Attributes:
      source: the value.
      positions: the equations, ascending.
    """

    source: Var
    positions: tuple[int, ...]


class Kind(enum.Enum):
    """What a value depends on, seen from the statistics of a norm or softmax."""

    FREE = 0  # small, and not computed from what is normalised
    DATA = 1  # computed from what is normalised and free values alone
    STATISTIC = 2  # the same, with a statistic among them
    OTHER = 3  # anything else


class Origins:
    """What values depend on, relative to one cone.

    Args:
      program: whose values.
      source: what is normalised.
      statistics: values of the cone that are smaller than the source.
      lax: whether small results of products and the like, made later than the source, are free: a
        scale that depends on the data. Else they may be gradients.
      masks: booleans that are taken as they are, whatever they depend on.
      forward: if given, the only values of the full size that are computed from the source alone,
        but for views of them: what else is may be a cotangent.
    """

    def __init__(
        self,
        program: Program,
        source: Var,
        statistics: Sequence[Var],
        *,
        lax: bool = False,
        masks: Collection[Var] = (),
        forward: Collection[Var] | None = None,
    ) -> None:
        self.lax = lax
        self.program = program
        self.source = source
        self.masks = masks
        self.full = size(source)
        self.first = program.maker.get(source, -1)
        self._forward = forward
        self._known = {
            source: Kind.DATA,
            **dict.fromkeys(statistics, Kind.STATISTIC),
            **dict.fromkeys(masks, Kind.FREE),
        }

    def kind(self, atom: Atom, depth: int = _DEPTH) -> Kind:
        if isinstance(atom, Literal):
            return Kind.FREE
        known = self._known.get(atom)
        if known is not None:
            return known
        position = self.program.maker.get(atom, -1)
        eqn = self.program.definition(atom)
        if eqn is None or position < self.first or depth == 0 or not is_known(eqn):
            early = eqn is None or position < self.first or self.lax
            result = Kind.FREE if early and size(atom) < self.full else Kind.OTHER
        else:
            kinds = [self.kind(a, depth - 1) for a in eqn.invars]
            result = max(kinds, key=lambda kind: kind.value, default=Kind.FREE)
            if result is Kind.FREE and size(atom) >= self.full and not eqn.invars:
                result = Kind.OTHER
            if result is not Kind.FREE and self._is_foreign(atom, eqn):
                result = Kind.OTHER
        self._known[atom] = result
        return result

    def expand(self, atom: Atom, positions: set[int]) -> None:
        """Adds the equations that lead to a value that is not ``OTHER`` from what is known."""
        stack = [atom]
        while stack:
            var = stack.pop()
            if not isinstance(var, Var) or var is self.source or var in self.masks:
                continue
            kind = self.kind(var)
            eqn = self.program.definition(var)
            small = size(var) < self.full
            if eqn is None:
                continue
            if kind is Kind.FREE and small and not self._is_seen_through(var):
                continue
            position = self.program.maker[var]
            if position not in positions:
                positions.add(position)
                stack.extend(eqn.invars)

    def _is_foreign(self, var: Var, eqn: JaxprEqn) -> bool:
        """Whether only some values are known, and this is another one."""
        if self._forward is None or size(var) < self.full or var in self._forward:
            return False
        return eqn.primitive not in VIEWS and not is_upcast(eqn)

    def _is_seen_through(self, var: Var) -> bool:
        """Whether a free value is a number, or a view of another one."""
        eqn = self.program.definition(var)
        if eqn is None or not is_known(eqn):
            return False
        is_view = eqn.primitive in VIEWS or is_upcast(eqn)
        return is_view or number(self.program, var) is not None


def dominators(
    program: Program,
    targets: Sequence[Var],
    resolve: Callable[[Var, set[int]], bool] = lambda var, positions: False,
) -> Iterator[Cone]:
    """The values through which all of ``targets`` is computed, nearest first.

    Args:
      program: whose values.
      targets: what is computed.
      resolve: whether a value needs no explanation; may add equations that lead to it.
    """
    heap: list[tuple[int, int, Var]] = []
    seen: set[Var] = set()
    positions: set[int] = set()
    reductions = False

    def push(atom: Atom) -> None:
        if isinstance(atom, Var) and atom not in seen:
            seen.add(atom)
            if not resolve(atom, positions):
                heapq.heappush(heap, (-program.maker.get(atom, -1), len(seen), atom))

    for target in targets:
        push(target)
    while heap and len(positions) <= MAX_EQUATIONS:
        if len(heap) == 1 and reductions:
            yield Cone(heap[0][2], tuple(sorted(positions)))
        var = heapq.heappop(heap)[2]
        eqn = program.definition(var)
        if eqn is None or not is_known(eqn):
            return
        positions.add(program.maker[var])
        reductions |= eqn.primitive is p.reduce_sum_p
        for atom in eqn.invars:
            push(atom)
