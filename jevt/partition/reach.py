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

    def between(self, a: int, b: int) -> int:
        """The nodes on paths from ``a`` to ``b``, 0 if there is none."""
        return self.below[a] & self.above[b]

    def mates(self, node: int, part: Sequence[int], links: Links) -> set[int]:
        """The nodes of a part that some connected group may hold together with ``node``.

        A path between the two must not leave the part, nor one between ``node`` and what links
        them.
        """
        outside = ~sum(1 << n for n in part)
        found = {node}
        stack = [node]
        while stack:
            for other in links.adjacent[stack.pop()]:
                if other not in found and not outside & (
                    self.between(node, other) | self.between(other, node)
                ):
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
    return [i for i, digit in enumerate(bin(mask)[:1:-1]) if digit == "1"]
