"""Matrix products written by hand, as visitor trees."""

from __future__ import annotations

from typing import Any

import numpy as np

from jevt_kernels.index_map import IndexMap, Space, TileAxis, row_major
from jevt_kernels.ops import is_float
from jevt_kernels.spec import KernelSpec, TensorType
from jevt_kernels.visitor import Contract, Load, Node, Reduce, Store

AXES = ("batch", "m", "n", "k")


class Builder:
    """Collects the nodes, inputs and outputs of a product of ``batch`` × ``m`` × ``n`` × ``k``."""

    def __init__(self, batch: int, m: int, n: int, k: int) -> None:
        self.sizes = dict(zip(AXES, (batch, m, n, k), strict=True))
        self.nodes: list[Node] = []
        self.inputs: list[TensorType] = []
        self.outputs: list[TensorType] = []

    def index(self, layout: str, offset: int = 0) -> tuple[tuple[int, ...], IndexMap]:
        """Shape and map of a dense tensor; ``layout`` names its axes by letter: "bmk", "m"."""
        names = [next(a for a in AXES if a[0] == letter) for letter in layout]
        shape = tuple(self.sizes[name] for name in names)
        strides = dict(zip(names, row_major(tuple(max(n, 1) for n in shape)), strict=True))
        # The map of an axis without elements beyond the first does not depend on it.
        own = tuple(strides.get(a, 0) if self.sizes[a] != 1 else 0 for a in AXES)
        return shape, IndexMap(own, offset)

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def load(self, layout: str, dtype: Any) -> int:
        shape, index = self.index(layout)
        self.inputs.append(TensorType(shape, np.dtype(dtype)))
        return self.add(Load(len(self.inputs) - 1, index))

    def contract(self, lhs: int, rhs: int, dtype: Any, precision: str = "ieee") -> int:
        return self.add(Contract(lhs, rhs, "k", np.dtype(dtype), precision))

    def store(self, value: int, layout: str, dtype: Any) -> None:
        shape, index = self.index(layout)
        self.outputs.append(TensorType(shape, np.dtype(dtype)))
        self.add(Store(len(self.outputs) - 1, value, index))

    def reduce(self, value: int, over: str, dtype: Any, op: str = "sum") -> int:
        return self.add(Reduce(op, value, over, np.dtype(dtype)))

    def spec(self, name: str = "gemm") -> KernelSpec:
        return KernelSpec(
            name=name,
            mainloop="gemm",
            space=Space(
                tuple(self.sizes.values()), tuple(TileAxis(a, (i,)) for i, a in enumerate(AXES))
            ),
            tree=tuple(self.nodes),
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
        )


def accumulator(dtype: Any) -> np.dtype:
    """The type of a product of two operands of ``dtype``."""
    dtype = np.dtype(dtype)
    if is_float(dtype):
        return dtype if dtype.itemsize == 8 else np.dtype("float32")
    return np.dtype("int32")


def product(
    sizes: tuple[int, int, int, int],
    dtype: Any,
    lhs: str = "bmk",
    rhs: str = "bkn",
    out: str = "bmn",
    out_dtype: Any = None,
) -> KernelSpec:
    """The plain product of two tensors of the given layouts."""
    b = Builder(*sizes)
    total = accumulator(dtype)
    value = b.contract(b.load(lhs, dtype), b.load(rhs, dtype), total)
    b.store(value, out, total if out_dtype is None else out_dtype)
    return b.spec()
