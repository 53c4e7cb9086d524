"""The iteration spaces that a component's nodes can be computed in.

A group has one space, a :class:`~.problem.Label`: its points and, if it reduces, the length of its
rows. EVT's nodes differ in the same way by "the iteration space" that a template walks.
"""

from __future__ import annotations

from collections.abc import Sequence

from jevt.partition.graph import Graph
from jevt.partition.problem import Label
from jevt.partition.reach import Links, Reach

#: In a component of more nodes, any reduction is taken to be possible: it is about to fall apart.
_LARGE = 300


def labels_of(graph: Graph, part: Sequence[int]) -> tuple[Label, ...]:
    """The spaces that the nodes of a component can give a group."""
    nodes = [graph.nodes[n] for n in part]
    spaces = {(node.size, node.cols) for node in nodes} | {(node.size, 0) for node in nodes}
    return tuple(Label(size, cols) for size, cols in sorted(spaces))


def places(
    graph: Graph, reach: Reach, part: Sequence[int], links: Links
) -> dict[int, tuple[int, int]]:
    """For each node, two sets of labels, as bit masks of positions in :func:`labels_of`.

    First those that hold it as a full tile or as rows. A label with rows counts only if a reduction
    that gives a group such rows may be with the node. Second those that hold it as something
    smaller, whose results cannot be stored: they need all its consumers in the group, so each must
    have a place under the label too.
    """
    labels = labels_of(graph, part)
    inside = sum(1 << n for n in part)
    reducing: dict[tuple[int, int], list[int]] = {}
    for node in part:
        if graph.nodes[node].cols:
            reducing.setdefault((graph.nodes[node].size, graph.nodes[node].cols), []).append(node)

    def reducible(node: int, label: Label) -> bool:
        return (not label.cols or len(part) > _LARGE) or any(
            not (reach.between(node, other) | reach.between(other, node)) & ~inside
            for other in reducing[label.size, label.cols]
        )

    result: dict[int, tuple[int, int]] = {}
    for node in reversed(part):
        this = graph.nodes[node]
        firm = smaller = 0
        for bit, label in enumerate(labels):
            if this.cols:
                firm |= ((label.size, label.cols) == (this.size, this.cols)) << bit
            elif this.size == label.size or (label.cols and this.size * label.cols == label.size):
                firm |= reducible(node, label) << bit
            elif this.size < label.size:
                smaller |= reducible(node, label) << bit
        for tensor in graph.writes[node]:
            if graph.tensors[tensor].escapes:
                smaller = 0
            for consumer in graph.tensors[tensor].consumers:
                known = (node, consumer) in links.edges and consumer in result
                smaller &= sum(result[consumer]) if known else 0
        result[node] = firm, smaller
    return result
