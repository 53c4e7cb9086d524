"""The iteration spaces that a component's nodes can be computed in.

A group has one space, a :class:`~.problem.Label`: its points and, if it reduces, the length of its
rows. EVT's nodes differ in the same way by "the iteration space" that a template walks.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Literal

from jax.extend.core import Var

from jevt.partition.graph import Graph, Node, elements, shrinks
from jevt.partition.problem import Label
from jevt.partition.reach import Links
from jevt_kernels.mainloops import columnwise


def labels_of(graph: Graph, part: Sequence[int]) -> tuple[Label, ...]:
    """The spaces that the nodes of a component can give a group."""
    nodes = [graph.nodes[n] for n in part]
    spaces = {(node.size, node.cols, bool(node.ends), False) for node in nodes}
    spaces |= {(node.size, 0, False, False) for node in nodes}
    spaces |= {(node.size, 0, False, True) for node in nodes if node.kind == "contraction"}
    return tuple(Label(*space) for space in sorted(spaces))


def places(
    graph: Graph, part: Sequence[int], links: Links, separated: Mapping[int, int]
) -> dict[int, tuple[int, int]]:
    """For each node, two sets of labels, as bit masks of positions in :func:`labels_of`.

    First those that hold it as a full tile or as rows. A label with rows counts only if a reduction
    that gives a group such rows may be with the node. Second those that hold it as something whose
    results cannot be stored, because it is smaller or because sums along rows are: they need all
    its consumers in the group, so each must have a place under the label too. ``separated`` is of
    :meth:`.Reach.separated`.
    """
    labels = labels_of(graph, part)
    reducible = _Reducible(graph, part, separated)
    result: dict[int, tuple[int, int]] = {}
    for node in reversed(part):
        consumers = _all_consumers(graph, links, node)
        shared = 0
        if consumers is not None and all(c in result for c in consumers):
            shared = (1 << len(labels)) - 1
            for consumer in consumers:
                shared &= sum(result[consumer])
        firm = inner = 0
        for bit, label in enumerate(labels):
            fit = _fit(graph, links, node, label)
            if fit == "full" or (fit == "rows" and not label.late):
                firm |= reducible(node, label) << bit
            elif fit and shared >> bit & 1:
                inner |= reducible(node, label) << bit
        result[node] = firm, inner
    return result


def _fit(
    graph: Graph, links: Links, index: int, label: Label
) -> Literal["full", "rows", "part", ""]:
    """What of a label's space the results of a node span, "" if it has no place there."""
    node = graph.nodes[index]
    early = [t for t in map(graph.tensors.__getitem__, graph.writes[index]) if not t.late]
    if node.kind == "contraction":
        return "full" if label.product and node.size == label.size else ""
    if node.cols and label.product:
        # What reads a sum is not in its group. A number's readers that are numbers have no place in
        # a product's space; of others this node is kept apart.
        sums = [t for t in early if t.size < label.size]
        read = any(
            (index, c) in links.edges and max(t.size, graph.nodes[c].size) > 1
            for t in sums
            for c in t.consumers
        )
        return "" if read or node.size != label.size or _reads_sums(graph, node) else "full"
    if label.product and node.size <= 1 and _reads_a_total(graph, index):
        return ""
    if node.cols:
        strict = bool(node.ends) and not node.assumed
        if label.late and not node.ends and not late_rows(label):
            return ""
        if (node.size, node.cols) != (label.size, label.cols) or (strict and not label.late):
            return ""
        return "full" if all(t.size == label.size for t in early) else "rows"
    if node.size == label.size:
        return "full"
    if label.cols and node.size * label.cols == label.size:
        return "rows"
    return "part" if node.size < label.size else ""


def late_rows(label: Label) -> bool:
    """Whether a kernel with sums along rows can reduce its rows too, all of one on chip."""
    return label.cols <= columnwise.MAX_WHOLE


def _reads_sums(graph: Graph, node: Node) -> bool:
    """Whether one of a node's equations reads what another has reduced."""
    eqns = [graph.jaxpr.eqns[p] for p in node.eqns]
    sums = {
        v
        for e in eqns
        for v in e.outvars
        for a in e.invars
        if isinstance(a, Var) and elements(a.aval) > elements(v.aval) and not shrinks(e, a)
    }
    return any(v in sums for e in eqns for v in e.invars if isinstance(v, Var))


def _reads_a_total(graph: Graph, index: int) -> bool:
    """Whether a node reads one number that a reduction gives."""
    makers = (graph.tensors[t].producer for t in graph.reads[index])
    return any(p is not None and graph.nodes[p].cols for p in makers)


def _all_consumers(graph: Graph, links: Links, node: int) -> list[int] | None:
    """The nodes that read a node's results; None if one of them can be in no group with it."""
    consumers: list[int] = []
    for tensor in graph.writes[node]:
        if graph.tensors[tensor].escapes:
            return None
        consumers += graph.tensors[tensor].consumers
    return consumers if all((node, c) in links.edges for c in consumers) else None


class _Reducible:
    """Whether a node can be in a group whose rows have the length of a label.

    Some reduction of the component must give the group such rows, and no path between the two may
    leave the component. In the same way a matrix product must be there, and the node not before it.
    """

    def __init__(self, graph: Graph, part: Sequence[int], separated: Mapping[int, int]) -> None:
        self.separated = separated
        self.reductions: dict[Label, int] = collections.defaultdict(int)
        for n in part:
            node = graph.nodes[n]
            if node.kind == "contraction":
                self.reductions[Label(node.size, 0, product=True)] |= 1 << n
            if node.cols:
                self.reductions[Label(node.size, node.cols, bool(node.ends))] |= 1 << n

    def __call__(self, node: int, label: Label) -> bool:
        plain = not label.cols and not label.product
        return plain or bool(self.reductions[label] & ~self.separated[node])
