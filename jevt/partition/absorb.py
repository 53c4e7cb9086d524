"""Joins the leaves of a component to what they read, before it is solved.

A leaf ``v`` reads one tensor ``t``, made in the component by ``u``, beside it only inputs of the
program that no one else there reads, and nothing in the component depends on it: a bias gradient
that sums the gradient of an activation, a parameter's update, a value that is only stored.
If every space that ``u`` can be in has a place for ``v``, an optimal partition has both in one
group: take one that does not, and move ``v`` to the group of ``u``. Acyclic inside the component,
because ``v`` depends on nothing but ``u``, and nothing there on ``v``. Cost: ``t`` is not read for
``v`` any more, and what only ``v`` reads is read as before. What ``v`` was with are readers of
``t`` and stay connected. Template: a ``v`` that sums along rows forbids the group of ``u`` to store
values of rows, so it must have none to store: each such value that can be there must have all its
readers on paths to ``u``, which the group holds because it is convex.

This is more than fewer nodes. A gradient that two layers share is read by a leaf and by the next
layer; without the leaf nothing links the two layers, and the component falls apart. That is worth
an assumption: a leaf that links its producer to nodes that can be in no group with it is joined
even if values of rows might have to be stored. The problem is then stated as if the leaf forbade
nothing, so that its optimum is a bound for all partitions. If ``build`` takes the solution all the
same, as it mostly does, that is the optimum; otherwise there remains a gap (``Problem.assumed``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from jevt.partition.contract import merge, ordered
from jevt.partition.graph import Graph, Node
from jevt.partition.problem import Label
from jevt.partition.reach import Links, Reach, bits, mates
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
    assumed: set[int] = set()
    for part in parts:
        labels = labels_of(graph, part)
        separated = reach.separated(graph, part)
        found = places(graph, part, links, separated)
        inside = sum(1 << n for n in part)
        for leaf in part:
            producer = _producer(graph, links, leaf, inside)
            if producer is None or reach.below[leaf] & inside != 1 << leaf:
                continue
            held = {labels[bit] for bit in bits(found[leaf][0])}
            spaces = _strongest([labels[bit] for bit in bits(sum(found[producer]))])
            if any(label.late for label in held):
                spaces = {dataclasses.replace(label, late=True) for label in spaces}
                if not spaces <= held:
                    continue
                near = mates(producer, separated, links)
                if _may_store(graph, reach, near, producer):
                    if near.issuperset(links.adjacent[leaf]):
                        continue
                    assumed.add(leaf)
            if spaces <= held:
                home[leaf] = home.get(producer, producer)
    groups: dict[int, list[int]] = {}
    for node in range(len(graph.nodes)):
        groups.setdefault(home.get(node, node), []).append(node)
    nodes: list[Node] = []
    for group in groups.values():
        members = [graph.nodes[n] for n in group]
        if len(members) > 1 and accepts(tuple(p for m in members for p in m.eqns)):
            joined = merge(graph, members)
            nodes.append(dataclasses.replace(joined, assumed=not assumed.isdisjoint(group)))
        else:
            nodes.extend(members)
    return ordered(graph, nodes) if len(nodes) < len(graph.nodes) else graph


def _producer(graph: Graph, links: Links, leaf: int, inside: int) -> int | None:
    """The node that makes what a node reads, if it may share its group."""
    made = [t for t in map(graph.tensors.__getitem__, graph.reads[leaf]) if t.producer is not None]
    if len(made) != 1 or (made[0].producer, leaf) not in links.edges:
        return None
    given = [t for t in map(graph.tensors.__getitem__, graph.reads[leaf]) if t.producer is None]
    if any(t.size > 1 and any(c != leaf and inside >> c & 1 for c in t.consumers) for t in given):
        return None
    return made[0].producer


def _strongest(labels: Sequence[Label]) -> set[Label]:
    """The labels without those that another one with rows of the same points stands for."""
    with_rows = {label.size for label in labels if label.cols}
    return {label for label in labels if label.cols or label.size not in with_rows}


def _may_store(graph: Graph, reach: Reach, near: Iterable[int], node: int) -> bool:
    """Whether a kernel with a node may hold what makes a value of rows, but not all its readers."""
    above = reach.above[node]
    for mate in near:
        for tensor in (graph.tensors[t] for t in graph.writes[mate]):
            stored = tensor.escapes or not all(above >> c & 1 for c in tensor.consumers)
            if stored and not tensor.late and tensor.size < graph.nodes[node].size:
                return True
    return False
