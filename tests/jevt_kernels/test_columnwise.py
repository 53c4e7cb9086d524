"""Columnwise kernels: sums along rows beside full and rowwise outputs, in two stages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import kernel_gallery as gallery
import numpy as np
import pytest

from jevt_kernels import aot, codegen, launch, partials
from jevt_kernels.mainloops import columnwise
from jevt_kernels.spec import Config

X = contract.random((37, 20))
Y = contract.random((37, 20), seed=1)
ROWS = contract.random((37,), seed=2)
COLUMNS = contract.random((20,), seed=3)


def statistics(x: Any) -> Any:
    return x.sum(0), jnp.square(x).sum(0), x.max(0), x.min(0)


def batch_statistics(x: Any) -> Any:
    return x.sum((0, 1, 2)), jnp.square(x).sum((0, 1, 2))


def batch_norm_sums(x: Any, mean: Any, scale: Any, dy: Any) -> Any:
    normal = (x - mean) * scale
    masked = jnp.where(normal > 0, dy, 0)
    return masked.sum((0, 1, 2)), (masked * normal).sum((0, 1, 2)), masked


C5 = (contract.random((5,), seed=4), contract.random((5,), seed=5))

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "statistics": (statistics, (X,)),
    "bias gradient": (gallery.bias_gradient, (X, Y)),
    "layer norm gradients": (gallery.layer_norm_all_gradients, (X, ROWS, ROWS + 3, COLUMNS, Y)),
    "several leading axes": (lambda x: (x * 2, x.sum((0, 1))), (X.reshape(37, 4, 5),)),
    "logical": (lambda x: ((x > 2).any(0), (x > -3).all(0)), (X,)),
    "a column's factor inside": (lambda x, c: (x * (c * c)).sum(0), (X, COLUMNS)),
    "one column block more": (statistics, (contract.random((9, 130)),)),
    "one row": (lambda x: (x + 1, (x + 1).sum(0)), (X[:1],)),
    "one column": (statistics, (X[:, :1],)),
    "three columns": (statistics, (contract.random((1100, 3)),)),
    "wide": (statistics, (contract.random((3, 701)),)),
    "batch norm's statistics": (batch_statistics, (X.reshape(37, 2, 2, 5),)),
    "batch norm's sums": (batch_norm_sums, (X.reshape(37, 2, 2, 5), *C5, Y.reshape(37, 2, 2, 5))),
    "in bfloat16": (lambda x: (x + 1, x.max(0)), (X.astype(contract.BFLOAT16),)),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_in_every_configuration(name: str) -> None:
    function, arrays = CASES[name]
    spec = contract.build(function, *arrays)
    configs: list[Config | None] = [None]
    if spec.mainloop == "columnwise":
        rows, columns = arrays[0].shape[0], arrays[0].shape[-1]
        whole = name == "layer norm gradients"
        configs += columnwise.configs(spec)
        # Several blocks along each axis, and not too many: the interpreter runs one by one.
        row = 64 if rows > 1000 else 4
        configs.append(Config((("row", row), ("col", 32 if whole or columns > 100 else 8))))
    else:
        assert name in ("one row", "one column")
    contract.check(function, *arrays, configs=dict.fromkeys(configs))


@pytest.mark.interpret
@pytest.mark.parametrize("config", [None, Config((("row", 2), ("col", 2)))])
def test_infinities_and_nan(config: Config | None) -> None:
    """The identity beyond the last row must not leak, nor hide a NaN."""
    x = np.array([[np.nan, np.inf, -np.inf, -1, 1e38]] * 2 + [[1, -np.inf, -np.inf, -2, 1e38]])
    x = np.concatenate([x, x, x[:1]]).astype(np.float32)
    with np.errstate(all="ignore"):  # NumPy does the second stage
        contract.check(lambda x: (x.sum(0), x.max(0), x.min(0)), x, configs=(config,))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64], ids=str)
def test_integers(dtype: Any) -> None:
    x = contract.random((21, 6), dtype)
    contract.check(
        lambda x: (x.max(0), x.min(0), x.sum(0, dtype=x.dtype), x.prod(0, dtype=x.dtype)),
        x,
        configs=(None, Config((("row", 4), ("col", 4)))),
    )


def tensor(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, contract.BFLOAT16)


@pytest.mark.parametrize(
    ("rows", "columns", "parts"),
    [
        (16384, 1024, 66),  # 8 blocks of columns
        (401408, 256, 264),
        (16384, 40000, 2),  # 313 blocks of columns: two programs each are nearer to 528 than one
        (33554432, 3, 176),  # 64 rows side by side
        (4099, 3, 3),  # few elements: nine blocks of rows, four for each program
        (8, 670208, 0),  # each program has all rows of its columns
        (64, 64, 0),
    ],
)
def test_parts(rows: int, columns: int, parts: int) -> None:
    """As many programs as in any kernel; the fewer columns, the more partial results of each."""
    spec = contract.build(statistics, tensor(rows, columns))
    source = codegen.generate(spec)
    assert {partial.programs for partial in source.partials} == ({parts} if parts else set())
    assert len(partials.combinations(spec, source)) == (parts > 0)


def test_one_kernel_combines_all_results() -> None:
    spec = gallery.spec("columnwise_layer_norm_gradients")
    (second,) = partials.combinations(spec, codegen.generate(spec))
    assert second.outputs == (1, 2)
    source = codegen.generate(second.spec, second.config)
    assert not source.partials
    assert source.grid == 64
    assert "atomic" not in source.text


def test_few_parts_of_one_result_are_left_to_xla() -> None:
    spec = gallery.spec("columnwise_bias_gradient")
    source = codegen.generate(spec)
    assert [partial.programs for partial in source.partials] == [16]
    assert partials.combinations(spec, source) == []


@pytest.mark.cuda_lowering
@pytest.mark.parametrize(
    ("name", "kernels", "reduces"),
    [("columnwise_layer_norm_gradients", 2, 0), ("columnwise_bias_gradient", 1, 1)],
)
def test_lowered_for_cuda(name: str, kernels: int, reduces: int) -> None:
    spec = gallery.spec(name)
    call = functools.partial(launch.call, spec, compute_capability=90)
    operands = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in spec.inputs]
    text = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call_ffi") == kernels
    assert text.count("stablehlo.reduce(") == reduces


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_second_stages_compile(arch: int) -> None:
    spec = gallery.spec("columnwise_layer_norm_gradients")
    (second,) = partials.combinations(spec, codegen.generate(spec))
    binary = aot.compile(second.spec, arch, config=second.config)
    assert binary.spill_bytes == 0
    assert binary.registers <= 80


@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [
        (401408, 256, (16, 128)),
        (401408, 64, (32, 64)),
        (401408, 192, (32, 64)),  # a quarter of two blocks of 128 columns would be idle
        (401408, 100, (16, 128)),
        (401408, 16, (128, 16)),
        (8, 900, (8, 128)),
    ],
)
def test_tiles(rows: int, columns: int, block: tuple[int, int]) -> None:
    """Of few elements, for many programs, which share few blocks of columns."""
    spec = contract.build(statistics, tensor(rows, columns))
    first = columnwise.configs(spec)[0]
    assert (first.block("row"), first.block("col")) == block
    assert first.programs == 528
    assert codegen.generate(spec, first).grid <= 528
