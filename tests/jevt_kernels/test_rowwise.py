"""Rowwise kernels: normalisations and their gradients, every reduction, long rows, odd rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from jax import lax

from jevt_kernels import codegen, interpreter
from jevt_kernels.mainloops import rowwise
from jevt_kernels.ops import TRITON_TYPES, is_float
from jevt_kernels.spec import Config, UnsupportedKernel

pytestmark = pytest.mark.interpret

X = contract.random((5, 40))
SCALE = contract.random((40,), seed=1)
BIAS = contract.random((40,), seed=2)

#: Several rows a tile, one row a tile, several tiles a program with a ragged last one, the looped
#: form with a ragged last block, and rows in several parts, two of them with a block more.
CONFIGS = (
    None,
    Config((("row", 1), ("col", 64))),
    Config((("row", 2), ("col", 64)), num_stages=3, programs=2),
    Config((("row", 4), ("col", 16))),
    Config((("row", 2), ("col", 8)), splits=3),
)


def layer_norm(x: Any, scale: Any, bias: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * scale + bias


def rms_norm(x: Any, scale: Any) -> Any:
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient by the first argument, given the cotangent last."""

    def pulled_back(x: Any, *rest: Any) -> Any:
        *others, cotangent = rest
        return jax.vjp(lambda x: function(x, *others), x)[1](cotangent)[0]

    return pulled_back


def softmax_of(x: Any) -> Any:
    return jax.nn.softmax(x)


def softmax_gradient(x: Any, dy: Any) -> Any:
    """Given the scores, as the passes write it: two sums that one pass makes."""
    unit = jnp.exp(x - x.max(1, keepdims=True))
    total = unit.sum(1, keepdims=True)
    return unit / total * (dy - (unit * dy).sum(1, keepdims=True) / total)


def cross_entropy(logits: Any, one_hot: Any) -> Any:
    return -(jax.nn.log_softmax(logits) * one_hot).sum(-1)


def of_itself(value: Any, x: Any) -> Any:
    """A reduction of a value that varies along fewer axes than it has, beside its use in full."""
    return value.sum(1)[:, None] + value * x


def soft_cross_entropy(logits: Any, labels: Any) -> Any:
    """A sum a row of labels that are a distribution, and the gradient of all of them."""
    log_softmax = jax.nn.log_softmax(logits)
    k = labels.sum(-1, keepdims=True)
    return (labels * log_softmax).sum(-1), jnp.exp(log_softmax) * k - labels


def same_along_rows(x: Any, b: Any) -> Any:
    return of_itself(jnp.broadcast_to(b * b, x.shape), x)


def same_along_columns(x: Any, c: Any) -> Any:
    return of_itself(jnp.broadcast_to((c * c)[:, None], x.shape), x) * x.max(1)[:, None]


