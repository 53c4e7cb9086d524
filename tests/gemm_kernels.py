"""Matrix products written by hand, as visitor trees."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jevt_kernels.index_map import IndexMap, Space, TileAxis, row_major
from jevt_kernels.ops import is_float
from jevt_kernels.spec import Config, KernelSpec, TensorType
from jevt_kernels.visitor import Compute, Constant, Contract, Load, Node, Reduce, Store

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


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT = np.dtype("float32")

#: Blocks that are small enough for the interpreter; several in each direction for ``SIZES``.
SMALL = Config((("m", 32), ("n", 32), ("k", 32)), num_stages=2, group=2)
SIZES = (2, 70, 50, 90)


def _constant(b: Builder, value: float) -> int:
    return b.add(Constant(value, FLOAT))


def _op(b: Builder, op: str, *operands: int, dtype: Any = FLOAT) -> int:
    return b.add(Compute(op, operands, np.dtype(dtype)))


def gelu(b: Builder, x: int) -> int:
    """As ``jax.nn.gelu`` writes it."""
    tail = _op(b, "erfc", _op(b, "mul", x, _constant(b, -(0.5**0.5))))
    return _op(b, "mul", _op(b, "mul", x, _constant(b, 0.5)), tail)


def gelu_gradient(b: Builder, x: int) -> int:
    """d gelu(x) / dx: the normal distribution, and x times its density."""
    square = _op(b, "mul", _op(b, "mul", x, x), _constant(b, -0.5))
    density = _op(b, "mul", _op(b, "exp", square), _constant(b, (2 * np.pi) ** -0.5))
    tail = _op(b, "erfc", _op(b, "mul", x, _constant(b, -(0.5**0.5))))
    return _op(b, "add", _op(b, "mul", tail, _constant(b, 0.5)), _op(b, "mul", x, density))


def bias_gelu(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    """What training needs: the pre-activation and its gelu."""
    b = Builder(*sizes)
    value = b.contract(b.load("bmk", dtype), b.load("kn", dtype), FLOAT)
    value = _op(b, "add", value, b.load("n", dtype))
    b.store(value, "bmn", dtype)
    b.store(gelu(b, value), "bmn", dtype)
    return b.spec("bias_gelu")


def bias_residual(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    b = Builder(*sizes)
    value = b.contract(b.load("bmk", dtype), b.load("kn", dtype), FLOAT)
    value = _op(b, "add", value, b.load("n", dtype))
    b.store(_op(b, "add", value, b.load("bmn", dtype)), "bmn", dtype)
    return b.spec("bias_residual")


def dgrad_gelu(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    """dy·wᵀ times gelu'(h), and the sum of that over rows: the gradient of the bias before it."""
    b = Builder(*sizes)
    value = b.contract(b.load("bmk", dtype), b.load("nk", dtype), FLOAT)
    value = _op(b, "mul", value, gelu_gradient(b, b.load("bmn", dtype)))
    b.store(value, "bmn", dtype)
    b.store(b.reduce(value, "m", FLOAT), "bn", FLOAT)
    return b.spec("dgrad_gelu")


def every_reduction(sizes: tuple[int, int, int, int]) -> KernelSpec:
    """Along rows, along columns, and along both; a value of one row takes part as a whole tile."""
    b = Builder(*sizes)
    value = b.contract(b.load("bmk", FLOAT), b.load("kn", FLOAT), FLOAT)
    columns = b.reduce(value, "m", FLOAT)
    b.store(columns, "bn", FLOAT)
    b.store(b.reduce(columns, "n", FLOAT), "b", FLOAT)
    b.store(b.reduce(value, "n", FLOAT, "max"), "bm", FLOAT)
    row = _op(b, "mul", b.load("n", FLOAT), _constant(b, 2.0))
    b.store(b.reduce(b.reduce(row, "n", FLOAT), "m", FLOAT), "", FLOAT)
    b.store(value, "nbm", FLOAT)
    return b.spec("every_reduction")


