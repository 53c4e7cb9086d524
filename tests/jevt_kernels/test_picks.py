"""Sums in which one element counts, and masks that a row's stores make again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import codegen, interpreter
from jevt_kernels.mainloops import rowwise
from jevt_kernels.mainloops.picks import SHORTEST, picks
from jevt_kernels.spec import Config

COLUMNS = SHORTEST + 5
WHOLE = Config((("row", 1), ("col", 8192)), 8)
WALKING = Config((("row", 1), ("col", 8192)), 8, num_stages=2, programs=2)
LOOPED = Config((("row", 2), ("col", 2048)), 8)


def hot(x: Any, label: Any) -> Any:
    return label[:, None] == jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)


def chosen(x: Any, label: Any) -> Any:
    return jnp.where(hot(x, label), x, x.dtype.type(0)).sum(1)


def cross_entropy(x: Any, label: Any) -> Any:
    """Loss and gradient."""
    unit = jnp.exp(x - x.max(1, keepdims=True))
    total = unit.sum(1, keepdims=True)
    return (
        jnp.log(total[:, 0]) + x.max(1) - chosen(x, label),
        unit / total - jnp.where(hot(x, label), 1.0, 0.0),
    )


def probability(x: Any, label: Any) -> Any:
    """What is chosen is made of a row's maximum, too."""
    unit = jnp.exp(x - x.max(1, keepdims=True))
    return chosen(unit, label) / unit.sum(1), unit


def chosen_twice(x: Any, label: Any) -> Any:
    return chosen(x, label) * chosen(x * x + 1, label + 1), x - chosen(x, label)[:, None]


def two_axes(x: Any, label: Any) -> Any:
    """The columns are two axes of an array, and the rows its last one."""
    return chosen(x.reshape(3, -1, x.shape[1]).transpose(1, 2, 0).reshape(x.shape), label)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (chosen, cross_entropy, probability, chosen_twice, two_axes)
}


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, np.float16, contract.BFLOAT16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str, dtype: Any) -> None:
    """Of labels that are at both ends of a row, and beyond both."""
    x = contract.random((6, COLUMNS), dtype)
    label = np.array([0, COLUMNS - 1, 77, -1, COLUMNS, 2**31 - 1], np.int32)
    spec = contract.build(FUNCTIONS[name], x, label)
    assert picks(spec) or name == "two_axes"
    expected = [np.asarray(y) for y in contract.referred(spec, x, label)]
    for config in (None, WHOLE, WALKING, LOOPED):
        contract.same(interpreter.run(spec, x, label, config=config), expected)


@pytest.mark.interpret
def test_other_elements_do_not_count() -> None:
    """Infinite ones and NaN elsewhere; a sum of zeros and of -0.0 is 0.0."""
    x = np.zeros((4, COLUMNS), np.float32)
    x[0, 3], x[1, :], x[1, 9], x[2, 9], x[3, 9] = -np.inf, np.nan, 2, -0.0, np.inf
    label = np.full(4, 9, np.int32)
    spec = contract.build(chosen, x, label)
    for config in (WHOLE, LOOPED):
        (got,) = interpreter.run(spec, x, label, config=config)
        np.testing.assert_array_equal(got, [0, 2, 0, np.inf])
        assert not np.signbit(got).any()


@pytest.mark.parametrize("config", [WHOLE, LOOPED], ids=["whole", "looped"])
def test_one_element_is_loaded(config: Config) -> None:
    x = jax.ShapeDtypeStruct((64, COLUMNS), contract.BFLOAT16)
    label = jax.ShapeDtypeStruct((64,), np.int32)
    text = codegen.generate(contract.build(cross_entropy, x, label), config).text
    # Of sums only that of exponentials is left; each loop loads the row, and the pick once more.
    assert text.count("tl.sum(") == 1
    assert text.count("tl.load(x0") == (2 if config is WHOLE else 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, label: jnp.where(hot(x, label), x, np.float32(1)).sum(1),
        lambda x, label: jnp.where(hot(x, label), x, np.float32(-0.0)).sum(1),
        lambda x, label: jnp.where(hot(x, label), np.float32(0), x).sum(1),
        lambda x, label: jnp.where(hot(x, label), x, np.float32(0)).max(1),
        lambda x, label: jnp.where(hot(x, label) | (x > 0), x, np.float32(0)).sum(1),
        lambda x, label: jnp.where(hot(x, label) == (x > 0), x, np.float32(0)).sum(1),
        lambda x, label: jnp.where(hot(x, label).T, x.T, np.float32(0)).sum(1),
        lambda x, label: chosen(x[:, : SHORTEST - 1], label),
    ],
    ids=["ones", "-0.0", "all but one", "maximum", "two masks", "compared masks", "rows", "short"],
)
def test_what_is_no_pick(function: Callable[..., Any]) -> None:
    x = jax.ShapeDtypeStruct((64, COLUMNS), np.float32)
    label = jax.ShapeDtypeStruct((64,), np.int32)
    assert not picks(contract.build(function, x, label))


def by_product(x: Any, label: Any) -> Any:
    """Labels as numbers: x elsewhere counts if it is infinite."""
    unit = jnp.exp(x - x.max(1, keepdims=True))
    mask = hot(x, label)
    return (mask.astype(x.dtype) * x).sum(1), unit / unit.sum(1, keepdims=True) - mask


@pytest.mark.interpret
def test_masks_are_made_again() -> None:
    x = contract.random((2, 30528))
    label = np.array([5, 30527], np.int32)
    spec = contract.build(by_product, x, label)
    config = Config((("row", 1), ("col", rowwise.MAX_WHOLE)), 32)
    assert codegen.generate(spec, config).text.count("dm.opaque(") == 1
    expected = [np.asarray(y) for y in contract.referred(spec, x, label)]
    contract.same(interpreter.run(spec, x, label, config=config), expected)
    once = contract.build(cross_entropy, x, label)
    assert "dm.opaque(" not in codegen.generate(once, config).text