ROWS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "softmax": (jax.nn.softmax, (X,)),
    "softmax, gradient": (gradient(jax.nn.softmax), (X, X[::-1].copy())),
    "log_softmax": (jax.nn.log_softmax, (X,)),
    "log_softmax, gradient": (gradient(jax.nn.log_softmax), (X, X[::-1].copy())),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=-1), (X,)),
    "layer norm": (layer_norm, (X, SCALE, BIAS)),
    "layer norm, gradient": (gradient(layer_norm), (X, SCALE, BIAS, X[::-1].copy())),
    "RMS norm": (rms_norm, (X, SCALE)),
    "RMS norm, gradient": (gradient(rms_norm), (X, SCALE, X[::-1].copy())),
    "cross entropy": (cross_entropy, (X, (X.max(-1, keepdims=True) == X).astype(np.float32))),
    "cross entropy of soft labels": (soft_cross_entropy, (X, np.square(X[::-1]))),
    "statistics": (lambda x: (x.sum(1), x.max(1), x.min(1), jnp.square(x).sum(1)), (X,)),
    "row and full outputs": (lambda x: (x - x.mean(1, keepdims=True), x.mean(1)), (X,)),
    "same along rows": (same_along_rows, (X, SCALE)),
    "same along columns": (same_along_columns, (X, SCALE[:5])),
    "constant": (lambda x: of_itself(jnp.full((5, 40), 0.5), x), (X,)),
    "iota": (lambda x: (x * lax.broadcasted_iota(np.float32, x.shape, 1)).sum(1), (X,)),
    "two trailing axes": (
        lambda x: (
            x - x.reshape(5, 5, 8).mean((1, 2))[:, None] + x.reshape(5, 5, 8).max((1, 2))[:, None]
        ),
        (X,),
    ),
    "axes apart": (lambda x: x.sum((0, 2)), (X.reshape(5, 5, 8),)),
    "permuted axes": (lambda x: x.transpose(1, 0, 2).sum((1, 2)), (X.reshape(5, 5, 8),)),
    "everything": (lambda x: x.sum() + x.max() * x.min(), (X,)),
    "size 1": (lambda x: x.sum(1) + x[:, 0], (X[:, :1],)),
    "attention mask": (
        lambda x, m: jax.nn.softmax(jnp.where(m[None, :], x, -1e9)),
        (X, SCALE > 0),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_in_every_form(name: str) -> None:
    function, arrays = ROWS[name]
    configs: list[Config | None] = [None]
    spec = contract.build(function, *arrays)
    if spec.mainloop == "rowwise":
        configs += [*CONFIGS, *rowwise.configs(spec)]
    contract.check(function, *arrays, configs=dict.fromkeys(configs))


@pytest.mark.parametrize("dtype", [np.float16, contract.BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["softmax", "layer norm", "RMS norm, gradient", "statistics"])
def test_half_precision(name: str, dtype: Any) -> None:
    """Inputs and outputs are rounded, nothing between."""
    function, arrays = ROWS[name]
    halves = [a.astype(dtype) for a in arrays]
    spec = contract.build(function, *halves)
    exact = jax.jit(function)(*(a.astype(np.float32) for a in halves))
    for config in CONFIGS:
        for got, want in zip(
            interpreter.run(spec, *halves, config=config), jax.tree.leaves(exact), strict=True
        ):
            assert got.dtype == dtype
            error = np.linalg.norm(got.astype(np.float32) - want) / np.linalg.norm(want)
            assert error < (5e-3 if dtype == contract.BFLOAT16 else 6e-4)


def both(x: Any) -> Any:
    return jax.nn.softmax(x), jax.nn.logsumexp(x, axis=1)


@pytest.mark.parametrize("dtype", [np.float32, contract.BFLOAT16, np.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 1000, 30528])
def test_lengths(columns: int, dtype: Any) -> None:
    """Rows that are held on chip."""
    x = contract.random((1 if columns > 1000 else 3, columns), dtype)
    spec = contract.build(softmax_of, x)
    expected = np.asarray(jax.nn.softmax(x.astype(np.float32))).astype(dtype)
    contract.same(interpreter.run(spec, x), [expected])
    source = codegen.generate(spec)
    assert source.stages is None and "for start in range" not in source.text


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(131072, contract.BFLOAT16), (670208, np.float16), (1000000, np.float32)],
    ids=str,
)
def test_long_rows(columns: int, dtype: Any) -> None:
    """In a loop, in two parts (the interpreter takes a while for each maximum), as preferred."""
    x = contract.random((1, columns), dtype)
    wide = x.astype(np.float32)
    logsumexp = contract.build(lambda x: jax.nn.logsumexp(x, axis=1), x)
    expected = [np.asarray(jax.nn.logsumexp(wide, axis=1)).astype(dtype)]
    block = (("row", 1), ("col", 4096))
    for config in (Config(block), Config(block, splits=2)):
        contract.same(interpreter.run(logsumexp, x, config=config), expected)
    total = contract.build(lambda x: (x.sum(1), jnp.square(x).sum(1)), x)
    assert codegen.generate(total).stages is not None
    exact = wide.astype(np.float64)
    with np.errstate(over="ignore"):  # the squares are too many for a float16
        sums = [exact.sum(1).astype(dtype), np.square(exact).sum(1).astype(dtype)]
    contract.same(interpreter.run(total, x), sums, tolerance=1e-3)


