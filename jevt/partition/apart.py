"""What of a problem needs no variable: pairs that never share a group, labels that others cover."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jevt.partition.problem import Problem
from jevt.partition.reach import bits


def variables(problem: Problem) -> int:
    """Number of ``in`` variables, which is what the size of the program goes with."""
    never = never_together(problem, *reach(problem.successors()))
    return sum(v + 1 - (mask & ((2 << v) - 1)).bit_count() for v, mask in enumerate(never))


def never_together(problem: Problem, above: Sequence[int], below: Sequence[int]) -> list[int]:
    """For each node, the nodes that never share its group, as a bit mask.

    Of an ordered pair (a, b), nothing before a can be with anything after b: their group would hold
    the paths between them, and so a and b.
    """
    never = [0] * problem.size
    for a, b in problem.ordered:
        for u in bits(above[a]):
            never[u] |= below[b]
        for v in bits(below[b]):
            never[v] |= above[a]
    for (a, _), (b, _) in itertools.combinations(problem.products, 2):
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
