"""What rewrites the nodes of a kernel: a walk over them, and what it asks about them."""

from __future__ import annotations

from collections.abc import Sequence

from jevt_kernels import visitor


def is_op(node: visitor.Node, op: str) -> bool:
    """Whether a node computes that operation."""
    return isinstance(node, visitor.Compute) and node.op == op


def unsigned(nodes: Sequence[visitor.Node], position: int) -> tuple[int, bool]:
    """x and whether it is negated, of x and -x."""
    negated = False
    while is_op(nodes[position], "neg"):
        (position,) = visitor.operands(nodes[position])
        negated = not negated
    return position, negated


class Rewriter:
    """Nodes in an order in which each follows its operands, and what becomes of them.

    Attributes:
      nodes: as they were.
      result: new ones.
      renamed: for each of the old ones that has been gone through, where its value is now.
    """

    def __init__(self, nodes: Sequence[visitor.Node]) -> None:
        self.nodes = nodes
        self.result: list[visitor.Node] = []
        self.renamed: dict[int, int] = {}

    def rewritten(self) -> Sequence[visitor.Node]:
        """The new nodes, in such an order; the old ones themselves if nothing changed."""
        changed = False
        for position, node in enumerate(self.nodes):
            new = self.replaced(position, node) if isinstance(node, visitor.Compute) else None
            changed = changed or new is not None
            self.renamed[position] = (
                self.add(visitor.reading(node, self.renamed)) if new is None else new
            )
        return self.result if changed else self.nodes

    def replaced(self, position: int, node: visitor.Compute) -> int | None:
        """The position of a new node for a node; None where it stays as it is."""
        raise NotImplementedError

    def add(self, node: visitor.Node) -> int:
        self.result.append(node)
        return len(self.result) - 1
