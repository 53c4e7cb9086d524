"""Reductions along the rows of few columns: rows side by side, in two kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, codegen, launch, visitor
from jevt_kernels.mainloops import columnwise, narrow_columns
from jevt_kernels.spec import Config


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_columns, "_LEAST", 200)


def statistics(x: Any) -> Any:
    return x.sum(0), jnp.square(x).sum(0), x.max(0), x.min(0)


def beside_full(x: Any, c: Any) -> Any:
    """Full tiles, a factor of each column, and the number of each row and column."""
    rows, columns = (jax.lax.broadcasted_iota(np.float32, x.shape, axis) for axis in (0, 1))
    y = x * c + rows - columns
    return y, y.sum(0), (y * x).sum(0)


def of_rows(x: Any, r: Any) -> Any:
    return (x * r[:, None]).sum(0)


def of_images(x: Any) -> Any:
    return x.sum((0, 1, 2)), x * 2


def of_others(x: Any) -> Any:
    return (x > 0).any(0), (x > -9).all(0), x.prod(0)


X = contract.random((192, 3))

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
    "statistics": (statistics, (X,), 64),
    "beside full tiles": (beside_full, (X, X[0]), 64),
    "of each row": (of_rows, (contract.random((40, 5)), contract.random((40,), seed=1)), 8),
    "images": (of_images, (contract.random((3, 5, 12, 7)),), 4),
    "booleans": (of_others, (X[:128] / 2 + 1,), 64),
    "odd": (statistics, (X[:191],), 1),
    "wide": (statistics, (contract.random((64, 16)),), 1),
    "whole rows": (lambda x: (x - x.mean(1, keepdims=True)).sum(0), (1,), 1),
}


@pytest.mark.interpret
@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize("name", [name for name in CASES if name != "whole rows"])
def test_values(name: str) -> None:
    function, arrays, count = CASES[name]
    spec = contract.check(
        function, *arrays, configs=(None, Config((("row", 2), ("col", 8)), programs=4))
    )
    stages = codegen.generate(spec).stages
    assert (stages is None) == (count == 1)
    if stages is not None:
        first, second = stages.steps
        assert {o.shape[0] for o in second.spec.inputs} == {count}
        assert first.spec.space.extent(first.spec.space.tile_axis("col")) % count == 0


@pytest.mark.interpret
@pytest.mark.usefixtures("of_any_size")
def test_half_precision() -> None:
    """Partial results are of 32 bits."""
    x = contract.random((1024, 3), contract.BFLOAT16)
    spec = contract.check(lambda x: x.astype(np.float32).sum(0).astype(x.dtype), x)
    (first, _) = codegen.generate(spec).stages.steps
    assert {o.dtype for o in first.spec.outputs} == {np.dtype(np.float32)}


@pytest.mark.usefixtures("of_any_size")
def test_whole_rows_are_left_alone() -> None:
    x = jax.ShapeDtypeStruct((192, 3), np.float32)
    spec = contract.build(CASES["whole rows"][0], x)
    assert any(isinstance(n, visitor.Reduce) and n.over == "col" for n in spec.tree)
    assert narrow_columns.stages(spec) is None


def test_few_elements_are_left_alone() -> None:
    """Of which a launch more would be the longest."""
    for rows, stages in ((1 << 18, 1), (1 << 19, 2)):
        x = jax.ShapeDtypeStruct((rows, 3), np.float32)
        source = codegen.generate(contract.build(statistics, x))
        assert (1 if source.stages is None else len(source.stages.steps)) == stages


@pytest.mark.usefixtures("of_any_size")
def test_results_do_not_share_buffers() -> None:
    """Results of the first kernel are larger than those that may; full tiles still do."""
    row, full = jax.ShapeDtypeStruct((3,), np.float32), jax.ShapeDtypeStruct((192, 3), np.float32)
    spec = contract.build(beside_full, full, row)
    first = narrow_columns.wide(dataclasses.replace(spec, aliases=((0, 0), (1, 1))))
    assert first is not None and first.aliases == ((0, 0),)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_loads_are_wide(arch: int) -> None:
    """16 bytes at once, through shared memory, and nothing is spilled."""
    x = jax.ShapeDtypeStruct((33554432, 3), contract.BFLOAT16)
    spec = contract.build(lambda x: x.astype(np.float32).sum(0), x)
    binary = aot.compile(spec, arch)
    assert binary.spill_bytes == 0
    assert "cp.async.cg.shared.global" in binary.ptx
    assert columnwise.configs(spec)[0].block("col") == 64


@pytest.mark.cuda_lowering
def test_lowered_for_cuda() -> None:
    """The first kernel, what combines its programs' parts, and the second."""
    x = jax.ShapeDtypeStruct((1 << 19, 3), np.float32)
    spec = contract.build(lambda x: x.sum(0), x)
    traced = jax.jit(lambda x: launch.call(spec, x, compute_capability=90)).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call_ffi") == 3
