"""What of a problem needs no variable: pairs that never share a group, labels that others cover."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jevt.partition.problem import Problem
from jevt.partition.reach import bits


def variables(problem: Problem) -> int:
    """Number of ``in`` variables, which is what the size of the program goes with."""
    never = never_together(problem, *reach(problem.successors()))
    return sum(len(members(problem, r, mask)) for r, mask in enumerate(never))


def members(problem: Problem, name: int, never: int) -> list[int]:
    """The nodes that may be in the group of a name (see ``Problem.name``).

    ``never`` are the nodes that never share a group with it, as a bit mask.
    """
    copied, products = set(problem.copies), {p.node for p in problem.products}
    if name in products:
        found = set(range(problem.size)) - products | {name}
    elif name in copied:
        found = {v for v in copied if v >= name}
    else:
        found = {*range(name, problem.size), *copied} - products
    return sorted(v for v in found if not never >> v & 1)


def never_together(problem: Problem, above: Sequence[int], below: Sequence[int]) -> list[int]:
    """For each node, the nodes that never share its group, as a bit mask.

    Of an ordered pair (a, b), nothing before a can be with anything after b: their group would hold
    the paths between them, and so a and b. A copy of what is before a can, but a itself is not with
    b in any case.
    """
    never = [0] * problem.size
    copied = sum(1 << node for node in problem.copies)
    for a, b in problem.ordered:
        never[a] |= 1 << b
        never[b] |= 1 << a
        before = above[a] & ~copied
        for u in bits(before):
            never[u] |= below[b]
        for v in bits(below[b]):
            never[v] |= before
    for a, b in itertools.combinations([p.node for p in problem.products], 2):
        never[a] |= 1 << b
        never[b] |= 1 << a
    places = [firm | inner for firm, inner in zip(problem.firm, problem.inner, strict=True)]
    for a in range(problem.size):
        for b in range(a):
            if not places[a] & places[b]:
                never[a] |= 1 << b
                never[b] |= 1 << a
    return never


def reach(successors: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """For each node, its ancestors and its descendants, itself included, as bit masks."""
    count = len(successors)
    above, below = [1 << v for v in range(count)], [1 << v for v in range(count)]
    for v in range(count):
        for w in successors[v]:
            above[w] |= above[v]
    for v in reversed(range(count)):
        for w in successors[v]:
            below[v] |= below[w]
    return above, below


def widest(problem: Problem) -> list[int]:
    """The labels worth choosing: those whose nodes another label does not hold as well."""
    labels = range(len(problem.labels))
    firm = [_holders(problem.firm, label) for label in labels]
    held = [firm[label] | _holders(problem.inner, label) for label in labels]

    def covers(a: int, b: int) -> bool:
        if problem.labels[a].product and not problem.labels[b].product:
            return False  # a group without a product has no such space
        return not firm[b] & ~firm[a] and not held[b] & ~held[a]

    return [
        label
        for label in labels
        if not any(
            covers(other, label) and (other < label or not covers(label, other))
            for other in labels
            if other != label
        )
    ]


def _holders(masks: Sequence[int], label: int) -> int:
    """The nodes whose masks have the label, as a bit mask."""
    return sum((mask >> label & 1) << node for node, mask in enumerate(masks))
