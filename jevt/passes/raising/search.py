"""The search for the gradient of statistics: which sum it ends in, and of which cotangent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from jax.extend.core import Var
from jax.extend.core import primitives as p

from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import Program
from jevt.passes.raising import terms
from jevt.passes.raising.cones import Cone, Kind, Origins, dominators, size
from jevt.passes.raising.norms import living, sums
from jevt.passes.raising.terms import Sum

#: Sums and cotangents that are tried.
MAX_SUMS = 6
_TRIES = 4


def totals(origins: Origins, statistics: list[Var]) -> Iterator[Sum]:
    """The sums in which a gradient may end, as many as are tried."""
    return itertools.islice(terms.find(origins.program, origins, statistics), MAX_SUMS)


def first[T](
    candidates: Iterable[tuple[Origins, Sum]], match: Callable[[Origins, Sum, Cone], T]
) -> T | None:
    """The first gradient that is found; None if there are no candidates.

    Args:
      candidates: sums, and what values depend on.
      match: the gradient of a sum's terms by a cotangent, given the cone between them; raises
        NoMatch.

    Raises:
      NoMatch: there are candidates, and none is a gradient; says why of the first.
    """
    reason = ""
    for origins, total in candidates:
        try:
            return _in_sum(origins, total, match)
        except NoMatch as error:
            reason = reason or str(error)
    if reason:
        raise NoMatch(reason)
    return None


def _in_sum[T](origins: Origins, total: Sum, match: Callable[[Origins, Sum, Cone], T]) -> T:
    def resolve(var: Var, positions: set[int]) -> bool:
        if origins.kind(var) is Kind.OTHER:
            return False
        origins.expand(var, positions)
        return True

    reason = "no value through which all of the gradient goes"
    cones = dominators(origins.program, [var for _, var in total.terms], resolve)
    full = (cone for cone in cones if size(cone.source) == origins.full)
    for cone in itertools.islice(full, _TRIES):
        try:
            return match(origins, total, cone)
        except NoMatch as error:
            reason = str(error)
    raise NoMatch(reason)


def inside(origins: Origins, total: Sum, positions: set[int]) -> set[int]:
    """The equations of a gradient among those that were evaluated, its sum included."""
    eqns = origins.program.eqns
    own = {i for i in positions if origins.kind(eqns[i].outvars[0]) is Kind.OTHER}
    return own | total.positions


def last_sum(program: Program, positions: set[int]) -> int:
    """The last sum of a gradient, or its last equation if it has none."""
    reductions = [i for i in positions if program.eqns[i].primitive is p.reduce_sum_p]
    return max(reductions, default=max(positions))


def check_sums(origins: Origins, positions: set[int], results: set[Var], own: int) -> None:
    """Raises :class:`NoMatch` where a gradient's composite would make the sums more.

    Args:
      origins: of the gradient.
      positions: its equations.
      results: what of them the composite gives.
      own: sums over the full size that the composite takes.
    """
    program = origins.program
    before = sums([program.eqns[i] for i in positions], origins.full)
    if sums(living(program, positions, results), origins.full) + own > before:
        raise NoMatch("sums of the gradient that others read")
