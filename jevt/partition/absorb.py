"""Joins the leaves of a component to what they read, before it is solved.

A leaf ``v`` reads one tensor ``t``, made in the component by ``u``, and nothing in the component
depends on it: a bias gradient that sums the gradient of an activation, a value that is only stored.
If every space that ``u`` can be in has a place for ``v``, an optimal partition has both in one
group: take one that does not, and move ``v`` to the group of ``u``. Acyclic inside the component,
because ``v`` depends on nothing but ``u``, and nothing there on ``v``. Cost: ``t`` is not read for
``v`` any more. What ``v`` was with are readers of ``t`` and stay connected.

This is more than fewer nodes. A gradient that two layers share is read by a leaf and by the next
layer; without the leaf nothing links the two layers, and the component falls apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jevt.partition.contract import merge, ordered
from jevt.partition.graph import Graph
from jevt.partition.problem import Label
from jevt.partition.reach import Links, Reach
from jevt.partition.spaces import labels_of, places


def absorb(
    graph: Graph,
    reach: Reach,
    parts: Sequence[Sequence[int]],
    links: Links,
    accepts: Callable[[tuple[int, ...]], bool],
) -> Graph:
    """The graph with leaves joined to their producers; the same object if there are none."""
    home: dict[int, int] = {}
    for part in parts:
        labels = labels_of(graph, part)
        found = places(graph, reach, part, links)
        inside = sum(1 << n for n in part)
        for leaf in part:
            producer = _producer(graph, links, leaf)
            if producer is None or reach.below[leaf] & inside != 1 << leaf:
                continue
            if not _without_plain(sum(found[producer]), labels) & ~found[leaf][0]:
                home[leaf] = home.get(producer, producer)
    groups: dict[int, list[int]] = {}
    for node in range(len(graph.nodes)):
        groups.setdefault(home.get(node, node), []).append(node)
    nodes = []
    for group in groups.values():
        members = [graph.nodes[n] for n in group]
        if len(members) > 1 and accepts(tuple(p for m in members for p in m.eqns)):
            nodes.append(merge(graph, members))
        else:
            nodes.extend(members)
    return ordered(graph, nodes) if len(nodes) < len(graph.nodes) else graph


def _producer(graph: Graph, links: Links, leaf: int) -> int | None:
    """The node that makes all that a node reads, if it may share its group."""
    if len(graph.reads[leaf]) != 1:
        return None
    producer = graph.tensors[graph.reads[leaf][0]].producer
    return producer if producer is not None and (producer, leaf) in links.edges else None


def _without_plain(mask: int, labels: Sequence[Label]) -> int:
    """The labels without those that another one with rows of the same points stands for."""
    with_rows = {label.size for bit, label in enumerate(labels) if label.cols and mask >> bit & 1}
    return sum(
        1 << bit
        for bit, label in enumerate(labels)
        if mask >> bit & 1 and (label.cols or label.size not in with_rows)
    )