@pytest.mark.parametrize(
    ("function", "loops"),
    [
        (soft_cross_entropy, 2),  # the loss is summed up where the gradient is stored
        (lambda x, y: (x - (x * y).max(1, keepdims=True), y.sum(1)), 2),  # waits for a maximum
        (lambda x, y: (x * y, y.sum(1)), 1),
        (lambda x, y: (x * y).sum(1), 1),
    ],
)
def test_the_last_pass_stores_what_does_not_wait_for_it(
    function: Callable[..., Any], loops: int
) -> None:
    x, y = contract.random((3, 40)), contract.random((3, 40), seed=1)
    config = Config((("row", 1), ("col", 16)))
    source = codegen.generate(contract.build(function, x, y), config).text
    assert source.count("for start in range") == loops
    contract.check(function, x, y, configs=(config,))


def test_softmax_in_a_loop_or_in_parts() -> None:
    x = contract.random((2, 40000))
    block = (("row", 1), ("col", 4096))
    contract.check(both, x, configs=(Config(block), Config(block, splits=2)))
    rows = jax.ShapeDtypeStruct((rowwise.FEW_ROWS, 40000), x.dtype)
    source = codegen.generate(contract.build(both, rows))
    assert source.stages is None and "for start in range" in source.text


@pytest.mark.parametrize(
    ("name", "dtype", "walks"),
    [
        ("layer norm, gradient", contract.BFLOAT16, True),
        ("layer norm, gradient", np.float32, False),
        ("softmax", contract.BFLOAT16, False),
    ],
)
def test_loads_are_issued_ahead_where_few_blocks_fit(name: str, dtype: Any, walks: bool) -> None:
    function, arrays = ROWS[name]
    shapes = [(16384, 1024) if a.ndim == 2 else (1024,) for a in arrays]
    with contract.types_of(*arrays):
        spec = contract.build(function, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes))
    text = codegen.generate(spec).text
    assert ("in tl.range(pid, 16384, 1056, num_stages=" in text) == walks


def logsumexp(x: Any) -> Any:
    return jax.nn.logsumexp(x, axis=-1)


def two_sums(x: Any) -> Any:
    """The gradient of a cross entropy with a z-loss: the exponentials of two softmaxes."""
    return jax.nn.softmax(x) + 2 * logsumexp(x)[:, None] * jnp.exp(x - logsumexp(x)[:, None])


def weighted(x: Any, y: Any) -> Any:
    """Two operands, of whose gradient's loop three values are alive, and a sum of a full tile."""
    log_softmax = jax.nn.log_softmax(x)
    return (y * log_softmax).sum(-1), jnp.exp(log_softmax) * y.sum(-1, keepdims=True) - y


WALKING = Config((("row", 1), ("col", 32768)), 32, 3, 528)


@pytest.mark.parametrize(
    ("function", "operands", "columns", "dtype", "first"),
    [
        (softmax_of, 1, 30528, contract.BFLOAT16, (8192, 16)),
        (softmax_of, 1, 20480, contract.BFLOAT16, (4096, 16)),
        (softmax_of, 1, 50304, contract.BFLOAT16, (8192, 32)),
        (softmax_of, 1, 30528, np.float32, (32768, 32)),
        (logsumexp, 1, 30528, contract.BFLOAT16, (32768, 32)),
        (two_sums, 1, 30528, contract.BFLOAT16, (4096, 16)),
        (softmax_gradient, 2, 30528, contract.BFLOAT16, (8192, 32)),
        (weighted, 2, 30528, contract.BFLOAT16, (8192, 16)),
        (rms_norm, 2, 30528, contract.BFLOAT16, (32768, 32)),
    ],
    ids=[
        "three rows under way",
        "a tile that ends with the row",
        "two rows are kept",
        "wide elements",
        "read once",
        "two values are alive",
        "two operands, two rows are kept",
        "four values are alive, two rows are kept",
        "as many rows as loops",
    ],
)
def test_the_widest_rows(
    function: Callable[..., Any], operands: int, columns: int, dtype: Any, first: tuple[int, int]
) -> None:
    """Columns and warps: most elements under way, of rows that the L2 cache keeps."""
    rows = jax.ShapeDtypeStruct((4096, columns), dtype)
    vector = jax.ShapeDtypeStruct((columns,), dtype)
    arguments = (rows, vector if function is rms_norm else rows)[:operands]
    config = codegen.generate(contract.build(function, *arguments)).config
    assert (config.block("col"), config.num_warps) == first