def prologue(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    """exp(x·row + column) times softplus-like weights: neither is 0 where a load gives 0."""
    b = Builder(*sizes)
    x = _op(b, "mul", b.load("bmk", dtype), b.load("m", FLOAT))
    lhs = _op(b, "exp", _op(b, "sub", x, b.load("k", FLOAT)), dtype=dtype)
    rhs = _op(b, "add", b.load("nk", FLOAT), b.load("k", FLOAT), dtype=dtype)
    b.store(b.contract(lhs, rhs, FLOAT), "bmn", FLOAT)
    return b.spec("prologue")


def split_heads() -> KernelSpec:
    """Queries times keys of [batch, length, heads, width], scores by [batch, heads, …] in place."""
    batch, length, heads, width = 2, 33, 3, 20
    sizes = (batch, heads, length, length, width)
    strides = dict(zip("blhw", row_major((batch, length, heads, width)), strict=True))
    x = IndexMap((strides["b"], strides["h"], strides["l"], 0, strides["w"]))
    y = IndexMap((strides["b"], strides["h"], 0, strides["l"], strides["w"]))
    scores = (batch, heads, length, length)
    out = IndexMap((*row_major(scores), 0))
    tensor = TensorType((batch, length, heads, width), FLOAT)
    return KernelSpec(
        name="split_heads",
        mainloop="gemm",
        space=Space(
            sizes,
            tuple(map(TileAxis, AXES, ((0, 1), (2,), (3,), (4,)))),
        ),
        tree=(
            Load(0, x),
            Load(1, y),
            Contract(0, 1, "k", FLOAT),
            Load(2, out),
            Compute("add", (2, 3), FLOAT),
            Store(0, 4, out),
        ),
        inputs=(tensor, tensor, TensorType(scores, FLOAT)),
        outputs=(TensorType(scores, FLOAT),),
        aliases=((2, 0),),
    )


def unflattened() -> KernelSpec:
    """A contraction over two axes that are apart in one operand, and two axes of rows."""
    sizes = (1, 3, 5, 40, 7, 6)  # batch, two of m, n, two of k
    lhs = IndexMap((0, 7 * 5 * 6, 6, 0, 5 * 6, 1))  # [3, 7, 5, 6]
    rhs = IndexMap((0, 0, 0, 1, 40, 7 * 40))  # [6, 7, 40]
    out = IndexMap((0, 40, 3 * 40, 1, 0, 0))  # [5, 3, 40]
    return KernelSpec(
        name="unflattened",
        mainloop="gemm",
        space=Space(sizes, tuple(map(TileAxis, AXES, ((0,), (1, 2), (3,), (4, 5))))),
        tree=(Load(0, lhs), Load(1, rhs), Contract(0, 1, "k", FLOAT), Store(0, 2, out)),
        inputs=(TensorType((3, 7, 5, 6), FLOAT), TensorType((6, 7, 40), FLOAT)),
        outputs=(TensorType((5, 3, 40), FLOAT),),
    )


#: Kernels of every kind at odd sizes, for the interpreter and for a GPU.
CASES: dict[str, KernelSpec] = {
    "bias, gelu": bias_gelu(SIZES),
    "bias, residual": bias_residual(SIZES),
    "gradient of gelu": dgrad_gelu(SIZES),
    "every reduction": every_reduction(SIZES),
    "prologue": prologue(SIZES),
    "heads": split_heads(),
    "several axes": unflattened(),
    "no batch": bias_gelu((1, 33, 100, 40)),
    "one row": bias_residual((1, 1, 40, 33)),
    "one column": bias_residual((3, 40, 1, 33)),
    "one term": prologue((2, 33, 40, 1)),
    "one element": every_reduction((1, 1, 1, 1)),
    "no terms": every_reduction((2, 33, 40, 0)),
    "short": bias_gelu((2, 3, 5, 2)),
    **{
        f"{lhs} times {rhs} to {out}, {np.dtype(dtype).name}": product(
            (2, 40, 33, 50), dtype, lhs, rhs, out
        )
        for lhs, rhs, out in (
            ("bmk", "bkn", "bmn"),
            ("bmk", "nbk", "nmb"),
            ("bkm", "kn", "mbn"),
            ("kmb", "nk", "bnm"),
        )
        for dtype in ("bfloat16", "float16", "float32", "float64", "int8")
    },
}
