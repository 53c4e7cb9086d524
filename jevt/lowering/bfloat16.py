"""Arithmetic that values of bfloat16 allow to spare.

A kernel computes what is of bfloat16 in float32. Its results are rounded to 8 bits of mantissa in
the end, so that the order in which factors are multiplied makes no difference, and an erfc need not
be of float32's accuracy. A gelu and its gradient in the epilogue of a product take a third fewer
instructions:

* constant factors of a product are multiplied here, and at once: c·(d·x·y) = (c·d)·x·y;
* erfc(c·x) and exp(-(c·x)²) are one operation, in which c costs nothing, and share what they have
  in common; so is a constant times an erfc.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.ops import BFLOAT16

#: Constants that are moved: no others, so that nothing overflows on the way that did not before.
_LEAST, _MOST = 2.0**-8, 2.0**8


def shorten(nodes: Sequence[visitor.Node]) -> list[visitor.Node]:
    """The nodes with the arithmetic of bfloat16 in as few operations as are known.

    Args:
      nodes: in an order in which each follows its operands, stores included.

    Returns:
      Nodes in such an order, among them some that nothing reads any more.
    """
    return _Rewriter(nodes).rewritten()


@dataclasses.dataclass(frozen=True)
class _Product:
    """A constant times the values of nodes."""

    constant: float
    constants: int
    factors: tuple[int, ...]


class _Rewriter:
    def __init__(self, nodes: Sequence[visitor.Node]) -> None:
        self.nodes = nodes
        self.result: list[visitor.Node] = []
        self.renamed: dict[int, int] = {}
        reads = [operand for node in nodes for operand in visitor.operands(node)]
        self.readers = collections.Counter(reads)

    def rewritten(self) -> list[visitor.Node]:
        for position, node in enumerate(self.nodes):
            new = None
            if isinstance(node, visitor.Compute) and node.dtype == BFLOAT16:
                new = self._shorter(position, node.op)
            if new is None:
                new = self._add(visitor.reading(node, self.renamed))
            self.renamed[position] = new
        return self.result

    def _shorter(self, position: int, op: str) -> int | None:
        """The position of a new node for a node of bfloat16; None where it stays as it is."""
        if op == "erfc":
            x, scale = self._scaled(self._operand(position))
            return self._call("scaled_erfc", x, scale, 1.0)
        if op == "exp":
            return self._gaussian(self._operand(position))
        if op == "mul":
            return self._multiplied(position)
        return None

    def _gaussian(self, exponent: int) -> int | None:
        if not self._is(exponent, "neg") or not self._is(self._operand(exponent), "square"):
            return None
        return self._call("gaussian", *self._scaled(self._operand(self._operand(exponent))))

    def _multiplied(self, position: int) -> int | None:
        product = self._product(position)
        if not product.constants or not product.factors:
            return None
        constant, factors = product.constant, list(product.factors)
        complementary = next((f for f in factors if self._is(f, "erfc") and self._once(f)), None)
        if complementary is None and product.constants < 2:
            return None
        values = [self.renamed[f] for f in factors if f != complementary]
        if complementary is not None:
            x, scale = self._scaled(self._operand(complementary))
            values.append(self._call("scaled_erfc", x, scale, constant))
        elif constant != 1.0:
            values.insert(0, self._constant(constant))
        total, *others = values
        for value in others:
            total = self._add(visitor.Compute("mul", (total, value), BFLOAT16))
        return total

    def _product(self, position: int) -> _Product:
        """What a multiplication multiplies, with those in it whose results nothing else reads."""
        constant, constants = 1.0, 0
        factors: list[int] = []
        for operand in visitor.operands(self.nodes[position]):
            while self._is(operand, "neg") and self._once(operand):
                constant, constants = -constant, constants + 1
                operand = self._operand(operand)
            number = self._number(operand)
            if number is not None:
                constant, constants = constant * number, constants + 1
            elif self._is(operand, "mul") and self._once(operand):
                inner = self._product(operand)
                constant, constants = constant * inner.constant, constants + inner.constants
                factors += inner.factors
            else:
                factors.append(operand)
        return _Product(constant, constants, tuple(factors))

    def _scaled(self, position: int) -> tuple[int, float]:
        """x and c where the node's value is c·x."""
        scale = 1.0
        while True:
            if self._is(position, "neg"):
                position, scale = self._operand(position), -scale
                continue
            if not self._is(position, "mul"):
                return position, scale
            operands = visitor.operands(self.nodes[position])
            numbers = [self._number(operand) for operand in operands]
            if numbers[0] is not None:
                position, scale = operands[1], scale * numbers[0]
            elif numbers[1] is not None:
                position, scale = operands[0], scale * numbers[1]
            else:
                return position, scale

    def _number(self, position: int) -> float | None:
        """The value of a constant that may be moved."""
        node = self.nodes[position]
        if not isinstance(node, visitor.Constant) or node.dtype != BFLOAT16:
            return None
        value = float(node.value)
        return value if math.isfinite(value) and _LEAST <= abs(value) <= _MOST else None

    def _is(self, position: int, op: str) -> bool:
        node = self.nodes[position]
        return isinstance(node, visitor.Compute) and (node.op, node.dtype) == (op, BFLOAT16)

    def _once(self, position: int) -> bool:
        return self.readers[position] == 1

    def _operand(self, position: int) -> int:
        """The only operand of a node."""
        (operand,) = visitor.operands(self.nodes[position])
        return operand

    def _call(self, op: str, x: int, *numbers: float) -> int:
        constants = [self._constant(number) for number in numbers]
        return self._add(visitor.Compute(op, (self.renamed[x], *constants), BFLOAT16))

    def _constant(self, value: float) -> int:
        return self._add(visitor.Constant(value, np.dtype("float32")))

    def _add(self, node: visitor.Node) -> int:
        self.result.append(node)
        return len(self.result) - 1
