"""Drops links of values that are best made where they are read.

A node ``c`` makes one tensor that is only read in the component, as large as its space, from fewer
bytes: those of its operands that memory holds anyway count once, the others twice, because they
would have to be written; together they are no more than the result, or exceed it by no more than
the thousandth part of a launch. Then, but for that much, an optimal partition has
``c`` with one of its readers, or alone. Take one that has it in a group ``A`` without any, and move
it to the first group ``B`` that reads it.
Acyclic: what ``c`` depends on came before ``A``, which came before ``B``; the other readers' groups
came after ``A`` and now come after ``B``, which is the first of them. Cost: ``B`` no longer reads
the result but the operands, and writes the result, if others read it, in place of ``A``. Template:
the result is a full tile for its reader. ``A`` stays connected: all that linked it through ``c``
reads, or makes, the largest operand; what makes another one must do so too.

That counts traffic. Where arithmetic is what takes the time of ``B``, and not of ``A``, the moved
equations' arithmetic is lost at most.

So a link between ``c`` and a node that can be in no group with any reader of ``c`` is of no use.
What the backward pass computes again (:mod:`.recompute`) is of this kind: without those links to
the forward pass, from which it reads, each layer's two passes fall apart.
"""

from __future__ import annotations

from collections.abc import Callable

from jevt.partition.graph import Graph, Tensor
from jevt.partition.reach import Links


def near_readers(
    graph: Graph, links: Links, possible: Callable[[int, int], bool], launch: int
) -> Links:
    """The links without those that no optimal partition needs.

    Args:
      graph: nodes and tensors.
      links: pairs that may share a group.
      possible: whether any two nodes may share a group.
      launch: bytes that a launch is worth.
    """
    slack = launch // 1000
    readers = {
        node: found
        for node in range(len(graph.nodes))
        if (found := _readers(graph, links, node, slack))
    }

    def useful(node: int, other: int) -> bool:
        found = readers.get(node)
        return not found or other in found or any(possible(other, r) for r in found)

    return links.where(lambda a, b: useful(a, b) and useful(b, a))


def _readers(graph: Graph, links: Links, node: int, slack: int) -> tuple[int, ...]:
    """Who reads a node's result, if it is best made with one of them; else nobody."""
    this = graph.nodes[node]
    if this.kind not in ("pointwise", "view") or len(graph.writes[node]) != 1:
        return ()
    result = graph.tensors[graph.writes[node][0]]
    if result.escapes or result.late or result.size != this.size:
        return ()
    if any((node, reader) not in links.edges for reader in result.consumers):
        return ()
    operands = [t for t in map(graph.tensors.__getitem__, graph.reads[node]) if t.size > 1]
    paid = sum(t.nbytes * (1 if _in_memory(links, t) else 2) for t in operands)
    if paid > result.nbytes + slack or not _linked_by_one(graph, operands):
        return ()
    return result.consumers


def _in_memory(links: Links, tensor: Tensor) -> bool:
    """Whether memory holds a tensor whatever the partition."""
    maker = tensor.producer
    return (
        maker is None
        or tensor.escapes
        or any((maker, c) not in links.edges for c in tensor.consumers)
    )


def _linked_by_one(graph: Graph, operands: list[Tensor]) -> bool:
    """Whether what makes the smaller operands makes, or reads, the largest one too."""
    if not operands:
        return True
    largest = max(operands, key=lambda t: t.size)
    around = {largest.producer, *largest.consumers, None}
    return all(t.producer in around and t.size < largest.size for t in operands if t is not largest)
