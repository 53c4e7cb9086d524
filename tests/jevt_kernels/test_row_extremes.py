"""Softmax, norms and cross entropy: rows of every length, and every number that is not ordinary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from jax import lax

from jevt_kernels import aot, codegen, interpreter
from jevt_kernels.mainloops import rowwise
from jevt_kernels.spec import Config

BFLOAT16 = contract.BFLOAT16


def softmax(x: Any) -> Any:
    return jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype)


def softmax_gradient(x: Any, dy: Any) -> Any:
    return jax.vjp(softmax, x)[1](dy)[0]


def layer_norm(x: Any) -> Any:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((wide - mean) * lax.rsqrt(variance + 1e-5)).astype(x.dtype)


def layer_norm_gradient(x: Any, dy: Any) -> Any:
    return jax.vjp(layer_norm, x)[1](dy)[0]


def rms_norm(x: Any) -> Any:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def cross_entropy(x: Any, labels: Any) -> Any:
    """The loss of each row, labels a distribution, and the gradient of all of them."""

    def losses(x: Any) -> Any:
        log_softmax = jax.nn.log_softmax(x.astype(jnp.float32))
        return -(labels.astype(jnp.float32) * log_softmax).sum(-1)

    values, pulled_back = jax.vjp(losses, x)
    return values, pulled_back(jnp.ones_like(values))[0]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": softmax,
    "softmax, gradient": softmax_gradient,
    "layer norm": layer_norm,
    "layer norm, gradient": layer_norm_gradient,
    "RMS norm": rms_norm,
    "cross entropy": cross_entropy,
}
TWO = ("softmax, gradient", "layer norm, gradient", "cross entropy")

#: Of the longest, which take the interpreter seconds, one of each kind.
LENGTHS = (
    *((name, columns) for name in FUNCTIONS for columns in (1, 7, 1000, 30528, 131072)),
    *((name, 670208) for name in ("softmax", "layer norm", "cross entropy")),
)


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "columns"), LENGTHS)
def test_lengths(name: str, columns: int) -> None:
    """As preferred, and in a loop instead of parts; rounded once, at the end."""
    function = FUNCTIONS[name]
    shape = (3 if columns <= 1000 else 1, columns)
    arrays = [contract.random(shape, BFLOAT16, seed=seed) for seed in range(1 + (name in TWO))]
    if name == "cross entropy":
        arrays[1] = softmax(arrays[1])
    spec = contract.build(function, *arrays)
    wide = [np.asarray(a, np.float32) for a in arrays]
    expected = [np.asarray(y) for y in jax.tree.leaves(jax.jit(function)(*wide))]
    configs: list[Config | None] = [None]
    if columns > rowwise.MAX_WHOLE:
        assert codegen.generate(spec).stages is not None
    if columns == 131072:
        configs.append(Config((("row", 1), ("col", 8192)), 16))
    for config in configs:
        results = interpreter.run(spec, *map(np.asarray, arrays), config=config)
        rounded = [y.astype(x.dtype) for x, y in zip(results, expected, strict=True)]
        contract.same(results, rounded)


def extremes() -> np.ndarray:
    """Rows of 300: infinities and NaN alone, among others, and the largest and smallest numbers."""
    rows = np.array(contract.random((10, 300)))
    rows[1] = -np.inf
    rows[2] = np.inf
    rows[3, 290] = np.nan
    rows[4, 7] = np.inf
    rows[5, :256], rows[5, 256:] = -np.inf, -200  # a tile without a number before a very small one
    rows[6] = 3.38e38
    rows[7] = 1e-38
    rows[8] = -3.38e38
    rows[9, :299], rows[9, 299] = -np.inf, 0
    return rows


#: Held; in tiles of which a thread has one number, or the eight that it loads at once; the same of
#: parts of rows; and blocks that walk the rows.
FORMS = {
    "held": None,
    "looped": Config((("row", 2), ("col", 64))),
    "in groups": Config((("row", 1), ("col", 256)), num_warps=1),
    "two rows in groups": Config((("row", 2), ("col", 128)), num_warps=1),
    "parts in groups": Config((("row", 1), ("col", 256)), num_warps=1, splits=2),
    "walking": Config((("row", 1), ("col", 256)), num_warps=1, programs=3),
}


@pytest.mark.interpret
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        jax.nn.softmax,
        jax.nn.log_softmax,
        lambda x: jax.nn.logsumexp(x, axis=1),
        lambda x: jnp.exp2(x - x.max(1, keepdims=True)).sum(1),
        lambda x: (jax.nn.softmax(x.astype(jnp.float32)) * jnp.arange(300.0)).sum(1),
        layer_norm,
        rms_norm,
    ],
    ids=["softmax", "log_softmax", "logsumexp", "exp2", "weighted", "layer norm", "RMS norm"],
)
def test_extremes(function: Callable[..., Any], dtype: Any, form: str) -> None:
    contract.check(function, extremes().astype(dtype), configs=(FORMS[form],))


@pytest.mark.parametrize(
    ("dtype", "warps", "group"),
    [(np.float32, 1, 4), (BFLOAT16, 1, 8), (BFLOAT16, 2, 1), (np.float64, 1, 2)],
    ids=str,
)
def test_sums_are_scaled_once_a_group(dtype: Any, warps: int, group: int) -> None:
    """Groups are what a thread loads at once, if it has so many of a tile."""
    with contract.types_of(np.empty(0, dtype)):
        spec = contract.build(jax.nn.softmax, jax.ShapeDtypeStruct((4, 300), dtype))
    text = codegen.generate(spec, Config((("row", 1), ("col", 256)), num_warps=warps)).text
    assert text.count(f"BLOCK_COL // {group})") == (2 if group > 1 else 0)
    assert ("dm.grouped_exp(" in text) == (group > 1)
    assert ("dm.online_exp(" in text) == (group == 1)


def test_what_is_read_again_stays_in_the_cache() -> None:
    """The last loop, and what only one reads, leave room; every other loop goes backwards."""

    def function(x: Any, y: Any, z: Any) -> Any:
        return jax.nn.softmax(x + y) * z

    config = Config((("row", 1), ("col", 256)))
    text = codegen.generate(contract.build(function, *[extremes()] * 3), config).text
    first, last = text.split("for start in range")[1:]
    assert first.count("evict_last") == 2
    assert "evict_first" not in first
    assert last.count("evict_first") == 4  # three loads and the store
    assert "col = start +" in first
    assert "col = 256 - start +" in last
    once = codegen.generate(contract.build(lambda x: x.sum(1), extremes()), config).text
    assert "evict" not in once


@pytest.mark.parametrize(
    ("columns", "dtype", "config"),
    [
        (40000, BFLOAT16, Config((("row", 1), ("col", 8192)), 16)),
        (131072, BFLOAT16, Config((("row", 1), ("col", 16384)), 32, programs=132)),
        (131072, np.float32, Config((("row", 1), ("col", 8192)), 32, programs=132)),
    ],
)
def test_rows_under_way_fit_into_the_cache(columns: int, dtype: Any, config: Config) -> None:
    rows = jax.ShapeDtypeStruct((1024, columns), dtype)
    assert codegen.generate(contract.build(softmax, rows)).config == config
    # What is read once has nothing to keep, and many sums leave no registers for large tiles.
    sums = contract.build(lambda x: x.astype(jnp.float32).sum(1), rows)
    several = contract.build(layer_norm_gradient, rows, rows)
    for spec in (sums, several):
        assert codegen.generate(spec).config.block("col") == 4096


@pytest.mark.aot
@pytest.mark.parametrize("columns", [50000, 131072])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["softmax", "softmax, gradient", "cross entropy"])
def test_nothing_is_spilled(name: str, dtype: Any, columns: int) -> None:
    rows = [jax.ShapeDtypeStruct((1024, columns), dtype)] * (1 + (name in TWO))
    binary = aot.compile(contract.build(FUNCTIONS[name], *rows), 90)
    assert binary.spill_bytes == 0