def test_rows_of_a_multiprocessor_load_the_next_ones() -> None:
    """Unless there are few."""
    for rows, walks in ((4096, True), (132, False)):
        x = jax.ShapeDtypeStruct((rows, 30528), contract.BFLOAT16)
        config = codegen.generate(contract.build(logsumexp, x)).config
        assert config == (
            WALKING if walks else dataclasses.replace(WALKING, programs=0, num_stages=1)
        )


def test_few_rows_are_held() -> None:
    """Of rows that are not enough for loops to have several on each multiprocessor."""
    for rows, held in ((132, True), (264, True), (600, False)):
        x = jax.ShapeDtypeStruct((rows, 30528), contract.BFLOAT16)
        config = codegen.generate(contract.build(softmax_of, x)).config
        assert (config.block("col") == 32768) == held


@pytest.mark.parametrize(
    ("rows", "columns", "function", "operands", "again"),
    [
        (4096, 30528, softmax_gradient, 2, 0.0),
        (1024, 131072, softmax_of, 1, 0.0),
        (1024, 131072, softmax_gradient, 2, 0.4545),
        (40, 131072, softmax_of, 1, 1.0),
        (1024, 131072, lambda x: x.sum(1), 1, 0.0),
    ],
    ids=["whole", "kept", "half of it kept", "in parts", "once"],
)
def test_what_is_read_again_from_memory(
    rows: int, columns: int, function: Callable[..., Any], operands: int, again: float
) -> None:
    """Not what the L2 cache keeps: 36 MiB of the rows that 132 blocks walk through."""
    x = jax.ShapeDtypeStruct((rows, columns), contract.BFLOAT16)
    spec = contract.build(function, *[x] * operands)
    moved, launches = rowwise.traffic(spec)
    read = 2 * rows * columns * operands
    once = sum(operand.nbytes for operand in (*spec.inputs, *spec.outputs))
    assert moved - once == pytest.approx(again * read, rel=2e-3)
    assert launches == (2 if rows < rowwise.FEW_ROWS else 1)


def test_fewer_long_rows_under_way_are_offered() -> None:
    """Of which each program walks as many, and fewer so that the L2 cache keeps them."""
    x = jax.ShapeDtypeStruct((1024, 131072), contract.BFLOAT16)
    configs = rowwise.configs(contract.build(softmax_gradient, x, x))
    assert len(set(configs)) == len(configs)
    assert configs[0].programs == 132
    assert {c.programs for c in configs} == {132, 128, 94, 64, 0}
    assert {c.num_stages for c in configs if c.programs == 64} == {1, 2, 3}
    few = jax.ShapeDtypeStruct((8, 131072), contract.BFLOAT16)
    assert {c.programs for c in rowwise.configs(contract.build(softmax_of, few))} == {132, 0}


def test_what_does_not_vary_along_rows_is_loaded_once() -> None:
    config = Config((("row", 1), ("col", 64)), num_stages=3, programs=2)
    text = codegen.generate(contract.build(layer_norm, X, SCALE, BIAS), config).text
    before, _, loop = text.partition("for block")
    assert before.count("tl.load") == 2
    assert loop.count("tl.load") == 1


def test_many_rows() -> None:
    x = contract.random((301, 3))
    contract.check(jax.nn.softmax, x, configs=(None, Config((("row", 64), ("col", 4)))))


EDGES = np.array(
    [
        [np.nan, 1, 2, 3],
        [np.inf, 1, 2, 3],
        [-np.inf, 1, 2, 3],
        [np.inf, -np.inf, 0, 1],
        [-np.inf, -np.inf, -np.inf, -np.inf],
        [0, -0.0, 0, 0],
        [1e38, 1e38, 1e38, 1e38],
        [1, 2, 3, np.nan],
        [-1, -2, -3, -4],
    ],
    np.float32,
)


