"""Arithmetic that values of bfloat16 allow to spare.

A kernel computes what is of bfloat16 in float32. Its results are rounded to 8 bits of mantissa in
the end, so that it makes no difference when a constant is multiplied, and an erfc need not be of
float32's accuracy. A gelu and its gradient in the epilogue of a product take a quarter fewer
instructions:

* constant factors of a product are multiplied here, and at once: c·((d·x)·y) = ((c·d)·x)·y;
* erfc(c·x) and exp(-(c·x)²) are one operation, in which c costs nothing, and share what they have
  in common; so is a constant times an erfc.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jevt.lowering.rewriting import Rewriter
from jevt_kernels import visitor
from jevt_kernels.ops import BFLOAT16

#: Least and most that the constants of a product may come to.
_LEAST, _MOST = 2.0**-8, 2.0**8


def shorten(nodes: Sequence[visitor.Node]) -> Sequence[visitor.Node]:
    """The nodes with the arithmetic of bfloat16 in as few operations as are known.

    Args:
      nodes: in an order in which each follows its operands, stores included.

    Returns:
      Nodes in such an order, among them some that nothing reads any more; the same if none changed.
    """
    return _Rewriter(nodes).rewritten()


@dataclasses.dataclass(frozen=True)
class _Product:
    """What multiplications multiply whose results nothing else reads.

    Attributes:
      constant: the product of all constants.
      constants: their number.
      parts: all else, as it is multiplied: positions, and products within.
    """

    constant: float
    constants: int
    parts: tuple[int | _Product, ...]

    def leaves(self) -> Iterator[int]:
        """The positions, from left to right."""
        for part in self.parts:
            if isinstance(part, _Product):
                yield from part.leaves()
            else:
                yield part


class _Rewriter(Rewriter):
    def __init__(self, nodes: Sequence[visitor.Node]) -> None:
        super().__init__(nodes)
        reads = [operand for node in nodes for operand in visitor.operands(node)]
        self.readers = collections.Counter(reads)

    def replaced(self, position: int, node: visitor.Compute) -> int | None:
        if node.dtype != BFLOAT16:
            return None
        if node.op == "erfc":
            x, scale = self._scaled(self._operand(position))
            return self._call("scaled_erfc", x, scale, 1.0)
        if node.op == "exp":
            return self._gaussian(self._operand(position))
        if node.op == "mul":
            return self._multiplied(position)
        return None

    def _gaussian(self, exponent: int) -> int | None:
        if not self._is(exponent, "neg") or not self._is(self._operand(exponent), "square"):
            return None
        return self._call("gaussian", *self._scaled(self._operand(self._operand(exponent))))

    def _multiplied(self, position: int) -> int | None:
        product = self._product(position)
        leaves = list(product.leaves())
        if not product.constants or not leaves:
            return None
        erfcs = [i for i, leaf in enumerate(leaves) if self._is(leaf, "erfc") and self._once(leaf)]
        if not erfcs and product.constants < 2:
            return None
        values, constant = [self.renamed[leaf] for leaf in leaves], product.constant
        # Applied there, it makes no value on the way larger than that is without it, or the result.
        early = abs(constant) <= 1
        if early and erfcs:
            x, scale = self._scaled(self._operand(leaves[erfcs[0]]))
            values[erfcs[0]] = self._call("scaled_erfc", x, scale, constant)
        elif early:
            values[0] = self._times(constant, values[0])
        total = self._multiply(product, iter(values))
        return total if early else self._times(constant, total)

    def _multiply(self, product: _Product, values: Iterator[int]) -> int:
        """A product in its own order, of new positions in the place of its leaves."""
        factors = [
            self._multiply(part, values) if isinstance(part, _Product) else next(values)
            for part in product.parts
        ]
        if len(factors) == 1:
            return factors[0]
        return self.add(visitor.Compute("mul", tuple(factors), BFLOAT16))

    def _times(self, constant: float, value: int) -> int:
        if constant == 1.0:
            return value
        return self.add(visitor.Compute("mul", (self._constant(constant), value), BFLOAT16))

    def _product(self, position: int) -> _Product:
        constant, constants = 1.0, 0
        parts: list[int | _Product] = []
        for operand in visitor.operands(self.nodes[position]):
            while self._is(operand, "neg") and self._once(operand):
                constant, constants = -constant, constants + 1
                operand = self._operand(operand)
            number = self._number(operand)
            inner = None
            if self._is(operand, "mul") and self._once(operand):
                inner = self._product(operand)
            if number is not None and _may_be_moved(constant * number):
                constant, constants = constant * number, constants + 1
            elif inner is not None and _may_be_moved(constant * inner.constant):
                constant, constants = constant * inner.constant, constants + inner.constants
                parts += [inner] if inner.parts else []
            else:
                parts.append(operand)
        return _Product(constant, constants, tuple(parts))

    def _scaled(self, position: int) -> tuple[int, float]:
        """x and c where the node's value is c·x."""
        scale = 1.0
        while True:
            if self._is(position, "neg"):
                position, scale = self._operand(position), -scale
                continue
            if not self._is(position, "mul"):
                return position, scale
            first, second = visitor.operands(self.nodes[position])
            number, x = self._number(first), second
            if number is None:
                number, x = self._number(second), first
            if number is None or not _may_be_moved(scale * number):
                return position, scale
            position, scale = x, scale * number

    def _number(self, position: int) -> float | None:
        """The value of a constant of bfloat16."""
        node = self.nodes[position]
        if not isinstance(node, visitor.Constant) or node.dtype != BFLOAT16:
            return None
        return float(node.value)

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
        return self.add(visitor.Compute(op, (self.renamed[x], *constants), BFLOAT16))

    def _constant(self, value: float) -> int:
        return self.add(visitor.Constant(value, np.dtype("float32")))


def _may_be_moved(constant: float) -> bool:
    """Not those so large or small that a value on the way might overflow, or become 0."""
    return _LEAST <= abs(constant) <= _MOST
