"""Nodes that several groups may compute, each for itself, and the program with these copies.

EVT's partitions are disjoint, so a value that two groups need is written by one and read by the
other. Where the value is cheap to make from what the other group reads anyway (the gradient behind
a relu, in front of the sums of a batch norm and after them), making it again moves fewer bytes.
Which groups do so is decided by the integer program (:mod:`.ilp`), where such a node may be in
several groups, each of which has its arithmetic to do. What is decided elsewhere: copies that cost
nothing are made before (:mod:`.duplicate`, which loses nothing), and what the backward pass
computes again of a forward pass beyond a matrix product, which is in another component
(:mod:`.recompute`, a minimum cut over values and not over groups).

    before  c = mul a b; d = reduce_sum c; e = add c d       groups {mul, reduce_sum}, {mul, add}
    after   c = mul a b; d = reduce_sum c; c' = mul a b; e = add c' d
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from jax.extend.core import JaxprEqn, Var

from jevt.partition import graph as graphs
from jevt.partition.graph import Graph, Node
from jevt.partition.problem import Grouping, Traffic

#: Kinds of nodes that may be computed by several groups: a reduction or a product never.
_KINDS = frozenset({"pointwise", "view", "source"})

#: Nodes of the largest component in which copies are a decision. The 131 nodes of a small training
#: step, 61 of them copied, have 165 thousand clauses, which take longer to write down than the
#: program without copies takes to solve; components of a ResNet have 57 nodes at most.
_LARGEST = 80


def candidates(graph: Graph) -> frozenset[int]:
    """The nodes that may be computed again."""
    return frozenset(
        index
        for index, node in enumerate(graph.nodes)
        if node.kind in _KINDS and node.size > 1 and not (node.ends or node.loose or node.assumed)
        if not node.free and any(graph.tensors[t].consumers for t in graph.writes[index])
    )


def useful(
    part: Sequence[int],
    again: Collection[int],
    tensors: Sequence[Traffic],
    edges: Sequence[tuple[int, int]],
) -> tuple[int, ...]:
    """Of a component's nodes those of which more than one copy can serve.

    One reader inside is enough if the value is needed outside too, or if the reader may be copied
    itself. Local nodes, but for ``again``. None in a component that is too large.
    """
    if len(part) > _LARGEST:
        return ()
    linked = set(edges)
    readers: list[set[int]] = [set() for _ in part]
    outside: set[int] = set()
    for tensor in tensors:
        if tensor.producer is not None:
            readers[tensor.producer].update(tensor.consumers)
            if tensor.leaves:
                outside.add(tensor.producer)
    found: set[int] = set()
    for local in reversed(range(len(part))):
        near = [c for c in readers[local] if (local, c) in linked]
        several = len(readers[local]) + (local in outside) > 1
        if part[local] in again and near and (several or any(c in found for c in near)):
            found.add(local)
    return tuple(sorted(found))


def materialise(graph: Graph, groups: Grouping) -> tuple[Graph, Grouping, list[int]]:
    """The graph with an equation for every copy, and the same groups, disjoint now.

    The first of the groups that hold a node keeps the original, which all groups without it read.

    Args:
      graph: nodes that may be in several groups.
      groups: those of one component in the order in which they run.

    Returns:
      The graph; the groups; for each of its equations the position of what it copies, or is.
    """
    holders: list[list[int]] = [[] for _ in graph.nodes]
    for index, group in enumerate(groups):
        for member in group:
            holders[member].append(index)
    if all(len(held) <= 1 for held in holders):
        return graph, groups, list(range(len(graph.jaxpr.eqns)))
    owner = {p: n for n, node in enumerate(graph.nodes) for p in node.eqns}
    fresh: dict[tuple[int, Var], Var] = {}
    eqns: list[JaxprEqn] = []
    origin: list[int] = []
    positions: dict[tuple[int, int], dict[int, int]] = {}  # (node, group): old to new ones

    for position, eqn in enumerate(graph.jaxpr.eqns):
        here = owner[position]
        for holder in holders[here]:
            if holder != holders[here][0]:
                fresh.update(((holder, v), Var(v.aval)) for v in eqn.outvars)
            positions.setdefault((here, holder), {})[position] = len(eqns)
            invars = [fresh.get((holder, v), v) if isinstance(v, Var) else v for v in eqn.invars]
            outvars = [fresh.get((holder, v), v) for v in eqn.outvars]
            eqns.append(eqn.replace(invars=invars, outvars=outvars))
            origin.append(position)
    nodes: list[Node] = []
    disjoint: Grouping = [[] for _ in groups]
    for index, node in enumerate(graph.nodes):
        for holder in holders[index]:
            disjoint[holder].append(len(nodes))
            nodes.append(moved(node, positions[index, holder]))
    return graphs.assemble(graph.jaxpr.replace(eqns=eqns), nodes), disjoint, origin


def moved(node: Node, positions: Mapping[int, int]) -> Node:
    """The node with its equations at other positions."""
    return dataclasses.replace(
        node,
        eqns=tuple(sorted(positions[p] for p in node.eqns)),
        ends=tuple(sorted(positions[p] for p in node.ends)),
    )
