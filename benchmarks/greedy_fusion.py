"""Greedy fusion as other compilers do it, to compare jevt's partition with.

Both work on the plan's own equations and are priced by the same cost model, so that nothing but the
choice of groups differs. They know what their compilers' code generators can hold, not the details.

``xla``: an instruction is fused into what reads it, last to first, if that leaves one result; a
reduction ends a fusion. Then fusions that share an operand, or of which one reads the other, become
one with several results.

``inductor``: in up to ten rounds, pairs of groups of one iteration space are fused, those with the
most shared bytes first, whether one reads the other or both read the same; what follows a reduction
along the same rows may join it. At most 64 equations a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jevt.partition import greedy
from jevt.partition.graph import Graph
from jevt.partition.problem import Grouping, Label, Launches, Problem, Traffic, Work

_ROUNDS, _LARGEST = 10, 64
#: Of a tensor that more groups touch, such as a learning rate, no pairs are made.
_TOUCHING = 24


def xla(graph: Graph) -> Grouping:
    """Producer–consumer fusion in XLA's manner; groups of the graph's fusible nodes."""
    problem = _problem(graph, rows_hold_more=False)
    needs = _needs(graph)
    reductions = {n for n, node in enumerate(graph.nodes) if node.kind == "reduction"}

    def ends_in_reductions(group: Sequence[int]) -> bool:
        members = set(group)
        return not any(members & needs.get(r, set()) for r in reductions & members)

    def one_result(group: Sequence[int]) -> bool:
        members = set(group)
        leaving = sum(_leaves(graph, node, members) for node in group)
        return leaving <= 1 and ends_in_reductions(group)

    groups: Grouping = [[n] for n in range(len(graph.nodes))]
    into_readers = sorted(problem.edges, key=lambda edge: (-edge[0], edge[1]))
    groups = greedy.merge_along(problem, groups, into_readers, one_result)
    together = sorted({*problem.siblings, *problem.edges})
    return _fusible(graph, greedy.merge_along(problem, groups, together, ends_in_reductions))


def inductor(graph: Graph) -> Grouping:
    """Fusion by shared bytes in Inductor's manner; groups of the graph's fusible nodes."""
    problem = _problem(graph, rows_hold_more=True)
    eqns = [len(node.eqns) for node in graph.nodes]

    def small(group: Sequence[int]) -> bool:
        return sum(eqns[n] for n in group) <= _LARGEST

    groups: Grouping = [[n] for n in range(len(graph.nodes))]
    for _ in range(_ROUNDS):
        again = greedy.merge_along(problem, groups, _by_shared_bytes(graph, groups), small)
        if len(again) == len(groups):
            break
        groups = again
    return _fusible(graph, groups)


GREEDY: Mapping[str, Callable[[Graph], Grouping]] = {"xla": xla, "inductor": inductor}


def _problem(graph: Graph, *, rows_hold_more: bool) -> Problem:
    """All nodes, with what a fusion may hold as labels: one iteration space, reductions one way.

    ``rows_hold_more``: values of rows have a place beside the reductions that make them.
    """
    nodes = graph.nodes
    spaces = {(n.size, n.cols, bool(n.ends)) for n in nodes if n.kind == "reduction"}
    labels = [Label(*space) for space in sorted(spaces)]
    labels += [Label(size, 0) for size in sorted({n.size for n in nodes if n.size})]
    firm, inner = [], []
    for node in nodes:
        full = part = 0
        for bit, label in enumerate(labels if node.kind in _FUSED else ()):
            kept = label.cols if label.late else label.size // max(1, label.cols)
            if node.kind == "reduction":
                full |= ((node.size, node.cols, bool(node.ends)) == _space(label)) << bit
            elif node.size == label.size or (rows_hold_more and label.cols and node.size == kept):
                full |= 1 << bit
            elif node.size < label.size:
                part |= 1 << bit
        firm.append(full)
        inner.append(part)
    tensors = tuple(
        Traffic(t.nbytes, t.producer, t.consumers, t.read_bytes, t.escapes) for t in graph.tensors
    )
    pairs: set[tuple[int, int]] = set()
    siblings: set[tuple[int, int]] = set()
    for tensor in graph.tensors:
        readers = [c for c in tensor.consumers if nodes[c].kind in _FUSED]
        if tensor.producer is not None and nodes[tensor.producer].kind in _FUSED:
            pairs.update((tensor.producer, c) for c in readers)
        if tensor.size > 1 and len(readers) <= _TOUCHING:
            siblings.update((a, b) for i, a in enumerate(readers) for b in readers[i + 1 :])
    ordered = {(a, b) for a, following in enumerate(graph.successors) for b in following} - pairs
    return Problem(
        len(nodes),
        tuple(sorted(pairs)),
        tuple(sorted(siblings - pairs)),
        tuple(sorted(ordered)),
        tensors,
        tuple(labels),
        tuple(firm),
        tuple(inner),
        tuple(n.free for n in nodes),
        Launches(0),
        (Work(),) * len(nodes),
    )


_FUSED = ("pointwise", "view", "source", "reduction")


def _space(label: Label) -> tuple[int, int, bool]:
    return label.size, label.cols, label.late


def _needs(graph: Graph) -> dict[int, set[int]]:
    """For each node, the nodes that read its results."""
    result: dict[int, set[int]] = {}
    for tensor in graph.tensors:
        if tensor.producer is not None:
            result.setdefault(tensor.producer, set()).update(tensor.consumers)
    return result


def _leaves(graph: Graph, node: int, members: set[int]) -> bool:
    """Whether anything outside the group needs a result of the node."""
    written = (graph.tensors[t] for t in graph.writes[node])
    return any(t.escapes or not members.issuperset(t.consumers) for t in written)


def _by_shared_bytes(graph: Graph, groups: Grouping) -> list[tuple[int, int]]:
    """Pairs of groups, by a node of each, the one with the most bytes in common first."""
    owner = {node: index for index, group in enumerate(groups) for node in group}
    shared: dict[tuple[int, int], int] = {}
    for tensor in graph.tensors:
        touching = {owner[n] for n in tensor.consumers}
        if tensor.producer is not None:
            touching.add(owner[tensor.producer])
        if 1 < len(touching) <= _TOUCHING and tensor.size > 1:
            ranked = sorted(touching)
            for i, a in enumerate(ranked):
                for b in ranked[i + 1 :]:
                    shared[a, b] = shared.get((a, b), 0) + tensor.nbytes
    best = sorted(shared, key=lambda pair: (-shared[pair], pair))
    return [(groups[a][0], groups[b][0]) for a, b in best]


def _fusible(graph: Graph, groups: Grouping) -> Grouping:
    return [group for group in groups if not graph.nodes[group[0]].opaque]
