"""Splits the graph into components that no useful group crosses.

EVT's first step: "V is divided into disjoint components {C1 … Cm}" (ASPLOS 2024, section 5). Here
the split loses nothing. Two nodes can share a group only if a kernel could hold both and no path
between them leaves the component: what lies on such a path would have to run before the group ends
and after it begins. So edges that a path through an opaque node shadows are struck out, the rest
falls apart into components, paths through *other* components strike out more, and so on until
nothing changes. In a transformer every residual connection is struck out by the matrix
multiplications beside it, so the components are what lies between two of them, however many layers
there are.

A matrix product belongs to what reads its result, its epilogue. It is no link to what makes its
operands, and a path into it is struck out like one through an opaque node. This loses the groups
that would compute an operand inside the mainloop (a prologue), beyond the views and casts that
:mod:`.contract` has joined to the product: for each operand at most the time of writing and reading
it once, and nothing where it is needed elsewhere too, as by the other products of a backward pass.
(Paths say what can share a group whatever groups cost, so this holds for any objective.)
Nor is one number that many read, such as a global norm, a link to its maker: it would hold the
updates of all parameters together. This loses a launch for each such number at most. And a number
that is made of many sums is no link to these (:mod:`.totals`).
Copies of nodes (:mod:`.copies`) are tried inside a component only.

EVT's second step: the border is rebuilt. For two nodes of a component with a path outside it, the
problem gets the pair in ``ordered``, because any partition must respect that path. Two components'
groups can still form a cycle together (each alone is fine); the driver looks for that and solves
those two as one.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from jax.extend.core import Var

from jevt.lowering.spec import MAX_OPERANDS
from jevt.partition import problem as problems
from jevt.partition import totals
from jevt.partition.copies import useful
from jevt.partition.graph import Graph, Node, shrinks
from jevt.partition.near import near_readers
from jevt.partition.prices import Prices
from jevt.partition.problem import Problem, Traffic
from jevt.partition.reach import Links, Reach
from jevt.partition.spaces import labels_of, places

#: Readers of one tensor beyond this number are paired with their nearest neighbours only.
_ALL_PAIRS = 8

#: Readers of one number beyond which its maker shares a group with none of them.
_MANY = 6


def split(graph: Graph, reach: Reach, launch: int) -> tuple[list[list[int]], Links]:
    """The components (of one node and more, opaque nodes left out) and the links inside them.

    ``launch`` is what a launch is worth in bytes.
    """
    single = {n for n, node in enumerate(graph.nodes) if node.opaque} | _relabelled_inputs(graph)
    links = _candidates(graph, single)
    fusible = [n for n, node in enumerate(graph.nodes) if not node.opaque]
    parts = [fusible]
    while True:
        home = {n: index for index, part in enumerate(parts) for n in part}
        separated: dict[int, int] = {}
        place: dict[int, int] = {}
        for part in parts:
            inner = reach.separated(graph, [n for n in part if n not in single])
            separated |= dict.fromkeys(part, 0) | inner
            found = places(graph, part, links, separated)
            place |= {node: firm | small for node, (firm, small) in found.items()}
        possible = _Possible(home, separated, place)
        kept = near_readers(graph, links.where(possible), possible, launch)
        again = problems.components(fusible, kept.adjacent)
        if len(again) == len(parts) and kept == links:
            return again, kept
        parts, links = again, kept


def pose(
    graph: Graph,
    reach: Reach,
    part: Sequence[int],
    links: Links,
    prices: Prices,
) -> Problem:
    """The problem of one component; local node ``i`` is ``part[i]``, in an executable order."""
    local = {node: index for index, node in enumerate(part)}
    edges, siblings = (_pairs(found, local) for found in links.by_first)
    tensors = tuple(traffic for traffic, _ in moved(graph, part))
    unit = prices.unit(part, tensors)
    works, products = prices.within(part, unit)
    found = places(graph, part, links, reach.separated(graph, part))
    problem = Problem(
        len(part),
        edges,
        siblings,
        tuple(_ordered(graph, reach, part, set(edges))),
        prices.moving(tensors, unit),
        labels_of(graph, part),
        tuple(found[n][0] for n in part),
        tuple(found[n][1] for n in part),
        tuple(graph.nodes[n].free for n in part),
        prices.launches(unit),
        works,
        frozenset(local[n] for n in part if graph.nodes[n].assumed),
        _pairs(prices.chained, local),
        products,
        useful(part, prices.copies, tensors, edges),
        MAX_OPERANDS,
        unit=unit,
    )
    return problem.priced(prices.shared(problem, part, unit))


def moved(graph: Graph, part: Sequence[int]) -> list[tuple[Traffic, Var]]:
    """What a component reads and writes, in the order of ``Problem.tensors``.

    That order depends on nothing but the order of ``part``.
    """
    local = {node: index for index, node in enumerate(part)}
    used = sorted({t for n in part for t in (*graph.reads[n], *graph.writes[n])})
    result = [(_traffic(graph, t, local), graph.tensors[t].var) for t in used]
    # Equal ones are as good as one another.
    return sorted(result, key=lambda pair: dataclasses.astuple(_sortable(pair[0])))


def _pairs(
    found: Mapping[int, Iterable[int]], local: Mapping[int, int]
) -> tuple[tuple[int, int], ...]:
    """The pairs inside a component, of all those by their first nodes."""
    pairs = ((local[a], local[b]) for a in local for b in found.get(a, ()) if b in local)
    return tuple(sorted((min(pair), max(pair)) for pair in pairs))


def _sortable(traffic: Traffic) -> Traffic:
    return dataclasses.replace(
        traffic, producer=-1 if traffic.producer is None else traffic.producer
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
    ends = single.union(n for n, node in enumerate(graph.nodes) if node.kind == "contraction")
    collectors = totals.find(graph).collectors
    for tensor in graph.tensors:
        readers = [c for c in tensor.consumers if c not in ends]
        producer = tensor.producer
        common = tensor.size <= 1 and len(readers) > _MANY
        if not (producer is None or producer in single or tensor.late or common):
            for reader in readers:
                if reader in collectors and producer not in collectors:
                    continue
                if _may_join(graph.nodes[producer], graph.nodes[reader]) and not any(
                    shrinks(graph.jaxpr.eqns[p], tensor.var)
                    for p in graph.nodes[reader].eqns
                    if tensor.var in graph.jaxpr.eqns[p].invars
                ):
                    edges.add((producer, reader))
        sized = [r for r in readers if tensor.size >= max(graph.nodes[r].size, 2)]
        whole = [r for r in sized if not graph.nodes[r].loose]
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

    home: dict[int, int]
    separated: dict[int, int]
    places: dict[int, int]

    def __call__(self, a: int, b: int) -> bool:
        part = self.home.get(a)
        if part is None or part != self.home.get(b) or not self.places[a] & self.places[b]:
            return False
        return not self.separated[a] >> b & 1


def _traffic(graph: Graph, index: int, local: dict[int, int]) -> Traffic:
    """A component's view of a tensor; reading a scalar costs nothing."""
    tensor = graph.tensors[index]
    weight = tensor.size > 1
    inner: list[tuple[int, int]] = []
    for c in local if len(local) < len(tensor.consumers) else tensor.consumers:
        at = bisect.bisect_left(tensor.consumers, c)
        if c in local and at < len(tensor.consumers) and tensor.consumers[at] == c:
            inner.append((local[c], tensor.read_bytes[at]))
    inner.sort()
    return Traffic(
        tensor.nbytes,
        local.get(tensor.producer) if tensor.producer is not None else None,
        tuple(c for c, _ in inner),
        tuple(amount * weight for _, amount in inner),
        tensor.producer in local and (tensor.escapes or len(inner) < len(tensor.consumers)),
        tensor.late,
    )


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
