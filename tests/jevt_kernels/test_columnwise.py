"""Columnwise kernels: sums along rows beside full and rowwise outputs, in two stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import kernel_contract as contract
import kernel_gallery as gallery
import numpy as np
import pytest

from jevt_kernels.mainloops import columnwise
from jevt_kernels.spec import Config

pytestmark = pytest.mark.interpret

X = contract.random((37, 20))
Y = contract.random((37, 20), seed=1)
ROWS = contract.random((37,), seed=2)
COLUMNS = contract.random((20,), seed=3)


def statistics(x: Any) -> Any:
    return x.sum(0), jnp.square(x).sum(0), x.max(0), x.min(0)


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "statistics": (statistics, (X,)),
    "bias gradient": (gallery.bias_gradient, (X, Y)),
    "layer norm gradients": (gallery.layer_norm_all_gradients, (X, ROWS, ROWS + 3, COLUMNS, Y)),
    "several leading axes": (lambda x: (x * 2, x.sum((0, 1))), (X.reshape(37, 4, 5),)),
    "logical": (lambda x: ((x > 2).any(0), (x > -3).all(0)), (X,)),
    "a column's factor inside": (lambda x, c: (x * (c * c)).sum(0), (X, COLUMNS)),
    "one column block more": (statistics, (contract.random((9, 130)),)),
    "one row": (lambda x: (x + 1, (x + 1).sum(0)), (X[:1],)),
}


@pytest.mark.parametrize("name", CASES)
def test_in_every_configuration(name: str) -> None:
    function, arrays = CASES[name]
    spec = contract.build(function, *arrays)
    configs: list[Config | None] = [None]
    if spec.mainloop == "columnwise":
        whole = name == "layer norm gradients"
        configs += columnwise.configs(spec)
        configs.append(Config((("row", 4), ("col", 32 if whole else 8))))
    else:
        assert name == "one row"
    contract.check(function, *arrays, configs=dict.fromkeys(configs))


@pytest.mark.parametrize("config", [None, Config((("row", 2), ("col", 2)))])
def test_infinities_and_nan(config: Config | None) -> None:
    """The identity beyond the last row must not leak, nor hide a NaN."""
    x = np.array([[np.nan, np.inf, -np.inf, -1, 1e38]] * 2 + [[1, -np.inf, -np.inf, -2, 1e38]])
    x = np.concatenate([x, x, x[:1]]).astype(np.float32)
    with np.errstate(all="ignore"):  # NumPy does the second stage
        contract.check(lambda x: (x.sum(0), x.max(0), x.min(0)), x, configs=(config,))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64], ids=str)
def test_integers(dtype: Any) -> None:
    x = contract.random((21, 6), dtype)
    contract.check(
        lambda x: (x.max(0), x.min(0), x.sum(0, dtype=x.dtype), x.prod(0, dtype=x.dtype)),
        x,
        configs=(None, Config((("row", 4), ("col", 4)))),
    )
