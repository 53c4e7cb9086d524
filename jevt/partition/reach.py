"""What depends on what, and which nodes may share a group."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from jevt.partition.graph import Graph


@dataclasses.dataclass(frozen=True)
class Reach:
    """For each node, what depends on it and what it depends on (itself included), as bit masks."""

    below: list[int]
    above: list[int]

    @classmethod
    def of(cls, graph: Graph) -> Reach:
        count = len(graph.nodes)
        below, above = [0] * count, [0] * count
        for node in range(count):
            mask = 1 << node
            for previous in graph.predecessors[node]:
                mask |= above[previous]
            above[node] = mask
        for node in reversed(range(count)):
            mask = 1 << node
            for following in graph.successors[node]:
                mask |= below[following]
            below[node] = mask
        return cls(below, above)

    def separated(self, graph: Graph, part: Sequence[int]) -> dict[int, int]:
        """For each node of a part, the nodes with which a path that leaves the part connects it.

        They can share no group: what lies on such a path would have to run inside the group. A path
        into a matrix product counts as one that leaves the part (see :mod:`.components`).
        """
        part = sorted(part)
        inside = set(part)
        passable = {node for node in part if graph.nodes[node].kind != "contraction"}
        after: dict[int, int] = {}
        for node in reversed(part):
            after[node] = 0
            for following in graph.successors[node]:
                after[node] |= after[following] if following in passable else self.below[following]
        before: dict[int, int] = {}
        for node in part:
            before[node] = 0
            for previous in graph.predecessors[node]:
                within = previous in inside and node in passable
                before[node] |= before[previous] if within else self.above[previous]
        return {node: after[node] | before[node] for node in part}


def mates(node: int, separated: Mapping[int, int], links: Links) -> set[int]:
    """The nodes that some connected group may hold together with ``node``."""
    found = {node}
    stack = [node]
    while stack:
        for other in links.adjacent[stack.pop()]:
            if other not in found and not separated[node] >> other & 1:
                found.add(other)
                stack.append(other)
    return found


@dataclasses.dataclass(frozen=True)
class Links:
    """Pairs of nodes that may share a group: producer–consumer, and readers of one tensor."""

    edges: frozenset[tuple[int, int]]
    siblings: frozenset[tuple[int, int]]

    def where(self, possible: Callable[[int, int], bool]) -> Links:
        """The links for which ``possible`` holds."""
        return Links(
            frozenset(e for e in self.edges if possible(*e)),
            frozenset(e for e in self.siblings if possible(*e)),
        )

    @functools.cached_property
    def adjacent(self) -> Mapping[int, list[int]]:
        """For each node, those that a link joins it with."""
        result: dict[int, list[int]] = collections.defaultdict(list)
        for a, b in (*self.edges, *self.siblings):
            result[a].append(b)
            result[b].append(a)
        return result

    @functools.cached_property
    def by_first(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """The second nodes of edges and of siblings, by the first."""
        result: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
        for pairs, found in zip((self.edges, self.siblings), result, strict=True):
            for a, b in pairs:
                found.setdefault(a, []).append(b)
        return result


def bits(mask: int) -> list[int]:
    """The positions of the ones of a mask, ascending."""
    if mask.bit_count() * 16 > mask.bit_length():
        return [i for i, digit in enumerate(bin(mask)[:1:-1]) if digit == "1"]
    result: list[int] = []
    while mask:
        lowest = mask & -mask
        result.append(lowest.bit_length() - 1)
        mask ^= lowest
    return result
