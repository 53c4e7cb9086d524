"""Groups around a matrix product: any dimension numbers, trees before and behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
import random_products
from hypothesis import event, given, settings
from jax import lax

from jevt.lowering import spec as lowering
from jevt.lowering.alias import donated_aliases
from jevt.lowering.errors import NotFusible
from jevt_kernels import interpreter, visitor
from jevt_kernels.index_map import IndexMap
from jevt_kernels.spec import KernelSpec

X = contract.random((4, 6, 32))
W = contract.random((32, 48), seed=1)
BIAS = contract.random((48,), seed=2)
Y = contract.random((4, 6, 48), seed=3)
HEADS = contract.random((4, 3, 6, 8), seed=4)
SQUARE = contract.random((32, 32), seed=5)


@given(random_products.programs())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_random_products(program: random_products.Program) -> None:
    arrays = program.inputs()
    try:
        spec = contract.build(program, *arrays)
    except NotFusible as refusal:
        event(str(refusal))
        return
    assert spec.mainloop == "gemm"
    for got, want in zip(contract.referred(spec, *arrays), program.expected(), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def gelu_gradient(dy: Any, w: Any, h: Any) -> Any:
    """What autodiff leaves of a hidden layer: the input's gradient and the bias's."""
    _, pullback = jax.vjp(jax.nn.gelu, h)
    dh = pullback(jnp.einsum("bsf,df->bsd", dy, w))[0]
    return dh, dh.sum((0, 1))


def xml_head(x: Any, w: Any, b: Any, y: Any) -> Any:
    """Sigmoid cross entropy's gradient and the bias's: the logits themselves stay inside."""
    gradient = jax.nn.sigmoid(x @ w + b) - y
    return gradient.astype(jnp.bfloat16), gradient.sum((0, 1))


GROUPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "plain": (jnp.matmul, (X, W)),
    "bias and gelu, both stored": (
        lambda x, w, b: (lambda h: (h, jax.nn.gelu(h)))(x @ w + b),
        (X, W, BIAS),
    ),
    "hidden layer's gradient": (gelu_gradient, (Y, W, X)),
    "gradient of a head": (xml_head, (X, W, BIAS, Y)),
    "weight gradient and update": (
        lambda x, dy, w: w - 0.1 * jnp.einsum("bsd,bsf->fd", x, dy).T,
        (X, Y, W),
    ),
    "residual": (lambda x, w, r: x + x @ w * 2 + r, (X, SQUARE, X)),
    "split heads": (lambda x, w: (x @ w).reshape(4, 6, 4, 12).transpose(0, 2, 1, 3) * 2, (X, W)),
    "scores": (
        lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k) / 8.0 + jnp.tril(jnp.ones((6, 6))),
        (HEADS, HEADS),
    ),
    "merged heads": (
        lambda v, w: jnp.einsum("bhqd,hde->bqe", v, w) + 1.0,
        (HEADS, contract.random((3, 8, 20), seed=6)),
    ),
    "vmapped rows": (jax.vmap(lambda x, w: jnp.tanh(x @ w), (0, None)), (X, W)),
    "vmapped columns": (
        jax.vmap(lambda x, w: jnp.tanh(x @ w), (None, 0)),
        (SQUARE, contract.random((5, 32, 7), seed=7)),
    ),
    "gram": (lambda x: x @ x.T, (SQUARE[:7],)),
    "outer": (lambda a, b: jnp.tensordot(a, b, 0) + 1, (BIAS, X[0, 0])),
    "matrix and vector": (lambda w, b: jax.nn.relu(w @ b), (W, BIAS)),
    "inner product": (lambda a, b: a @ b * 2, (BIAS, Y[0, 0])),
    "normalised on load": (
        lambda x, mean, scale, w: (x - mean[..., None]) * scale @ w,
        (X, X[..., 0], X[0, 0], W),
    ),
    "one-hot": (
        lambda index, table: jax.nn.one_hot(index, 32) @ table,
        (np.arange(24, dtype=np.int32).reshape(4, 6), W),
    ),
    "sum of squares a row": (lambda x, w: jnp.square(x @ w).sum(-1), (X, W)),
    "sum of squares": (lambda x, w: (lambda y: (y, jnp.square(y).sum()))(x @ w), (X, W)),
    "sums of a batch": (
        lambda q, k: (lambda s: (s.sum((2, 3)), s.max(-1)))(jnp.einsum("bhqd,bhkd->bhqk", q, k)),
        (HEADS, HEADS),
    ),
    "mean of a vector": (lambda w, b: jnp.tanh(w @ b).sum(), (W, BIAS)),
    "slices": (lambda x, w: x[1:, ::2, :16] @ w[16:, ::3], (X, W)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name: str) -> None:
    function, arrays = GROUPS[name]
    spec = contract.build(function, *arrays)
    assert spec.mainloop == "gemm"
    assert [t.name for t in spec.space.tile] == ["batch", "m", "n", "k"]
    expected = jax.tree.leaves(jax.jit(function)(*arrays))
    contract.same(
        contract.referred(spec, *arrays), expected, 1e-2 if name.startswith("gradient") else None
    )


@pytest.mark.interpret
@pytest.mark.parametrize("name", GROUPS)
def test_kernels_of_groups(name: str) -> None:
    function, arrays = GROUPS[name]
    contract.check(function, *arrays, tolerance=1e-2 if name.startswith("gradient") else None)


@pytest.mark.interpret
@given(random_products.programs())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_kernels_of_random_products(program: random_products.Program) -> None:
    arrays = program.inputs()
    try:
        spec = contract.build(program, *arrays)
    except NotFusible:
        return
    for got, want in zip(interpreter.run(spec, *arrays), program.expected(), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)


TYPES = ["bfloat16", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("result", TYPES)
def test_types(dtype: str, result: str) -> None:
    """As exact as the types allow, or better where XLA rounds the product before the epilogue."""
    if np.dtype(contract.BFLOAT16 if result == "bfloat16" else result).itemsize > 8:
        return
    wide = "float64" in (dtype, result)
    with jax.enable_x64(wide):
        x, w = (jnp.asarray(a, dtype) for a in (X, W))

        def function(x: Any, w: Any) -> Any:
            product = lax.dot_general(x, w, (((2,), (0,)), ((), ())), preferred_element_type=result)
            return jnp.tanh(product * 0.25)

        spec = contract.build(function, x, w)
        (got,) = contract.referred(spec, x, w)
    (node,) = [n for n in spec.tree if isinstance(n, visitor.Contract)]
    assert node.dtype == ("float64" if dtype == "float64" else "float32")
    exact = np.tanh(np.asarray(x, np.float64) @ np.asarray(w, np.float64) * 0.25)
    assert got.dtype == result
    limit = max(contract.TOLERANCE[result], 1e-6 if dtype != "float64" else 0)
    error = np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
    assert error < limit


def test_bytes_add_up_exactly() -> None:
    x, w = contract.random((5, 33), np.int8), contract.random((33, 7), np.int8, seed=1)
    function = lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.int32) + 1  # noqa: E731
    spec = contract.build(function, x, w)
    want = x.astype(np.int64) @ w.astype(np.int64) + 1
    np.testing.assert_array_equal(contract.referred(spec, x, w)[0], want)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (None, "tf32"),
        ("default", "tf32"),
        ("high", "tf32x3"),
        ("highest", "ieee"),
        (("highest", "default"), "ieee"),
        (lax.DotAlgorithmPreset.TF32_TF32_F32, "tf32"),
        (lax.DotAlgorithmPreset.F32_F32_F32, "ieee"),
        (lax.DotAlgorithmPreset.DEFAULT, "tf32"),
    ],
)
def test_precision(precision: Any, expected: str) -> None:
    spec = contract.build(lambda x, w: lax.dot(x, w, precision=precision), X[0], W)
    assert _product(spec).precision == expected
    half = X[0].astype(np.float16), W.astype(np.float16)
    if not isinstance(precision, lax.DotAlgorithmPreset):
        spec = contract.build(lambda x, w: lax.dot(x, w, precision=precision), *half)
        assert _product(spec).precision == "ieee"


REFUSALS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "two products": (lambda x, w: x @ w + x @ (w * 2), (X, W), "several matrix products"),
    "products in turn": (lambda x: x @ x @ x, (SQUARE,), "several matrix products"),
    "softmax behind": (
        lambda x, w: jax.nn.softmax(x @ w),
        (X, W),
        "a value is read after a reduction of a matrix product's tile",
    ),
    "norm before": (
        lambda x, w: (x / x.sum(-1, keepdims=True)) @ w,
        (X, W),
        "a reduction before a matrix product",
    ),
    "operand stored": (
        lambda x, w: (lambda y: (y, y @ w))(jnp.tanh(x)),
        (X, W),
        "a value along the contracted axes is needed outside|does not have",
    ),
    "sum of a part of the rows": (
        lambda x, w: (x @ w).sum(0),
        (X, W),
        "along a part of the product's rows or columns",
    ),
    "sum over the batch": (
        lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k).sum((0, 1)),
        (HEADS, HEADS),
        "along a part of the product's rows or columns",
    ),
    "sum of a batch": (
        lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k).sum(),
        (HEADS, HEADS),
        "along a part of the product's rows or columns",
    ),
    "wider behind": (
        lambda x, w, y: (x @ w)[..., None] + y,
        (X, W, Y[0, 0]),
        "does not have",
    ),
    "a vector beside": (
        lambda x, w, b: (x @ w + b, b * 2),
        (X, W, BIAS),
        "does not have",
    ),
    "the bias's gelu": (
        lambda x, w, b: (lambda y: (x @ w + y, y * 2))(jax.nn.gelu(b)),
        (X, W, BIAS),
        "an output does not run along every axis",
    ),
    "part of the product": (lambda x, w: (x @ w)[1:], (X, W), "slice of a value"),
    "mixed types": (
        lambda x, w: lax.dot_general(x, w, (((2,), (0,)), ((), ()))),
        (X, W.astype(np.float16)),
        "dot_general of float32 and float16",
    ),
    "narrow sums of integers": (
        jnp.matmul,
        (np.ones((3, 4), np.int8), np.ones((4, 3), np.int8)),
        "dot_general of int8 to int8",
    ),
    "an algorithm of parts": (
        lambda x, w: lax.dot(x, w, precision=lax.DotAlgorithmPreset.BF16_BF16_F32_X6),
        (X[0], W),
        "by algorithm",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    function, arrays, reason = REFUSALS[name]
    with pytest.raises(NotFusible, match=reason):
        contract.build(function, *arrays)


def test_an_operand_that_a_batch_shares_makes_one_product_of_it() -> None:
    function, arrays = GROUPS["vmapped rows"]
    spec = contract.build(function, *arrays)
    assert _extents(spec) == {"batch": 1, "m": 24, "n": 48, "k": 32}
    function, arrays = GROUPS["vmapped columns"]
    spec = contract.build(function, *arrays)
    # Rows are what is stored contiguously: here those of each matrix of the batch.
    assert sorted(_extents(spec).values()) == [1, 32, 32, 35]


@pytest.mark.parametrize("turn", [False, True])
def test_stores_run_along_n(turn: bool) -> None:
    spec = contract.build(lambda x, w: (lambda y: y.T if turn else y)(x @ w * 2), X[0], W)
    (store,) = [n for n in spec.tree if isinstance(n, visitor.Store)]
    n = spec.space.tile_axis("n")
    assert store.index.strides[n.axes[-1]] == 1
    assert spec.space.extent(n) == (6 if turn else 48)
    lhs = spec.tree[_product(spec).lhs]
    assert isinstance(lhs, visitor.Load)
    assert lhs.input == (1 if turn else 0)


def test_contiguous_axes_are_one_stride() -> None:
    """The plain case reads and writes matrices, whatever the number of axes before."""
    spec = contract.build(lambda x, w, r: x @ w + r, X, W, Y)
    for node in spec.tree:
        if isinstance(node, visitor.Load | visitor.Store):
            for tile_axis in spec.space.tile:
                assert len(node.index.digits(spec.space, tile_axis)) <= 1


def test_reductions_run_along_rows_and_columns() -> None:
    function, arrays = GROUPS["hidden layer's gradient"]
    (bias,) = _reductions(contract.build(function, *arrays))
    assert bias.over == "m"
    function, arrays = GROUPS["sum of squares a row"]
    (squares,) = _reductions(contract.build(function, *arrays))
    assert squares.over == "n"
    turned = contract.build(lambda x, w: (x @ w).T.sum(1), X[0], W)
    (columns,) = _reductions(turned)
    assert columns.over == ("m" if _extents(turned)["m"] == 6 else "n")


def test_what_does_not_depend_on_the_product_may_be_in_its_epilogue() -> None:
    def function(x: Any, w: Any, y: Any) -> Any:
        return x @ w * y, jnp.exp(y), y.sum((0, 1))

    spec = contract.build(function, X, W, Y)
    expected = jax.tree.leaves(jax.jit(function)(X, W, Y))
    contract.same(contract.referred(spec, X, W, Y), expected)


def _product(spec: KernelSpec) -> visitor.Contract:
    (product,) = [n for n in spec.tree if isinstance(n, visitor.Contract)]
    return product


def _reductions(spec: KernelSpec) -> list[visitor.Reduce]:
    return [n for n in spec.tree if isinstance(n, visitor.Reduce)]


def _extents(spec: KernelSpec) -> dict[str, int]:
    return {t.name: spec.space.extent(t) for t in spec.space.tile}


def test_index_maps_of_the_operands() -> None:
    spec = contract.build(lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k), HEADS, HEADS + 1)
    assert spec.space.sizes == (4, 3, 6, 6, 8)
    loads = [n for n in spec.tree if isinstance(n, visitor.Load)]
    assert loads[0].index == IndexMap((144, 48, 8, 0, 1))
    assert loads[1].index == IndexMap((144, 48, 0, 8, 1))


def test_a_weight_is_updated_in_place() -> None:
    def step(x: Any, dy: Any, w: Any) -> Any:
        return w - 0.1 * jnp.einsum("bsd,bsf->df", x, dy)

    def aliases(function: Callable[..., Any], *arrays: Any) -> tuple[tuple[int, int], ...]:
        jaxpr = contract.group(function, *arrays)
        return donated_aliases(lowering.build(jaxpr, "kernel"), jaxpr, set(jaxpr.invars))

    assert aliases(step, X, Y, W) == ((2, 0),)
    # An operand of the product is read by programs that other tiles belong to.
    assert aliases(lambda x, w: x @ w * 2, SQUARE, SQUARE + 1) == ()
