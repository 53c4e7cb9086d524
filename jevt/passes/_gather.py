"""Equations that a pass makes one of are brought next to each other."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt.partition import order
from jevt.passes._rewrite import rebuild


def gathered(jaxpr: Jaxpr, groups: Sequence[Sequence[int]]) -> Jaxpr:
    """``jaxpr`` with the equations of each group in a row; itself if they are.

    What reads their results comes after the last of them, what they read before the first. All
    other equations stay in their order, as far as that allows, those with effects among themselves
    in any case.

    Args:
      jaxpr: whose equations are put into another order.
      groups: positions of equations, each in one group at most. A group whose equations depend on
        each other, be it through other groups, stays apart.
    """
    count = len(jaxpr.eqns)
    if all(max(group) - min(group) < len(group) for group in groups):
        return jaxpr
    successors = _successors(jaxpr.eqns)
    grouped = {position for group in groups for position in group}
    units = [*map(tuple, groups), *((n,) for n in range(count) if n not in grouped)]
    apart = set(order.on_cycles(units, successors))
    units = [unit for unit in units if unit not in apart]
    units += [(position,) for unit in apart for position in unit]
    found = order.executable([max(u) for u in units], order.quotient(units, successors))
    assert found is not None
    positions = [position for index in found for position in sorted(units[index])]
    return rebuild(jaxpr, [jaxpr.eqns[position] for position in positions], {})


def _successors(eqns: Sequence[JaxprEqn]) -> list[list[int]]:
    """For each equation, those that read its results; for one with effects, the next such one."""
    makers: dict[Var, int] = {}
    result: list[set[int]] = [set() for _ in eqns]
    last: int | None = None
    for position, eqn in enumerate(eqns):
        for atom in eqn.invars:
            if isinstance(atom, Var) and atom in makers:
                result[makers[atom]].add(position)
        if eqn.effects:
            if last is not None:
                result[last].add(position)
            last = position
        makers.update(dict.fromkeys(eqn.outvars, position))
    return [sorted(readers) for readers in result]
