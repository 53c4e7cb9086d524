"""Kernels of sums of matrix products for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gemm_kernels as gemm
import numpy as np

from jevt_kernels.by_hand import GemmTree
from jevt_kernels.spec import KernelSpec

BFLOAT16, FLOAT = gemm.BFLOAT16, gemm.FLOAT

#: Layouts of the operands of a term: letters of batch, rows, columns; "k" its contracted axis.
type Layouts = tuple[str, str]

#: Letters of the contracted axes of terms.
_CONTRACTED = "kxyzuvwc"


def tree(batch: int, m: int, n: int, ks: Sequence[int]) -> GemmTree:
    """Axes "b", "m", "n"; "k", "x", "y" and so on of the terms."""
    letters = _CONTRACTED[: len(ks)]
    sizes = {"b": batch, "m": m, "n": n, **dict(zip(letters, ks, strict=True))}
    return GemmTree(sizes, batch="b", m="m", n="n", k=tuple(letters))


def terms(b: GemmTree, dtype: Any, layouts: Sequence[Layouts]) -> list[int]:
    """The products of new inputs."""
    return [
        b.contract(b.load(lhs.replace("k", k), dtype), b.load(rhs.replace("k", k), dtype))
        for k, (lhs, rhs) in zip(_CONTRACTED, layouts, strict=False)
    ]


def added(b: GemmTree, products: Sequence[int]) -> int:
    """The products added up, one after the other."""
    total = products[0]
    for other in products[1:]:
        total = b.compute("add", total, other, dtype=b.dtype(total))
    return total


def plain(
    sizes: tuple[int, int, int],
    ks: Sequence[int],
    dtype: Any,
    layouts: Sequence[Layouts] | None = None,
    out_dtype: Any = None,
) -> KernelSpec:
    """The sum alone, of operands (batch, m, k) and (k, n) unless told otherwise."""
    b = tree(*sizes, ks)
    value = added(b, terms(b, dtype, layouts or [("bmk", "kn")] * len(ks)))
    b.store(value, "bmn", b.dtype(value) if out_dtype is None else out_dtype)
    return b.spec("sum_of_products")


def residual(
    sizes: tuple[int, int, int],
    ks: Sequence[int],
    dtype: Any = BFLOAT16,
    layouts: Sequence[Layouts] | None = None,
    *,
    sums: bool = True,
) -> KernelSpec:
    """A gradient of what several products read, as it is added to another, and its column sums."""
    b = tree(*sizes, ks)
    value = added(b, terms(b, dtype, layouts or [("bmk", "nk")] * len(ks)))
    value = b.compute("add", value, b.load("n", dtype))
    value = b.compute("add", value, b.load("bmn", dtype))
    b.store(value, "bmn", dtype)
    if sums:
        b.store(b.reduce(value, "m"), "bn", FLOAT)
    return b.spec("residual_of_products")


def gelu_gradient(
    sizes: tuple[int, int, int], ks: Sequence[int], dtype: Any = BFLOAT16
) -> KernelSpec:
    """The sum times the gradient of a gelu: a long epilogue."""
    b = tree(*sizes, ks)
    value = added(b, terms(b, dtype, [("bmk", "nk")] * len(ks)))
    value = b.compute("mul", value, gemm.gelu_gradient(b, b.load("bmn", dtype)))
    b.store(value, "bmn", dtype)
    b.store(b.reduce(value, "m"), "bn", FLOAT)
    return b.spec("gelu_gradient_of_products")


def prologues(sizes: tuple[int, int, int], ks: tuple[int, int, int]) -> KernelSpec:
    """Operands that are computed, one of them not, with a scale of the rows that two share."""
    b = tree(*sizes, ks)
    scale = b.compute("exp", b.load("bm", FLOAT))
    first = b.contract(
        b.compute("mul", b.load("bmk", BFLOAT16), scale, dtype=BFLOAT16), b.load("kn", BFLOAT16)
    )
    shifted = b.compute("add", b.load("xn", FLOAT), b.load("x", FLOAT), dtype=BFLOAT16)
    second = b.contract(b.load("mbx", BFLOAT16), shifted)
    third = b.contract(
        b.compute("add", b.load("bym", FLOAT), scale, dtype=BFLOAT16), b.load("n", BFLOAT16)
    )
    # The last term is added first.
    value = b.compute("add", first, b.compute("add", third, second))
    b.store(b.compute("mul", value, scale), "nbm", FLOAT)
    return b.spec("prologues_of_products")


def several_axes() -> KernelSpec:
    """Terms over two axes and over one, of rows of two axes."""
    sizes = {"h": 3, "q": 11, "n": 40, "c": 7, "d": 6, "e": 33}
    b = GemmTree(sizes, m="hq", n="n", k=("cd", "e"))
    first = b.contract(b.load("qchd", FLOAT), b.load("dcn", FLOAT))
    value = b.compute("add", first, b.contract(b.load("ehq", FLOAT), b.load("ne", FLOAT)))
    b.store(b.compute("tanh", value), "qhn", FLOAT)
    return b.spec("several_axes")


#: Layouts that differ between the terms.
MIXED: tuple[Layouts, ...] = (("bmk", "kn"), ("bkm", "bnk"), ("mkb", "nk"))

#: At odd sizes, for the interpreter and for a GPU.
CASES: dict[str, KernelSpec] = {
    "two terms": plain((2, 33, 40), (50, 35), BFLOAT16),
    "float16": residual((1, 40, 33), (20, 70), np.dtype("float16")),
    "layouts": residual((2, 33, 40), (31, 64, 33), BFLOAT16, MIXED),
    "float32": residual((2, 40, 35), (64, 33, 1), FLOAT, MIXED),
    "float64": plain((1, 33, 20), (33, 40), "float64"),
    "integers": plain((2, 33, 40), (50, 35), "int8", MIXED[:2]),
    "one is empty": residual((2, 33, 40), (0, 40, 70), BFLOAT16, MIXED),
    "all are empty": residual((2, 33, 40), (0, 0)),
    "prologues": prologues((2, 33, 40), (50, 35, 20)),
    "several axes": several_axes(),
    "gradient of gelu": gelu_gradient((1, 40, 70), (33, 40)),
    "eight terms": plain((1, 20, 33), (5, 6, 7, 8, 9, 10, 11, 40), FLOAT),
}
