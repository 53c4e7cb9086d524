"""Joins nodes that no good partition separates, so that long pointwise chains cost the solver
nothing.

Two rules. For each, take an optimal partition that separates the two nodes; moving one of them over
gives a partition that is valid and no dearer, so an optimal partition exists that keeps them
together.

*Into the producer.* ``v`` reads one variable ``t`` and nothing else but scalars that are inputs of
the program (a learning rate; they cost nothing), is the only reader of ``t``,
visits as many elements as ``t`` has and writes no more bytes (a cast to a narrower type, ``exp``, a
transpose). Move ``v`` to the group of ``t``'s producer ``u``.
Acyclic: ``v`` depends on nothing but ``u``, so ``u``'s group gains no dependency; what read ``v``
already came after ``u``. Cost: ``t`` is neither written nor read any more, ``v``'s result, not
larger, is written in its stead and read by whoever read it. Template: ``v``'s element count is that
of ``t``, so it is a full tile or a row wherever ``t`` is; ``t`` left its group, so it is no less.

*Into the consumer.* All results of ``s`` are read by the single node ``w``, ``s`` reads at most one
variable that is not a scalar, and its operands together have no more bytes than its results (a cast
to a wider type, a broadcast, ``iota``). Move ``s`` to ``w``'s group.
Acyclic: what ``s`` depends on, ``w``'s group depended on already. Cost: the results of ``s`` are
neither written nor read any more; its operands, not larger in sum, are written and read in their
stead at worst. Template: ``s`` is computed in the space in which ``w`` consumed it. Of the group
that ``s`` left, nodes smaller than its space whose only consumer was ``s`` go along.

A matrix product may be left to cuBLAS, alone. So nothing behind it joins it, and before it only
what a kernel of ours reads in the product's stead at no cost: views, and casts to wider types.

The proofs count traffic. Where arithmetic is what takes the time of one of the two groups, and not
of the other, the moved node's arithmetic, or the traffic that it saves, is lost at most.

What the proofs cannot see is a pair of views that does not compose into one index map. Therefore a
joined node is kept only if ``build`` accepts it; otherwise its equations stay apart.
"""

from __future__ import annotations

from collections.abc import Callable

from jax.extend.core import Var

from jevt.partition import graph as graphs
from jevt.partition.graph import Graph, Node, Tensor
from jevt.partition.order import executable, quotient


def contract(graph: Graph, accepts: Callable[[tuple[int, ...]], bool]) -> Graph:
    """The graph with pairs joined by both rules, as long as they find any.

    Args:
      graph: one node for each equation.
      accepts: whether the equations at these positions can be one kernel.
    """
    while (fewer := _once(graph, accepts)) is not graph:
        graph = fewer
    return graph


def _once(graph: Graph, accepts: Callable[[tuple[int, ...]], bool]) -> Graph:
    """The graph with pairs joined by both rules; the same object if there are none."""
    joined = _Joined(graph)
    for node in range(len(graph.nodes)):
        _into_producer(joined, node)
    for node in reversed(range(len(graph.nodes))):
        _into_consumer(joined, node)
    members: dict[int, list[int]] = {}
    for node in range(len(graph.nodes)):
        members.setdefault(joined.find(node), []).append(node)
    nodes: list[Node] = []
    for group in members.values():
        parts = [graph.nodes[n] for n in group]
        if len(parts) > 1 and accepts(tuple(p for part in parts for p in part.eqns)):
            nodes.append(merge(graph, parts))
        else:
            nodes.extend(parts)
    return ordered(graph, nodes) if len(nodes) < len(graph.nodes) else graph


