"""Kernels that overwrite a donated input follow all that reads it.

The update of a weight may not depend on another reader of it, the product that gives the input's
gradient. :func:`in_order` moves the update behind that reader. XLA, though, goes by data alone: it
sees no order between two readers of one buffer, and copies the buffer, a whole table of weights, to
be safe. So the kernel takes a result of the other reader as one more operand, :func:`awaited`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt._jaxpr import aval
from jevt.partition.graph import nbytes
from jevt.partition.plan import Group, Plan

#: Copies of smaller buffers are not worth an operand.
_LEAST_BYTES = 1 << 20

#: Equations whose results XLA stores in any case.
_STORED = frozenset({"dot_general", "product_sum", "conv_general_dilated"})


def in_order(groups: Sequence[Group], donated: Set[Var]) -> tuple[Group, ...]:
    """The groups, kernels that could overwrite a donated input behind those that read it.

    A group is moved no further than to the last reader, and only if nothing up to there reads what
    it computes.
    """
    large = {v for v in donated if nbytes(aval(v)) >= _LEAST_BYTES}
    order = list(groups)
    for group in reversed(groups):
        mine = large.intersection(group.jaxpr.invars)
        if group.target != "triton" or not mine:
            continue
        position = order.index(group)
        made = {v for v in group.jaxpr.outvars if isinstance(v, Var)}
        readers = [p for p in range(position + 1, len(order)) if mine & set(order[p].jaxpr.invars)]
        between = order[position + 1 : readers[-1] + 1] if readers else []
        if between and all(made.isdisjoint(other.jaxpr.invars) for other in between):
            order.insert(readers[-1], order.pop(position))
    return tuple(order)


def awaited(plan: Plan, position: int, overwritten: Sequence[Var]) -> list[Var]:
    """Results of what reads the buffers that a group overwrites, one for each reader before it.

    Args:
      plan: the program, its groups in the order in which they run.
      position: of the group.
      overwritten: the inputs of the program into whose buffers it writes.

    Returns:
      Variables that are computed before the group, none of them what it depends on anyway.
    """
    large = {v for v in overwritten if nbytes(aval(v)) >= _LEAST_BYTES}
    if not large:
        return []
    found: list[Var] = []
    group = plan.groups[position]
    depends: set[int] | None = None
    for before in plan.groups[:position]:
        if large.isdisjoint(v for v in before.jaxpr.invars):
            continue
        readers = before.eqns if before.target == "triton" else _stored(plan, before.eqns, large)
        if not readers:
            continue
        if depends is None:
            depends = _ancestors(plan.jaxpr, group.eqns)
        if depends.isdisjoint(readers):
            outputs = before.jaxpr.outvars if before.target == "triton" else _results(plan, readers)
            variables = [v for v in outputs if isinstance(v, Var)]
            found.append(min(variables, key=lambda v: nbytes(aval(v))))
    return found


def _stored(plan: Plan, eqns: Sequence[int], large: set[Var]) -> list[int]:
    """The first of a group's equations that reads one of these variables and is stored."""
    for position in eqns:
        eqn = plan.jaxpr.eqns[position]
        if eqn.primitive.name in _STORED and not large.isdisjoint(_variables(eqn)):
            return [position]
    return []


def _results(plan: Plan, eqns: Sequence[int]) -> list[Var]:
    return [v for position in eqns for v in plan.jaxpr.eqns[position].outvars]


def _variables(eqn: JaxprEqn) -> list[Var]:
    return [v for v in eqn.invars if isinstance(v, Var)]


def _ancestors(jaxpr: Jaxpr, eqns: Sequence[int]) -> set[int]:
    """Positions of the equations that some equations depend on, themselves included."""
    maker: Mapping[Var, int] = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    found: set[int] = set()
    stack = list(eqns)
    while stack:
        position = stack.pop()
        if position not in found:
            found.add(position)
            stack += [maker[v] for v in _variables(jaxpr.eqns[position]) if v in maker]
    return found
