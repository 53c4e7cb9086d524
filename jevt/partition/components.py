"""Splits the graph into components that no useful group crosses.

EVT's first step: "V is divided into disjoint components {C1 … Cm}" (ASPLOS 2024, section 5). Here
the split loses nothing. Two nodes can share a group only if a kernel could hold both and no path
between them leaves the component: what lies on such a path would have to run before the group ends
and after it begins. So edges that a path through an opaque node shadows are struck out, the rest
falls apart into components, paths through *other* components strike out more, and so on until
nothing changes. In a transformer every residual connection is struck out by the matrix
multiplications beside it, so the components are what lies between two of them, however many layers
there are.

EVT's second step: the border is rebuilt. For two nodes of a component with a path outside it, the
problem gets the pair in ``ordered``, because any partition must respect that path. Two components'
groups can still form a cycle together (each alone is fine); the driver looks for that and solves
those two as one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

from jevt.partition import problem as problems
from jevt.partition.graph import Graph, Node, shrinks
from jevt.partition.problem import Label, Problem, Traffic

#: Readers of one tensor beyond this number are paired with their nearest neighbours only.
_ALL_PAIRS = 8


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


def split(graph: Graph, reach: Reach) -> tuple[list[list[int]], Links]:
    """The components (of one node and more, opaque nodes left out) and the links inside them."""
    single = {n for n, node in enumerate(graph.nodes) if node.opaque} | _relabelled_inputs(graph)
    links = _candidates(graph, single)
    fusible = [n for n, node in enumerate(graph.nodes) if not node.opaque]
    parts = [fusible]
    while True:
        home = {n: index for index, part in enumerate(parts) for n in part}
        outside = [~sum(1 << n for n in part if n not in single) for part in parts]
        place = _all_places(graph, parts, links)

        kept = links.where(_Possible(reach, home, outside, place))
        again = problems.components(fusible, kept.adjacency(len(graph.nodes)))
        if len(again) == len(parts) and kept == links:
            return again, kept
        parts, links = again, kept


def pose(graph: Graph, reach: Reach, part: Sequence[int], links: Links, launch: int) -> Problem:
    """The problem of one component; local node ``i`` is ``part[i]``."""
    local = {node: index for index, node in enumerate(part)}
    edges, siblings = (
        sorted((local[a], local[b]) for a in part for b in found.get(a, ()) if b in local)
        for found in links.by_first
    )
    used = sorted({t for n in part for t in (*graph.reads[n], *graph.writes[n])})
    tensors = tuple(_traffic(graph, t, local) for t in used)
    labels = _labels([graph.nodes[n] for n in part])
    places = _places(graph, part, labels, links)
    return Problem(
        len(part),
        tuple(edges),
        tuple(siblings),
        tuple(_ordered(graph, reach, part, set(edges))),
        tensors,
        labels,
        tuple(places[n][0] for n in part),
        tuple(places[n][1] for n in part),
        tuple(graph.nodes[n].free for n in part),
        launch,
    )


def _relabelled_inputs(graph: Graph) -> set[int]:
    """Free nodes on tensors that no kernel of ours writes, read by several: best left alone.

    Alone they cost nothing and their readers read the same bytes; inside a group that does not hold
    all of their readers they would be written a second time.
    """
    result: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if not node.free or node.opaque:
            continue
        producers = [graph.tensors[t].producer for t in graph.reads[index]]
        if all(p is None or graph.nodes[p].opaque or p in result for p in producers):
            result.add(index)
    return result


def _candidates(graph: Graph, single: set[int]) -> Links:
    """Pairs that one kernel might hold, judged by their sizes alone.

    Two readers of a tensor are linked only if it is as large as the space in which they read it: a
    bias that a forward and a backward pass both broadcast is no reason to run them together.
    """
    edges: set[tuple[int, int]] = set()
    siblings: set[tuple[int, int]] = set()
    for tensor in graph.tensors:
        readers = [c for c in tensor.consumers if c not in single]
        producer = tensor.producer
        if producer is not None and producer not in single and not graph.nodes[producer].ends:
            for reader in readers:
                if _may_join(graph.nodes[producer], graph.nodes[reader]) and not any(
                    shrinks(graph.jaxpr.eqns[p], tensor.var)
                    for p in graph.nodes[reader].eqns
                    if tensor.var in graph.jaxpr.eqns[p].invars
                ):
                    edges.add((producer, reader))
        whole = [r for r in readers if tensor.size >= max(graph.nodes[r].size, 2)]
        reach = len(whole) if len(whole) <= _ALL_PAIRS else 2
        for index, first in enumerate(whole):
            for second in whole[index + 1 : index + 1 + reach]:
                if _may_join(graph.nodes[first], graph.nodes[second]):
                    siblings.add((first, second))
    return Links(frozenset(edges), frozenset(siblings - edges - {(b, a) for a, b in edges}))


def _may_join(a: Node, b: Node) -> bool:
    """Whether some space has a place for both nodes."""
    if a.cols and b.cols:
        return (a.size, a.cols) == (b.size, b.cols)
    if a.cols:
        return b.size <= a.size
    return not b.cols or a.size <= b.size


@dataclasses.dataclass(frozen=True)
class _Possible:
    """Whether a pair may share a group: one part, one space, no path that leaves the part."""

    reach: Reach
    home: dict[int, int]
    outside: list[int]
    places: dict[int, int]

    def __call__(self, a: int, b: int) -> bool:
        part = self.home.get(a)
        if part is None or part != self.home.get(b) or not self.places[a] & self.places[b]:
            return False
        between = self.reach.between(a, b) | self.reach.between(b, a)
        return not between & self.outside[part]


def _traffic(graph: Graph, index: int, local: dict[int, int]) -> Traffic:
    """A component's view of a tensor; reading a scalar costs nothing."""
    tensor = graph.tensors[index]
    weight = tensor.size > 1
    inner = [
        (local[c], amount)
        for c, amount in zip(tensor.consumers, tensor.read_bytes, strict=True)
        if c in local
    ]
    inner.sort()
    return Traffic(
        tensor.nbytes,
        local.get(tensor.producer) if tensor.producer is not None else None,
        tuple(c for c, _ in inner),
        tuple(amount * weight for _, amount in inner),
        tensor.producer in local and (tensor.escapes or len(inner) < len(tensor.consumers)),
    )


