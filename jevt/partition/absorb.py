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

That counts traffic, and launches: ``v`` alone was one more. A group around a matrix product has
other prices: part of its traffic is hidden, and what it reduces takes a second stage. So where a
``v`` may be with other readers of ``t``, and with a product, it stays as it is. It is joined all
the same if it moves no more than the hundredth part of a launch, or if it is a sum along rows that
holds two components together (see below). Then there may be lost at most: a second stage that the
readers' group has in any case and ``u``'s does not; the same and the difference of launches if
``u``'s group was sums, which XLA runs as one kernel only while they are all that it writes; and,
where arithmetic is what takes the time of ``u``'s group, the arithmetic of ``v``. The plan's bound
is lower by that (``Node.unproven``, :func:`.prices.unproven_us`).

This is more than fewer nodes. A gradient that two layers share is read by a leaf and by the next
layer; without the leaf nothing links the two layers, and the component falls apart. That is worth
an assumption: a leaf that links its producer to nodes that can be in no group with it is joined
even if values of rows might have to be stored. The problem is then stated as if the leaf forbade
nothing, so that its optimum, less what the leaf may cost there and not elsewhere (``unproven``,
too), is a bound for all partitions. If ``build`` takes the solution all the same, as it mostly
does, the solution is as good as that optimum; otherwise there remains a gap (``Problem.assumed``).
Where the leaf does not fit at all, because rows are too long to be on chip beside sums along them,
it is loosened: links to other readers of ``t`` are dropped. Every partition that uses them costs no
less than one that does not, minus a launch and one time reading ``t`` (:func:`allowance`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

from jevt.partition.contract import merge, ordered
from jevt.partition.graph import Graph, Node
from jevt.partition.problem import Label
from jevt.partition.reach import Links, Reach, bits, mates
from jevt.partition.spaces import labels_of, late_rows, places


def absorb(
    graph: Graph,
    reach: Reach,
    parts: Sequence[Sequence[int]],
    links: Links,
    accepts: Callable[[tuple[int, ...]], bool],
    launch: int,
) -> Graph:
    """The graph with leaves joined to their producers; the same object if there is none to join.

    Args:
      graph: nodes and tensors.
      reach: what depends on what.
      parts: the components.
      links: pairs that may share a group.
      accepts: whether the equations at these positions can be one kernel.
      launch: bytes that a launch is worth.
    """
    home: dict[int, int] = {}
    changed: dict[int, Node] = {}
    for part in parts:
        pieces = _Part(graph, reach, links, part, launch // 100)
        for leaf in part:
            producer = _producer(graph, links, leaf, pieces.inside)
            if producer is None or reach.below[leaf] & pieces.inside != 1 << leaf:
                continue
            verdict, own = pieces.verdict(leaf, producer), graph.nodes[leaf]
            if verdict == "loosen":
                changed[leaf] = dataclasses.replace(own, loose=True)
            elif verdict:
                home[leaf] = home.get(producer, producer)
                assumed = verdict == "assume"
                unproven = (own.eqns,) if assumed or pieces.beside_product(leaf) else ()
                changed[leaf] = dataclasses.replace(own, assumed=assumed, unproven=unproven)
    if not home and not changed:
        return graph
    groups: dict[int, list[int]] = {}
    for node in range(len(graph.nodes)):
        groups.setdefault(home.get(node, node), []).append(node)
    nodes: list[Node] = []
    for group in groups.values():
        members = [changed.get(n, graph.nodes[n]) for n in group]
        if len(members) > 1 and accepts(tuple(p for m in members for p in m.eqns)):
            nodes.append(merge(graph, members))
        else:
            nodes.extend(dataclasses.replace(m, assumed=False, unproven=()) for m in members)
    return ordered(graph, nodes)


def allowance(graph: Graph, launch: int) -> int:
    """Bytes by which a partition that puts loose leaves with other readers may be cheaper."""
    loose = [index for index, node in enumerate(graph.nodes) if node.loose]
    return sum(launch + sum(graph.tensors[t].nbytes for t in graph.reads[n]) for n in loose)


class _Part:
    """What there is to know of a component before its leaves are joined."""

    def __init__(
        self, graph: Graph, reach: Reach, links: Links, part: Sequence[int], slack: int
    ) -> None:
        self.graph, self.reach, self.links, self.slack = graph, reach, links, slack
        self.inside = sum(1 << n for n in part)
        self.labels = labels_of(graph, part)
        self.separated = reach.separated(graph, part)
        self.places = places(graph, part, links, self.separated)

    def verdict(self, leaf: int, producer: int) -> Literal["join", "assume", "loosen", ""]:
        """What is to become of a leaf; "" where it stays as it is."""
        held = self._labels(self.places[leaf][0])
        spaces = _strongest(self._labels(sum(self.places[producer])))
        near = mates(producer, self.separated, self.links)
        bridge = not near.issuperset(self.links.adjacent[leaf])
        kept = bridge and self.graph.nodes[leaf].ends
        if self.beside_product(leaf) and not (kept or self._moves_little(leaf)):
            return ""
        if any(label.late for label in held):
            with_sums = {dataclasses.replace(x, late=not x.product) for x in spaces}
            short = all(late_rows(x) for x in spaces if x.cols and not x.late)
            if short and with_sums <= held:
                if not _may_store(self.graph, self.reach, near, producer):
                    return "join"
                return "assume" if bridge else ""
        elif spaces <= held:
            return "join"
        return "loosen" if bridge else ""

    def beside_product(self, leaf: int) -> bool:
        """Whether a leaf may be with other readers, and a product with one of them."""
        if len(self.links.adjacent[leaf]) == 1:
            return False
        near = mates(leaf, self.separated, self.links)
        return any(self.graph.nodes[n].kind == "contraction" for n in near)

    def _moves_little(self, leaf: int) -> bool:
        """Whether a leaf moves no more, beside what it reads of its producer, than is counted."""
        graph = self.graph
        touched = (graph.tensors[t] for t in (*graph.reads[leaf], *graph.writes[leaf]))
        moved = sum(t.nbytes for t in touched if t.producer in (None, leaf) and t.size > 1)
        return not graph.nodes[leaf].cols and moved <= self.slack

    def _labels(self, mask: int) -> set[Label]:
        return {self.labels[bit] for bit in bits(mask)}


def _producer(graph: Graph, links: Links, leaf: int, inside: int) -> int | None:
    """The node that makes what a node reads, if it may share its group."""
    made = [t for t in map(graph.tensors.__getitem__, graph.reads[leaf]) if t.producer is not None]
    if len(made) != 1 or (made[0].producer, leaf) not in links.edges:
        return None
    if made[0].producer is None or graph.nodes[made[0].producer].kind == "contraction":
        return None  # which may be left to cuBLAS, alone
    if graph.nodes[leaf].free and (made[0].escapes or made[0].consumers != (leaf,)):
        return None  # alone, it has its operand's buffer; with it, a buffer of its own
    given = [t for t in map(graph.tensors.__getitem__, graph.reads[leaf]) if t.producer is None]
    if any(t.size > 1 and any(c != leaf and inside >> c & 1 for c in t.consumers) for t in given):
        return None
    return made[0].producer


def _strongest(labels: Collection[Label]) -> set[Label]:
    """The labels without those that another one with rows of the same points stands for."""
    with_rows = {label.size for label in labels if label.cols}
    return {x for x in labels if x.cols or x.product or x.size not in with_rows}


def _may_store(graph: Graph, reach: Reach, near: Iterable[int], node: int) -> bool:
    """Whether a kernel with a node may hold what makes a value of rows, but not all its readers."""
    above = reach.above[node]
    for mate in near:
        for tensor in (graph.tensors[t] for t in graph.writes[mate]):
            stored = tensor.escapes or not all(above >> c & 1 for c in tensor.consumers)
            if stored and not tensor.late and tensor.size < graph.nodes[node].size:
                return True
    return False
