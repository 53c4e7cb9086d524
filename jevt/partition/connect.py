"""What links a node to the others of its group: reachability, articulation points, separators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """The nodes that a connected group may hold together with its first node.

    Attributes:
      first: the node.
      via: for each node that links reach from ``first``, the nearest node that all chains of links
        to it pass through; ``first`` itself where no other does.
    """

    first: int
    via: Mapping[int, int]

    @classmethod
    def of(cls, first: int, allowed: Iterable[int], links: Sequence[Iterable[int]]) -> Surroundings:
        """By depth-first search (Tarjan 1972), over links between allowed nodes."""
        inside = set(allowed)
        number, low = {first: 0}, {first: 0}
        children: list[tuple[int, int]] = []  # in the order in which they are found
        parent: dict[int, int] = {}
        stack = [(first, iter(sorted(links[first])))]
        while stack:
            node, rest = stack[-1]
            for other in rest:
                if other not in inside:
                    continue
                if other not in number:
                    number[other] = low[other] = len(number)
                    parent[other] = node
                    children.append((other, node))
                    stack.append((other, iter(sorted(links[other]))))
                    break
                low[node] = min(low[node], number[other])
            else:
                stack.pop()
                if node in parent:
                    low[parent[node]] = min(low[parent[node]], low[node])
        via = {first: first}
        for node, above in children:
            via[node] = above if low[node] >= number[above] else via[above]
        return cls(first, via)

    def separators(
        self, piece: Iterable[int], links: Sequence[Iterable[int]]
    ) -> Iterator[list[int]]:
        """Sets of nodes such that every chain of links from ``piece`` to ``first`` passes each set.

        They are the nodes at distance 1, 2, … from ``piece``.
        """
        found = set(piece)
        layer = found
        while layer:
            layer = {w for v in layer for w in links[v] if w in self.via} - found
            found |= layer
            if self.first in layer:
                break
            yield sorted(layer)
