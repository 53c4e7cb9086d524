"""The reference against NumPy, on trees written by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import gemm_kernels
import jax
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import interpreter
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.reference import addresses, reference
from jevt_kernels.spec import KernelSpec, TensorType
from jevt_kernels.visitor import Compute, Constant, Iota, Load, Reduce, Store

FLOAT = np.dtype("float32")
X = contract.random((4, 8))

SPEC = KernelSpec(
    name="reference",
    mainloop="rowwise",
    space=Space((4, 8), (TileAxis("row", (0,)), TileAxis("col", (1,)))),
    tree=(
        Load(0, IndexMap((8, -1), 7)),  # reversed columns
        Load(1, IndexMap((0, 1))),
        Compute("mul", (0, 1), FLOAT),
        Reduce("sum", 2, "col", FLOAT),
        Constant(2.0, FLOAT),
        Compute("add", (3, 4), FLOAT),
        Iota(IndexMap((10, 1), 5), np.dtype("int32")),
        Store(0, 5, IndexMap((1, 0))),
        Store(1, 6, IndexMap((1, 4))),  # transposed
        Store(2, 4, IndexMap((8, 1))),  # a constant everywhere
    ),
    inputs=(TensorType((4, 8), FLOAT), TensorType((8,), FLOAT)),
    outputs=(
        TensorType((4,), FLOAT),
        TensorType((8, 4), np.dtype("int32")),
        TensorType((4, 8), FLOAT),
    ),
)


def test_against_numpy() -> None:
    sums, numbers, constant = reference(SPEC, X, X[0])
    np.testing.assert_allclose(sums, (X[:, ::-1] * X[0]).sum(1) + 2, rtol=1e-5)
    np.testing.assert_array_equal(numbers, (10 * np.arange(4) + np.arange(8)[:, None] + 5))
    np.testing.assert_array_equal(constant, np.full((4, 8), 2))


def test_inside_jit() -> None:
    eager = reference(SPEC, X, X[0])
    for got, want in zip(jax.jit(lambda *a: reference(SPEC, *a))(X, X[0]), eager, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.interpret
def test_against_the_interpreter() -> None:
    contract.same(interpreter.run(SPEC, X, X[0]), reference(SPEC, X, X[0]))


def test_addresses() -> None:
    space = Space((2, 3), (TileAxis("i", (0, 1)),))
    np.testing.assert_array_equal(addresses(IndexMap((3, 1), 4), space), [[4, 5, 6], [7, 8, 9]])
    assert addresses(IndexMap((0, 1)), space).shape == (1, 3)


def test_errors() -> None:
    with pytest.raises(TypeError, match="kernel 'reference': expected inputs"):
        reference(SPEC, X)
    narrow = dataclasses.replace(SPEC, tree=(SPEC.tree[0], Store(0, 0, IndexMap((1, 0)))))
    with pytest.raises(ValueError, match="does not fit a store"):
        reference(narrow, X, X[0])


LETTERS = ("bmk", "mk", "bkm", "kmb", "k", "b", "m")


@pytest.mark.parametrize("rhs", ["bkn", "nk", "kn", "nbk"])
@pytest.mark.parametrize("lhs", LETTERS)
def test_products(lhs: str, rhs: str) -> None:
    """Whatever axes an operand lacks: it is the same along them."""
    spec = gemm_kernels.product((2, 3, 4, 5), np.float32, lhs, rhs)
    x, y = (contract.random(t.shape, seed=i) for i, t in enumerate(spec.inputs))
    full = {"b": 2, "m": 3, "n": 4, "k": 5}
    ones = np.ones([full[a] for a in "bmnk"])
    want = np.einsum(f"{lhs},{rhs},bmnk->bmn", x, y, ones)
    (got,) = reference(spec, x, y)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64"), ("int8", "int32")],
)
def test_products_of_other_types(dtype: str, result: str) -> None:
    spec = gemm_kernels.product((1, 3, 4, 5), dtype)
    x, y = (contract.random(t.shape, dtype, i) for i, t in enumerate(spec.inputs))
    with contract.types_of(x):
        (got,) = reference(spec, x, y)
    assert got.dtype == result
    exact = x.astype(result) @ y.astype(result)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_operands_of_a_product_are_rounded() -> None:
    b = gemm_kernels.tree(1, 1, 1, 2)
    three = b.constant(3.0)
    lhs = b.compute("div", b.load("bmk", FLOAT), three, dtype=contract.BFLOAT16)
    b.store(b.contract(lhs, b.load("bkn", contract.BFLOAT16)), "bmn", FLOAT)
    one: Any = np.ones((1, 1, 2), np.float32)
    (got,) = reference(b.spec("rounded"), one, one.reshape(1, 2, 1).astype(contract.BFLOAT16))
    assert float(got[0, 0, 0]) == 2 * float(np.float32(1 / 3).astype(contract.BFLOAT16))


@pytest.mark.parametrize("sizes", [(2, 3, 4, 0), (1, 1, 1, 1), (2, 0, 3, 4)])
def test_products_of_few_elements(sizes: tuple[int, int, int, int]) -> None:
    spec = gemm_kernels.product(sizes, np.float32)
    x, y = (contract.random(t.shape, seed=i) for i, t in enumerate(spec.inputs))
    np.testing.assert_allclose(reference(spec, x, y)[0], x @ y, rtol=1e-6)
