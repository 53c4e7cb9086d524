"""Passes over a row: a softmax's sum in the pass of its maximum, and what is not one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import codegen, interpreter
from jevt_kernels.mainloops.passes import passes
from jevt_kernels.spec import Config

X = contract.random((3, 40))
W = contract.random((3, 40), seed=1)
KEEP = W > -1.5
LOOPED = Config((("row", 2), ("col", 16)))
SPLIT = Config((("row", 2), ("col", 8)), splits=2)


def exponential(x: Any) -> Any:
    return jnp.exp(x - x.max(1, keepdims=True))


def entropy(x: Any) -> Any:
    """Of the softmax, by sums relative to one maximum; and a logsumexp."""
    most = x.max(1, keepdims=True)
    e = jnp.exp(x - most)
    total = e.sum(1)
    return jnp.log(total) + most[:, 0] - (e * x).sum(1) / total


def z_loss(x: Any) -> Any:
    z = jax.nn.logsumexp(x, axis=1)
    return z + 1e-4 * z * z


def powers_of_two(x: Any) -> Any:
    most = x.max(1, keepdims=True)
    return jnp.log2(jnp.exp2(x - most).sum(1)) + most[:, 0]


def masked(x: Any, keep: Any) -> Any:
    x = jnp.where(keep, x, -jnp.inf)
    return jnp.where(keep, exponential(x), 0).sum(1)


def scaled_sum(x: Any, w: Any) -> Any:
    """Linear in the exponential in every way."""
    e = exponential(x)
    return (-e * w - jnp.where(w > 0, e, 0) / 3 + w * (e + e)).sum(1)


ONE_PASS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=1), (X,)),
    "in bfloat16": (lambda x: jax.nn.logsumexp(x, axis=1), (X.astype(contract.BFLOAT16),)),
    "in float64": (lambda x: jax.nn.logsumexp(x, axis=1), (X.astype(np.float64),)),
    "z loss": (z_loss, (X,)),
    "entropy": (entropy, (X,)),
    "powers of two": (powers_of_two, (X,)),
    "masked": (masked, (X, KEEP)),
    "linear": (scaled_sum, (X, W)),
    "a sum beside": (lambda x, w: (jax.nn.logsumexp(x, axis=1), (x * w).sum(1)), (X, W)),
    "of two tensors": (
        lambda x, w: jax.nn.logsumexp(x, axis=1) - jax.nn.logsumexp(x * w, axis=1),
        (X, W),
    ),
    "of a sum of two": (lambda x, w: jax.nn.logsumexp(x + w, axis=1), (X, W)),
}

#: What needs the maximum first, and the number of passes.
MORE: dict[str, tuple[int, Callable[..., Any], tuple[Any, ...]]] = {
    "less something": (2, lambda x, w: exponential(x * w).sum(1) + exponential(x).max(1), (X, W)),
    "of another's maximum": (2, lambda x, w: jnp.exp(x - (x * w).max(1)[:, None]).sum(1), (X, W)),
    "less a minimum": (2, lambda x: jnp.exp(x.min(1)[:, None] - x).sum(1), (X,)),
    "squared": (2, lambda x: jnp.square(exponential(x)).sum(1), (X,)),
    "one more": (2, lambda x: (1 + exponential(x)).sum(1), (X,)),
    "a mask's other case": (2, lambda x: jnp.where(x > 0, exponential(x), x).sum(1), (X,)),
    "a product with the rest": (
        2,
        lambda x: (exponential(x) * (x - x.max(1, keepdims=True))).sum(1),
        (X,),
    ),
    "variance": (2, lambda x: jnp.square(x - x.mean(1)[:, None]).sum(1), (X,)),
    "a softmax's own sum": (2, lambda x: jax.nn.softmax(x).max(1), (X,)),
}


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass(name: str) -> None:
    function, arrays = ONE_PASS[name]
    with contract.types_of(*arrays):
        spec = contract.build(function, *arrays)
    found = passes(spec)
    assert len(found.of) == 1 and found.online
    text = codegen.generate(spec, LOOPED).text
    assert text.count("for start in range") == 1
    assert text.count("tl.load") == len(arrays)


@pytest.mark.parametrize("name", MORE)
def test_more_passes(name: str) -> None:
    count, function, arrays = MORE[name]
    found = passes(contract.build(function, *arrays))
    assert len(found.of) == count


@pytest.mark.interpret
@pytest.mark.parametrize("name", [*ONE_PASS, *MORE])
def test_values(name: str) -> None:
    function, arrays = ONE_PASS.get(name) or MORE[name][1:]
    contract.check(function, *arrays, configs=(LOOPED, SPLIT))


@pytest.mark.parametrize(
    ("function", "loads"),
    [
        (jax.nn.softmax, 2),
        (jax.nn.log_softmax, 2),
        (lambda x: x - x.mean(1, keepdims=True), 2),
        (lambda x: jax.nn.standardize(x, axis=1, variance=x.var(1, keepdims=True)), 3),
    ],
)
def test_reads_of_a_looped_row(function: Callable[..., Any], loads: int) -> None:
    """Softmax reads a row twice, not three times; a variance about the mean costs a pass."""
    text = codegen.generate(contract.build(function, X), LOOPED).text
    assert text.count("tl.load(x0") == loads


@pytest.mark.interpret
def test_rising_and_falling_rows() -> None:
    """The maximum grows in each step, or never; a weight may be what makes a sum infinite."""
    rising = np.arange(120, dtype=np.float32).reshape(1, 120) * 3
    x = np.concatenate([rising, rising[:, ::-1], rising * 0 - 1e38, rising * 0 + 3e38])
    for config in (LOOPED, SPLIT):
        contract.check(lambda x: jax.nn.logsumexp(x, axis=1), x, configs=(config,))


@pytest.mark.interpret
def test_bfloat16_extremes() -> None:
    """Its largest numbers and its smallest: what float32 arithmetic makes of them."""
    largest = float(jnp.finfo(jnp.bfloat16).max)
    tiny = float(jnp.finfo(jnp.bfloat16).smallest_subnormal)
    rows = [[largest, -largest, tiny, 0], [largest] * 4, [-largest] * 4, [tiny, 0, -tiny, 0]]
    x = np.array(rows, np.float32).astype(contract.BFLOAT16)

    def function(x: Any) -> Any:
        return jax.nn.softmax(x), jax.nn.log_softmax(x), jax.nn.logsumexp(x, axis=1)

    spec = contract.build(function, x)
    expected = [np.asarray(y) for y in jax.jit(function)(x.astype(np.float32))]
    for config in (
        None,
        Config((("row", 2), ("col", 2))),
        Config((("row", 1), ("col", 1)), splits=3),
    ):
        got = interpreter.run(spec, x, config=config)
        contract.same([g.astype(np.float32) for g in got], expected, tolerance=8e-3)