class _Joined:
    """Union–find over the nodes of a graph, with what the rules ask about a joined node."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.parent = list(range(len(graph.nodes)))
        self.members = [[n] for n in range(len(graph.nodes))]
        self.reduces = [node.kind == "reduction" for node in graph.nodes]
        self.multiplies = [node.kind == "contraction" for node in graph.nodes]
        self.late = {t.var for t in graph.tensors if t.late}

    def find(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if len(self.members[a]) < len(self.members[b]):
            a, b = b, a
        self.parent[b] = a
        self.members[a].extend(self.members[b])
        self.members[b] = []
        self.reduces[a] = self.reduces[a] or self.reduces[b]
        self.multiplies[a] = self.multiplies[a] or self.multiplies[b]


def _into_producer(joined: _Joined, v: int) -> None:
    graph = joined.graph
    node = graph.nodes[v]
    reads = [t for t in map(graph.tensors.__getitem__, graph.reads[v]) if not _given_scalar(t)]
    if node.kind not in ("pointwise", "view") or len(reads) != 1 or len(graph.writes[v]) != 1:
        return
    (operand,), result = reads, graph.tensors[graph.writes[v][0]]
    u = operand.producer
    if u is None or graph.nodes[u].kind in ("opaque", "contraction"):
        return
    if operand.consumers != (v,) or operand.escapes:
        return
    if result.size != operand.size or node.size != operand.size or result.nbytes > operand.nbytes:
        return
    if result.size == 1 and (len(result.consumers) > 1 or joined.reduces[joined.find(u)]):
        # Readers of one scalar are not counted as connected; and a matrix product's kernel can hold
        # a sum of all its result, but nothing that reads that sum.
        return
    if operand.var in joined.late:
        if not node.free and not _rounds(graph, node):
            return
        joined.late.add(result.var)
    joined.join(u, v)


def _rounds(graph: Graph, node: Node) -> bool:
    """Whether a node gives a sum another type, which the kernel that completes the sum can do."""
    return [graph.jaxpr.eqns[p].primitive.name for p in node.eqns] == ["convert_element_type"]


def _given_scalar(tensor: Tensor) -> bool:
    return tensor.producer is None and tensor.size <= 1


def _into_consumer(joined: _Joined, s: int) -> None:
    graph = joined.graph
    root = joined.find(s)
    if max(joined.members[root]) != s or graph.nodes[s].opaque:
        return
    if joined.reduces[root] or joined.multiplies[root]:
        return
    results = [t for n in joined.members[root] for t in graph.writes[n]]
    outside = {joined.find(c) for t in results for c in graph.tensors[t].consumers} - {root}
    if len(outside) != 1 or any(graph.tensors[t].escapes for t in results):
        return
    (w,) = outside
    if graph.nodes[w].opaque or (joined.multiplies[w] and not _seen(graph, joined.members[root])):
        return
    leaving = [
        graph.tensors[t]
        for t in results
        if any(joined.find(c) != root for c in graph.tensors[t].consumers)
    ]
    if any(_sees_a_part(graph, c, t.var) for t in leaving for c in t.consumers):
        return
    operands = {
        t
        for n in joined.members[root]
        for t in graph.reads[n]
        if (p := graph.tensors[t].producer) is None or joined.find(p) != root
    }
    if sum(graph.tensors[t].size > 1 for t in operands) > 1:
        return
    if sum(graph.tensors[t].nbytes for t in operands) <= sum(t.nbytes for t in leaving):
        joined.join(root, w)


def _seen(graph: Graph, nodes: list[int]) -> bool:
    """Whether an operand of a matrix product can be read through these nodes."""
    return all(
        graph.nodes[n].kind == "view"
        or all(
            graph.jaxpr.eqns[p].primitive.name == "convert_element_type"
            for p in graph.nodes[n].eqns
        )
        for n in nodes
    )


def _sees_a_part(graph: Graph, node: int, var: Var) -> bool:
    eqns = (graph.jaxpr.eqns[p] for p in graph.nodes[node].eqns)
    return any(graphs.shrinks(eqn, var) for eqn in eqns if var in eqn.invars)


def merge(graph: Graph, parts: list[Node]) -> Node:
    """One node in place of several."""
    ends = {p for part in parts for p in part.ends}
    late = {v for p in ends for v in graph.jaxpr.eqns[p].outvars}
    for position in sorted(p for part in parts for p in part.eqns):
        eqn = graph.jaxpr.eqns[position]
        if late.intersection(v for v in eqn.invars if isinstance(v, Var)):
            ends.add(position)
            late.update(eqn.outvars)
    spaces = [p for p in parts if p.kind in ("reduction", "contraction")]
    kinds = {p.kind for p in parts}
    size = max(p.size for p in parts)
    return Node(
        tuple(sorted(position for part in parts for position in part.eqns)),
        spaces[0].kind if spaces else "pointwise" if "pointwise" in kinds else "view",
        spaces[0].size if spaces else size,
        spaces[0].cols if spaces else 0,
        ends=tuple(sorted(ends)),
        assumed=any(p.assumed for p in parts),
        unproven=tuple(leaf for p in parts for leaf in p.unproven),
        free=all(p.free for p in parts),
    )


def ordered(graph: Graph, nodes: list[Node]) -> Graph:
    """The contracted graph with its nodes in an executable order, stable by position."""
    nodes = sorted(nodes, key=lambda n: n.eqns)
    owner = {position: index for index, node in enumerate(nodes) for position in node.eqns}
    groups: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(graph.nodes):
        groups[owner[node.eqns[0]]].append(index)
    order = executable([n.eqns[0] for n in nodes], quotient(groups, graph.successors))
    assert order is not None, "contraction keeps the graph acyclic"
    return graphs.assemble(graph.jaxpr, [nodes[n] for n in order])
