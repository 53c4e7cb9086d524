"""What is alive in the loops over a row, and sums beside those of a softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import codegen, interpreter
from jevt_kernels.mainloops.loops import alive, loops
from jevt_kernels.spec import Config


def softmax(x: Any) -> Any:
    return jax.nn.softmax(x)


def softmax_gradient(x: Any, dy: Any) -> Any:
    unit = jnp.exp(x - x.max(1, keepdims=True))
    total = unit.sum(1, keepdims=True)
    return unit / total * (dy - (unit * dy).sum(1, keepdims=True) / total)


def weighted(x: Any, y: Any) -> Any:
    """A sum beside the softmax's, and one of a full tile beside the stores."""
    log_softmax = jax.nn.log_softmax(x)
    return (y * log_softmax).sum(1), jnp.exp(log_softmax) * y.sum(1, keepdims=True) - y


def hot(x: Any, label: Any) -> Any:
    """Half of a row, by its number: what is made of positions is made where it is used."""
    mask = jnp.arange(x.shape[1]) < label[:, None]
    return jnp.where(mask, 2.0, 1.0) * (x - x.mean(1, keepdims=True))


@pytest.mark.parametrize(
    ("function", "operands", "values", "tiles"),
    [
        (softmax, "x", 1, 1),
        (hot, "xi", 2, 2),
        (softmax_gradient, "xx", 2, 2),
        (weighted, "xx", 4, 3),
        (lambda x: x.sum(1), "x", 2, 2),
    ],
    ids=["softmax", "hot", "softmax, gradient", "weighted", "sum"],
)
def test_values_alive(function: Callable[..., Any], operands: str, values: int, tiles: int) -> None:
    full = jax.ShapeDtypeStruct((8, 5000), contract.BFLOAT16)
    row = jax.ShapeDtypeStruct((8,), np.int32)
    spec = contract.build(function, *(row if o == "i" else full for o in operands))
    assert alive(spec) == values
    assert loops(spec).tiles == tiles


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, contract.BFLOAT16], ids=str)
@pytest.mark.parametrize("columns", [4096, 5001])
def test_sums_beside_a_softmax_are_in_groups(dtype: Any, columns: int) -> None:
    """Of as many neighbouring columns as a thread loads at once."""
    x = contract.random((3, columns), dtype)
    y = np.abs(x[::-1])
    config = Config((("row", 1), ("col", 2048)), 4)
    spec = contract.build(weighted, x, y)
    exact = jax.jit(weighted)(x.astype(np.float32), y.astype(np.float32))
    expected = [np.asarray(value).astype(dtype) for value in exact]
    contract.same(interpreter.run(spec, x, y, config=config), expected)
    loop = codegen.generate(spec, config).text.split("for start")[1]
    assert loop.count("dm.group_sums(") == 2
    assert f", {16 // x.dtype.itemsize})" in loop


def test_sums_alone_are_not_in_groups() -> None:
    x = jax.ShapeDtypeStruct((3, 5000), np.float32)
    config = Config((("row", 1), ("col", 2048)), 4)
    assert "group" not in codegen.generate(contract.build(lambda x: x.sum(1), x), config).text
