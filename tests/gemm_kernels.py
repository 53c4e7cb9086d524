"""The matrix products of the tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import kernel_contract as contract
import numpy as np

from jevt_kernels import codegen, interpreter
from jevt_kernels.by_hand import GemmTree
from jevt_kernels.spec import Config, KernelSpec


def tree(batch: int, m: int, n: int, k: int) -> GemmTree:
    """Axes "b", "m", "n" and "k"."""
    return GemmTree({"b": batch, "m": m, "n": n, "k": k}, batch="b", m="m", n="n", k="k")


def product(
    sizes: tuple[int, int, int, int],
    dtype: Any,
    lhs: str = "bmk",
    rhs: str = "bkn",
    out: str = "bmn",
    out_dtype: Any = None,
) -> KernelSpec:
    """The plain product of two tensors of the given layouts."""
    b = tree(*sizes)
    value = b.contract(b.load(lhs, dtype), b.load(rhs, dtype))
    b.store(value, out, b.dtype(value) if out_dtype is None else out_dtype)
    return b.spec("gemm")


BFLOAT16 = contract.BFLOAT16
FLOAT = np.dtype("float32")

#: Blocks that are small enough for the interpreter; several in each direction for ``SIZES``.
SMALL = Config((("m", 32), ("n", 32), ("k", 32)), num_stages=2, group=2)
SIZES = (2, 70, 50, 90)


def gelu(b: GemmTree, x: int) -> int:
    """As ``jax.nn.gelu`` writes it."""
    tail = b.compute("erfc", b.compute("mul", x, b.constant(-(0.5**0.5))))
    return b.compute("mul", b.compute("mul", x, b.constant(0.5)), tail)


def gelu_gradient(b: GemmTree, x: int) -> int:
    """d gelu(x) / dx: the normal distribution, and x times its density."""
    square = b.compute("mul", b.compute("mul", x, x), b.constant(-0.5))
    density = b.compute("mul", b.compute("exp", square), b.constant((2 * np.pi) ** -0.5))
    tail = b.compute("erfc", b.compute("mul", x, b.constant(-(0.5**0.5))))
    return b.compute("add", b.compute("mul", tail, b.constant(0.5)), b.compute("mul", x, density))


def bias_gelu(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    """What training needs: the pre-activation and its gelu."""
    b = tree(*sizes)
    value = b.contract(b.load("bmk", dtype), b.load("kn", dtype))
    value = b.compute("add", value, b.load("n", dtype))
    b.store(value, "bmn", dtype)
    b.store(gelu(b, value), "bmn", dtype)
    return b.spec("bias_gelu")


def bias_residual(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    b = tree(*sizes)
    value = b.contract(b.load("bmk", dtype), b.load("kn", dtype))
    value = b.compute("add", value, b.load("n", dtype))
    b.store(b.compute("add", value, b.load("bmn", dtype)), "bmn", dtype)
    return b.spec("bias_residual")


def rounded_residual(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    """As a model of 16-bit values has it: all that reads the product rounds it."""
    b = tree(*sizes)
    value = b.contract(b.load("bmk", dtype), b.load("kn", dtype))
    value = b.compute("convert", value, dtype=dtype)
    value = b.compute("add", value, b.load("n", dtype), dtype=dtype)
    b.store(b.compute("add", value, b.load("bmn", dtype), dtype=dtype), "bmn", dtype)
    return b.spec("rounded_residual")


def dgrad_gelu(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    """dy·wᵀ times gelu'(h), and the sum of that over rows: the gradient of the bias before it."""
    b = tree(*sizes)
    value = b.contract(b.load("bmk", dtype), b.load("nk", dtype))
    value = b.compute("mul", value, gelu_gradient(b, b.load("bmn", dtype)))
    b.store(value, "bmn", dtype)
    b.store(b.reduce(value, "m"), "bn", FLOAT)
    return b.spec("dgrad_gelu")


