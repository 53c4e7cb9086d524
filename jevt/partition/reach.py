"""What depends on what, and which nodes may share a group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

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

    def between(self, a: int, b: int) -> int:
        """The nodes on paths from ``a`` to ``b``, 0 if there is none."""
        return self.below[a] & self.above[b]


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

    def adjacency(self, count: int) -> list[list[int]]:
        """For each node, those that a link joins it with."""
        result: list[list[int]] = [[] for _ in range(count)]
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