@pytest.mark.parametrize(
    "config",
    [
        None,
        Config((("row", 2), ("col", 2))),
        Config((("row", 1), ("col", 1))),
        Config((("row", 2), ("col", 1)), splits=2),
        Config((("row", 4), ("col", 2)), splits=2),
    ],
)
@pytest.mark.parametrize("columns", [3, 4])
def test_infinities_and_nan(columns: int, config: Config | None) -> None:
    """In a masked tile and in a full one; the identity must not leak."""

    def everything(x: Any) -> Any:
        softmax, logsumexp = jax.nn.softmax(x), jax.nn.logsumexp(x, axis=1)
        over = x > x.max(1)[:, None]
        return x.sum(1), x.max(1), x.min(1), x.prod(1), softmax, logsumexp, over

    contract.check(everything, EDGES[:, :columns].copy(), configs=(config,))


@pytest.mark.parametrize("name", ["log_softmax", "layer norm", "RMS norm"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_norms_of_infinities_and_nan(name: str, *, backward: bool) -> None:
    """As ``jax.jit`` has them, in rows that are held, walked through, or in parts."""
    function, arrays = ROWS[f"{name}, gradient" if backward else name]
    count = len(arrays) - 1 - backward
    rows = EDGES.copy()
    rows[6] = [1e15, -1e15, 2e15, 0]  # squares of 1e38 are infinite in one order of sums only
    vectors = [np.ones(4, np.float32) * 2, np.zeros(4, np.float32)][:count]
    cotangent = [np.arange(36, dtype=np.float32).reshape(9, 4)] * backward
    parts = Config((("row", 2), ("col", 1)), splits=2)
    configs = (None, Config((("row", 2), ("col", 2))), parts)
    contract.check(function, rows, *vectors, *cotangent, configs=configs)


@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("op", ["sum", "prod", "max", "min"])
def test_reductions(op: str, dtype: np.dtype) -> None:
    if dtype == np.dtype(bool) and op in ("sum", "prod"):
        pytest.skip("JAX converts booleans before it adds them")
    x = contract.random((5, 13), dtype)
    if is_float(dtype):
        x = (np.abs(x.astype(np.float64)) + 0.5).astype(dtype)
    spec = contract.reduction(op, dtype, 5, 13)
    wide = x.astype(np.float64) if is_float(dtype) else x
    expected = getattr(wide, op)(1, **({} if op in ("max", "min") else {"dtype": wide.dtype}))
    with contract.types_of(x), np.errstate(over="ignore"):
        expected = expected.astype(dtype)
        contract.same(contract.referred(spec, x), [expected])
    for config in (None, Config((("row", 2), ("col", 4)))):
        contract.same(interpreter.run(spec, x, config=config), [expected])


@pytest.mark.parametrize("op", ["and", "or"])
def test_boolean_reductions(op: str) -> None:
    x = np.array([[True] * 13, [False] * 13, [True] * 12 + [False], [False] * 12 + [True]])
    spec = contract.reduction(op, np.dtype(bool), 4, 13)
    expected = x.all(1) if op == "and" else x.any(1)
    contract.same(contract.referred(spec, x), [expected])
    for config in (None, Config((("row", 2), ("col", 4)))):
        contract.same(interpreter.run(spec, x, config=config), [expected])


def test_all_and_any_of_a_comparison() -> None:
    contract.check(lambda x: ((x > 0).all(1), (x > 2).any(1), jnp.isfinite(x).all(1)), X)


def test_wide_sums_keep_their_width() -> None:
    x = contract.random((3, 50), np.int64)
    contract.check(lambda x: x.sum(1) + x.max(1), x)
    contract.check(lambda x: jnp.square(x).sum(1), contract.random((3, 50), np.float64))


def test_unknown_reduction_is_named() -> None:
    with pytest.raises(UnsupportedKernel, match="expected a reduction sum.*got 'xor'"):
        codegen.generate(contract.reduction("xor", np.dtype("int32"), 4, 8))
