"""Column sums of tensors of one shape that become ready together: one kernel for all.

The gradients of the biases of queries, keys and values are the case in point: each is a sum over
all rows of a tensor of its own, with a launch for the sum and one for the partial results. Nothing
is shared, so nothing in the integer program joins them.

    before  g3 = column sums of dq;  g4 = column sums of dk;  g5 = column sums of dv
    after   g3 = column sums of dq, dk and dv                  one kernel, one second stage

They are joined where each can run as early as the first of them, so that no group has to wait and
nothing is kept any longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

from jax.extend.core import Var

from jevt._context import Context
from jevt.lowering import side_by_side as lowering
from jevt.lowering.errors import NotFusible
from jevt.partition import names
from jevt.partition.graph import elements
from jevt.partition.joining import joined
from jevt.partition.plan import Group

#: Operands of one kernel: registers hold a tile of each.
_MOST = 6


def merge(groups: Sequence[Group], context: Context) -> tuple[Group, ...]:
    """The groups of a plan, in an executable order, with those joined that do the same together."""
    merged: dict[int, Group] = {}
    gone: set[int] = set()
    for members in _sets(groups):
        together = _joined([groups[m] for m in members], context)
        if together is not None:
            merged[members[0]] = together
            gone.update(members[1:])
    left = [merged.get(i, group) for i, group in enumerate(groups) if i not in gone]
    if len(left) == len(groups):
        return tuple(groups)
    return tuple(
        dataclasses.replace(group, name=names.moved(group.name, index))
        for index, group in enumerate(left)
    )


def _sets(groups: Sequence[Group]) -> list[list[int]]:
    """Positions of groups that may be one, where they are several."""
    maker = {v: i for i, g in enumerate(groups) for v in g.jaxpr.outvars if isinstance(v, Var)}
    sets: list[list[int]] = []
    open_: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        key = _key(group)
        if key is None:
            continue
        ready = max((maker[v] for v in group.jaxpr.invars if v in maker), default=-1)
        members = open_.get(key)
        if members is None or ready >= members[0] or not _fit([groups[m] for m in members], group):
            members = open_[key] = []
            sets.append(members)
        members.append(index)
    return [members for members in sets if len(members) > 1]


def _key(group: Group) -> Hashable | None:
    """Equal for groups that do the same, None for those that are no column sums."""
    spec = group.spec
    if group.target != "triton" or group.kind != "columnwise" or spec is None:
        return None
    # As text, since 0.0 equals -0.0 and NaN does not equal itself.
    return spec.space, repr(spec.tree), spec.inputs, spec.outputs


def _fit(members: Sequence[Group], other: Group) -> bool:
    """Whether another one has tensors of its own, and not too many."""
    read = {v for g in members for v in g.jaxpr.invars}
    shared = any(v in read and elements(v.aval) > 1 for v in other.jaxpr.invars)
    return not shared and len(read | set(other.jaxpr.invars)) <= _MOST


def _joined(groups: Sequence[Group], context: Context) -> Group | None:
    """One group in place of several, None if that is not predicted to be faster."""
    specs = [g.spec for g in groups if g.spec is not None]
    try:
        jaxpr, spec = lowering.join([g.jaxpr for g in groups], specs, "candidate")
    except NotFusible:
        return None
    predicted = sum(g.predicted_us or 0.0 for g in groups)
    predicted -= (len(groups) - 1) * context.device.triton_launch_us
    return joined(groups, jaxpr, spec, predicted, context)