def every_reduction(sizes: tuple[int, int, int, int], dtype: Any = FLOAT) -> KernelSpec:
    """Along rows, along columns, and along both; a value of one row takes part as a whole tile."""
    b = tree(*sizes)
    value = b.contract(b.load("bmk", dtype), b.load("kn", dtype))
    columns = b.reduce(value, "m")
    b.store(columns, "bn", FLOAT)
    b.store(b.reduce(columns, "n"), "b", FLOAT)
    b.store(b.reduce(value, "n", "max"), "bm", FLOAT)
    row = b.compute("mul", b.load("n", FLOAT), b.constant(2.0))
    b.store(b.reduce(b.reduce(row, "n"), "m"), "", FLOAT)
    b.store(value, "nbm", FLOAT)
    return b.spec("every_reduction")


def prologue(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    """exp(x·row + column) times softplus-like weights: neither is 0 where a load gives 0."""
    b = tree(*sizes)
    x = b.compute("mul", b.load("bmk", dtype), b.load("m", FLOAT))
    lhs = b.compute("exp", b.compute("sub", x, b.load("k", FLOAT)), dtype=dtype)
    rhs = b.compute("add", b.load("nk", FLOAT), b.load("k", FLOAT), dtype=dtype)
    b.store(b.contract(lhs, rhs), "bmn", FLOAT)
    return b.spec("prologue")


def weight_gradient(sizes: tuple[int, int, int, int], dtype: Any = BFLOAT16) -> KernelSpec:
    return product(sizes, dtype, "bkm", "bkn", "bmn", dtype)


def split_heads() -> KernelSpec:
    """Queries times keys of [batch, length, heads, width], to scores [batch, heads, …] in place."""
    sizes = {"b": 2, "h": 3, "q": 33, "s": 33, "d": 20}
    b = GemmTree(sizes, batch="bh", m="q", n="s", k="d")
    value = b.contract(b.load("bqhd", FLOAT), b.load("bshd", FLOAT))
    b.store(b.compute("add", value, b.load("bhqs", FLOAT)), "bhqs", FLOAT)
    return b.spec("split_heads", aliases=((2, 0),))


def unflattened() -> KernelSpec:
    """A contraction over two axes that are apart in one operand, and two axes of rows."""
    b = GemmTree({"x": 3, "y": 5, "n": 40, "c": 7, "d": 6}, m="xy", n="n", k="cd")
    b.store(b.contract(b.load("xcyd", FLOAT), b.load("dcn", FLOAT)), "yxn", FLOAT)
    return b.spec("unflattened")


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


# Checks

#: Sums of another order, of operands whose rounding may differ by a unit in the last place.
TOLERANCE = {"bfloat16": 8e-3, "float16": 2e-3, "float32": 1e-4, "float64": 1e-12}


def operands(spec: KernelSpec) -> list[np.ndarray]:
    return [contract.random(t.shape, t.dtype, seed) for seed, t in enumerate(spec.inputs)]


def specialized(
    kind: str, m: int, n: int, warps: int, stages: int = 3, subtiles: int = 1
) -> Config:
    """A configuration whose warps have different tasks."""
    return Config(
        (("m", m), ("n", n), ("k", 64)),
        warps,
        stages,
        programs=5,
        subtiles=subtiles,
        descriptors=True,
        specialized=kind,
    )


def check(spec: KernelSpec, config: Config | None, run: Any = interpreter.run) -> None:
    arrays = operands(spec)
    with contract.types_of(*arrays):
        expected = contract.referred(spec, *arrays)
        got = run(spec, *arrays, config=config)
        for mine, theirs in zip(got, expected, strict=True):
            name = np.dtype(theirs.dtype).name
            contract.same([mine], [theirs], TOLERANCE.get(name))


def check_descriptors(spec: KernelSpec, config: Config, count: int) -> None:
    """So many operands are loaded by descriptors, and the kernel is right."""
    source = codegen.generate(spec, config)
    assert len(source.descriptors) == source.text.count("_desc.load(") == count
    check(spec, config)


def changed(spec: KernelSpec, position: int, **fields: Any) -> KernelSpec:
    """The kernel with other fields of one node."""
    tree = list(spec.tree)
    tree[position] = dataclasses.replace(tree[position], **fields)
    return dataclasses.replace(spec, tree=tuple(tree))