def _labels(nodes: Sequence[Node]) -> tuple[Label, ...]:
    spaces = {(node.size, node.cols) for node in nodes} | {(node.size, 0) for node in nodes}
    return tuple(Label(size, cols) for size, cols in sorted(spaces))


def _places(
    graph: Graph, part: Sequence[int], labels: Sequence[Label], links: Links
) -> dict[int, tuple[int, int]]:
    """For each node, the labels that hold it as a full tile or as rows, and those that hold it as
    less.

    The latter need all its consumers in the group, so each of them must have a place under the
    label too.
    """
    places: dict[int, tuple[int, int]] = {}
    for node in reversed(part):
        this = graph.nodes[node]
        firm = smaller = 0
        for bit, label in enumerate(labels):
            if this.cols:
                firm |= ((label.size, label.cols) == (this.size, this.cols)) << bit
            elif this.size == label.size or (label.cols and this.size * label.cols == label.size):
                firm |= 1 << bit
            elif this.size < label.size:
                smaller |= 1 << bit
        for tensor in graph.writes[node]:
            if graph.tensors[tensor].escapes:
                smaller = 0
            for consumer in graph.tensors[tensor].consumers:
                known = (node, consumer) in links.edges and consumer in places
                smaller &= sum(places[consumer]) if known else 0
        places[node] = firm, smaller
    return places


def _all_places(graph: Graph, parts: Sequence[Sequence[int]], links: Links) -> dict[int, int]:
    """For each node, all labels of its part that have a place for it."""
    result: dict[int, int] = {}
    for part in parts:
        labels = _labels([graph.nodes[n] for n in part])
        for node, (firm, inner) in _places(graph, part, labels, links).items():
            result[node] = firm | inner
    return result


def _ordered(
    graph: Graph, reach: Reach, part: Sequence[int], edges: set[tuple[int, int]]
) -> Iterable[tuple[int, int]]:
    """Pairs that never share a group, without those that follow from others."""
    local = {node: index for index, node in enumerate(part)}
    inside = sum(1 << n for n in part)
    direct = {(local[a], local[b]) for a in part for b in graph.successors[a] if b in local}
    result = direct - edges
    following: list[list[int]] = [[] for _ in part]
    for a, b in sorted(direct):
        following[a].append(b)
    around: list[set[int]] = [set() for _ in part]
    leaving = [reach.below[node] & ~inside for node in part]
    for b, node in enumerate(part):
        entering = reach.above[node] & ~inside
        if entering:
            for a in range(b):
                if leaving[a] & entering:
                    around[a].add(b)
    for a in range(len(part)):
        for b in around[a]:
            implied = any(b in around[c] for c in following[a]) or any(
                b in following[c] and c in around[a] for c in around[a]
            )
            if not implied:
                result.add((a, b))
    return sorted(result)
