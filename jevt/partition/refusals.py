"""Why ``build`` refuses a group: the few nodes and stored results that are enough for it.

A refused group by itself forbids only itself, and the program would come back with the same group
but for a node. So the refusal is explained first: which of the results that leave the group are at
fault, if not all sets with these nodes are refused, and which of its nodes.

It is assumed that a group that holds a refused set and stores the same results is refused too. Two
ways are known in which that is wrong, and seen to. A matrix product is another mainloop: beside it
there may be values of rows and sums along rows that no kernel without one stores together. So a
refusal of nodes without a product says nothing of groups with one, and the product of a group stays
in what explains it. And a node may relate the axes of others. Two nodes that only exchange values
of rows share no columns, and two that read a tensor which is an operand of the product as well load
it along axes of their own; what lies between them, or makes that tensor beside them, gives both the
same. So it is asked whether one or two nodes that link several of a refused set would help, and the
refusal does not count where they do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

from jevt.partition.problem import Problem, components

#: More ways to keep the results of a refusal inside a group than this are not written down.
_WAYS = 64


@dataclasses.dataclass(frozen=True)
class Oracle:
    """What only ``lowering.spec.build`` knows, for local nodes of one component.

    Attributes:
      accepts: whether these nodes can be one group.
      holds: whether these nodes can be part of one group that stores these tensors (positions in
        ``Problem.tensors``), whatever else is in it: the same question with only those results as
        outputs, beside the largest of what nothing in the set reads.
      keeps: whether these nodes can be one group that stores exactly these tensors; the same as
        ``accepts`` where no node has copies.
      measured: what these nodes were measured to take as one group, in bytes that are moved
        meanwhile; None where that is not known.
    """

    accepts: Callable[[Sequence[int]], bool]
    holds: Callable[[Sequence[int], Sequence[int]], bool]
    measured: Callable[[Sequence[int]], int | None] = lambda nodes: None
    keeps: Callable[[Sequence[int], Sequence[int]], bool] | None = None

    def takes(self, problem: Problem, group: Sequence[int], stored: Sequence[int]) -> bool:
        """Whether these nodes can be one group of a grouping in which it stores these tensors."""
        if self.keeps is None or list(stored) == leaving(problem, group):
            return self.accepts(group)
        return self.keeps(group, stored)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Nodes that are not in one group if it stores certain tensors.

    Attributes:
      nodes: local nodes, ascending.
      stored: positions in ``Problem.tensors``; empty if the nodes never fit one group.
      unless: nodes with any of which they may be in one all the same.
      rest: whether that holds whatever else is in the group; if not, these are not exactly a group.
        Of nodes without a matrix product it is only said of groups without one.
    """

    nodes: tuple[int, ...]
    stored: tuple[int, ...] = ()
    unless: tuple[int, ...] = ()
    rest: bool = True


def explain(
    problem: Problem,
    oracle: Oracle,
    group: Sequence[int],
    kept: Sequence[int],
    links: Sequence[set[int]],
) -> list[Refusal]:
    """Refusals that a refused group breaks, which stores ``kept``, with few nodes each."""
    if not oracle.holds(group, ()):
        return [_refusal(problem, oracle, group, (), links)]
    result: list[Refusal] = []
    for stored in _at_fault(oracle, group, kept):
        cut = _refusal(problem, oracle, group, stored, links)
        inside = set(cut.nodes) - set(problem.copies)
        readers = (set(problem.tensors[t].consumers) - inside for t in stored)
        if math.prod(max(1, len(some)) for some in readers) <= _WAYS:
            result.append(cut)
    return result or [Refusal(tuple(group), rest=False)]


def leaving(problem: Problem, group: Sequence[int]) -> list[int]:
    """The tensors of a group that are needed outside it, if no node has copies."""
    members = set(group)
    return [
        index
        for index, tensor in enumerate(problem.tensors)
        if tensor.producer in members
        and (tensor.leaves or not members.issuperset(tensor.consumers))
    ]


def _at_fault(
    oracle: Oracle, group: Sequence[int], leaving: Sequence[int]
) -> list[tuple[int, ...]]:
    """Each result that these nodes cannot store; failing that, few that they cannot together."""
    single: list[tuple[int, ...]] = [(t,) for t in leaving if not oracle.holds(group, (t,))]
    if single or oracle.holds(group, leaving):
        return single
    few = list(leaving)
    for t in leaving:
        rest = [other for other in few if other != t]
        if not oracle.holds(group, rest):
            few = rest
    return [tuple(few)]


def _refusal(
    problem: Problem,
    oracle: Oracle,
    group: Sequence[int],
    stored: tuple[int, ...],
    links: Sequence[set[int]],
) -> Refusal:
    """The refusal of a group that stores these tensors, with few nodes, that the group breaks."""
    kept = {n for t in stored if (n := problem.tensors[t].producer) is not None}
    kept.update(p.node for p in problem.products if p.node in group)
    while True:
        core = _core(problem, oracle, group, stored, kept, links)
        helpers = _helpers(oracle, core, stored, links)
        present = [helper for helper in helpers if helper.issubset(group)]
        if not present:
            unless = {min(helper.difference(group)) for helper in helpers}
            return Refusal(core, stored, tuple(sorted(unless)))
        kept.update(*present)


def _helpers(
    oracle: Oracle, nodes: Sequence[int], stored: Sequence[int], links: Sequence[set[int]]
) -> list[set[int]]:
    """Other nodes, one or two, with which refused nodes are taken.

    Only those are asked about that are linked to the nodes, two to several of them.
    """
    inside = set(nodes)
    near = {n: links[n] & inside for node in nodes for n in links[node] - inside}

    def taken(*others: int) -> bool:
        return oracle.holds(sorted((*nodes, *others)), stored)

    single = {n for n in sorted(near) if taken(n)}
    rest = sorted(near.keys() - single)
    linked = ((a, b) for a in rest for b in rest if a < b and b in links[a])
    pairs = [{a, b} for a, b in linked if len(near[a] | near[b]) > 1 and taken(a, b)]
    return [*({n} for n in sorted(single)), *pairs]


def _core(
    problem: Problem,
    oracle: Oracle,
    group: Sequence[int],
    stored: Sequence[int],
    kept: Collection[int],
    links: Sequence[set[int]],
) -> tuple[int, ...]:
    """Few nodes that are refused already, by deleting ever smaller pieces; ``kept`` stay."""
    core = list(group)
    values = [set[int]() for _ in range(problem.size)]
    for a, b in problem.edges:
        values[a].add(b)
        values[b].add(a)
    most = len(components(group, values))
    piece = len(core) // 2
    while piece:
        index = 0
        while index < len(core):
            gone = set(core[index : index + piece]).difference(kept)
            rest = [n for n in core if n not in gone]
            # Pieces that do not touch would be refused for that alone, and at times those that only
            # read the same.
            touching = len(rest) > 1 and len(components(rest, links)) == 1
            touching = touching and len(components(rest, values)) <= most
            if gone and touching and not oracle.holds(rest, stored):
                core = rest
            else:
                index += piece
        piece //= 2
    return tuple(core)
