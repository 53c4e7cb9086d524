"""Matrix products written by hand: a few lines for what a compiler would derive from a program.

Tensors are dense and row-major; their axes are named by letters::

    tree = GemmTree({"t": 4096, "h": 16, "d": 64, "c": 1024}, m="t", n="hd", k="c")
    product = tree.contract(tree.load("tc", BFLOAT16), tree.load("chd", BFLOAT16))
    tree.store(tree.compute("add", product, tree.load("hd", BFLOAT16)), "htd", BFLOAT16)
    y = jevt_kernels.run(tree.spec("projection"), x, w, bias)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jevt_kernels.index_map import IndexMap, Space, TileAxis, row_major
from jevt_kernels.mainloops.product import PRODUCT_DTYPES
from jevt_kernels.mainloops.terms import axes
from jevt_kernels.spec import KernelSpec, TensorType
from jevt_kernels.visitor import Compute, Constant, Contract, Load, Lookup, Node, Reduce, Store

_FLOAT = np.dtype("float32")


class GemmTree:
    """Collects the nodes, inputs and outputs of a kernel around a matrix product or a sum of some.

    Methods that add a node return its position.

    Args:
      sizes: of the axes, by letter.
      batch: letters of the axes that both operands and the result have.
      m: letters of the rows, outermost first.
      n: letters of the columns.
      k: letters of the contracted axes; for a sum of products those of each.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        batch: str = "",
        m: str,
        n: str,
        k: str | tuple[str, ...],
    ) -> None:
        contracted = (k,) if isinstance(k, str) else k
        self._sizes = {letter: sizes[letter] for letter in batch + m + n + "".join(contracted)}
        letters = list(self._sizes)
        self._space = Space(
            tuple(self._sizes.values()),
            tuple(
                TileAxis(name, tuple(letters.index(letter) for letter in own))
                for name, own in zip(axes(len(contracted)), (batch, m, n, *contracted), strict=True)
            ),
        )
        self._nodes: list[Node] = []
        self._inputs: list[TensorType] = []
        self._outputs: list[TensorType] = []

    def add(self, node: Node) -> int:
        """Adds any node."""
        self._nodes.append(node)
        return len(self._nodes) - 1

    def load(self, layout: str, dtype: Any) -> int:
        """A new input with the axes of ``layout``; "" is a scalar."""
        shape, index = self._index(layout)
        self._inputs.append(TensorType(shape, np.dtype(dtype)))
        return self.add(Load(len(self._inputs) - 1, index))

    def constant(self, value: float, dtype: Any = _FLOAT) -> int:
        """A number."""
        return self.add(Constant(value, np.dtype(dtype)))

    def compute(self, op: str, *operands: int, dtype: Any = _FLOAT) -> int:
        """An operation of ``jevt_kernels.ops``."""
        return self.add(Compute(op, operands, np.dtype(dtype)))

    def contract(self, lhs: int, rhs: int, precision: str = "ieee") -> int:
        """The next product, of the type in which its operands' type is added up."""
        dtype = self.dtype(lhs)
        before = sum(isinstance(node, Contract) for node in self._nodes)
        over = axes(before + 1)[-1]
        return self.add(Contract(lhs, rhs, over, PRODUCT_DTYPES.get(dtype, dtype), precision))

    def reduce(self, operand: int, over: str, op: str = "sum") -> int:
        """A reduction along tile axis ``over``, "m" or "n"."""
        return self.add(Reduce(op, operand, over, self.dtype(operand)))

    def store(self, operand: int, layout: str, dtype: Any) -> None:
        """A new output with the axes of ``layout``."""
        shape, index = self._index(layout)
        self._outputs.append(TensorType(shape, np.dtype(dtype)))
        self.add(Store(len(self._outputs) - 1, operand, index))

    def dtype(self, position: int) -> np.dtype:
        """The type of a node."""
        node = self._nodes[position]
        if isinstance(node, Load | Lookup):
            return self._inputs[node.input].dtype
        if isinstance(node, Store):
            return self._outputs[node.output].dtype
        return node.dtype

    def spec(self, name: str, aliases: tuple[tuple[int, int], ...] = ()) -> KernelSpec:
        """The kernel so far."""
        return KernelSpec(
            name=name,
            mainloop="gemm",
            space=self._space,
            tree=tuple(self._nodes),
            inputs=tuple(self._inputs),
            outputs=tuple(self._outputs),
            aliases=aliases,
        )

    def _index(self, layout: str) -> tuple[tuple[int, ...], IndexMap]:
        if missing := set(layout) - self._sizes.keys():
            raise ValueError(f"expected axes of {''.join(self._sizes)!r}, got {min(missing)!r}")
        shape = tuple(self._sizes[letter] for letter in layout)
        steps = row_major(shape) if math.prod(shape) else (1,) * len(shape)
        strides = dict(zip(layout, steps, strict=True))
        # A tensor does not depend on an axis of one element.
        own = (strides.get(letter, 0) if n != 1 else 0 for letter, n in self._sizes.items())
        return shape, IndexMap(tuple(own))
