"""Sums of segments: against NumPy, with empty rows, long rows, positions of no row, epilogues."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, codegen, interpreter, launch
from jevt_kernels.index_map import IndexMap
from jevt_kernels.mainloops import MAINLOOPS
from jevt_kernels.reference import reference
from jevt_kernels.segment_sum import segment_sum
from jevt_kernels.spec import Config, TensorType, UnsupportedKernel
from jevt_kernels.visitor import Compute, Load, Reduce, Store

F32 = np.dtype("float32")
CONFIGS = (None, Config((("row", 1), ("col", 8), ("edge", 4))))


def arrays(rows, edges, table_rows, features, dtype=F32, weight=F32, seed=0):
    rng = np.random.default_rng(seed)
    # Ascending, the first positions and the last ones in no row.
    bounds = np.sort(rng.integers(edges // 20, edges - edges // 20 + 1, rows + 1)).astype(np.int32)
    result = [
        bounds,
        rng.integers(0, table_rows, edges).astype(np.int32),
        rng.normal(size=(table_rows, features)).astype(dtype),
    ]
    return result if weight is None else [*result, rng.normal(size=edges).astype(weight)]


def exact(bounds, columns, table, weights=None):
    terms = table.astype(np.float64)[columns]
    if weights is not None:
        terms = terms * weights.astype(np.float64)[:, None]
    return np.stack([terms[i:j].sum(0) for i, j in itertools.pairwise(bounds)])


def spec_of(inputs):
    bounds, columns, table, *weights = inputs
    return segment_sum(
        len(bounds) - 1,
        len(columns),
        TensorType(table.shape, table.dtype),
        weight=weights[0].dtype if weights else None,
    )


SHAPES = [(7, 23, 5, 12), (3, 200, 50, 33), (40, 9, 2, 1), (1, 70, 70, 8), (5, 2, 1, 3)]


@pytest.mark.interpret
@pytest.mark.parametrize("weight", [None, F32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape, weight):
    inputs = arrays(*shape, weight=weight)
    spec = spec_of(inputs)
    want = exact(*inputs)
    np.testing.assert_allclose(reference(spec, *inputs)[0], want, rtol=1e-4, atol=1e-5)
    for config in CONFIGS:
        got = interpreter.run(spec, *inputs, config=config)[0]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [contract.BFLOAT16, np.dtype("float16")], ids=str)
def test_half_precision_is_rounded_once(dtype):
    inputs = arrays(6, 300, 40, 12, dtype, dtype)
    want = exact(*inputs)
    for config in CONFIGS:
        got = interpreter.run(spec_of(inputs), *inputs, config=config)[0]
        assert got.dtype == dtype
        error = np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)
        assert error < (3e-3 if dtype == contract.BFLOAT16 else 4e-4)


@pytest.mark.interpret
def test_float64_is_summed_in_float64():
    inputs = arrays(6, 100, 40, 12, np.float64, np.float64)
    with contract.types_of(*inputs):
        got = interpreter.run(spec_of(inputs), *inputs)[0]
    np.testing.assert_allclose(got, exact(*inputs), rtol=1e-12)


@pytest.mark.interpret
def test_an_epilogue_follows_the_sum():
    """relu(sum + own row), as a graph convolution has it."""
    inputs = [*arrays(7, 50, 7, 12), np.random.default_rng(1).normal(size=(7, 12)).astype(F32)]
    plain = spec_of(inputs[:-1])
    *before, store = plain.tree
    own = Load(4, IndexMap((12, 1, 0)))
    count = len(before)
    tree = (
        *before,
        own,
        Compute("add", (count - 1, count), F32),
        Compute("mul", (count + 1, count + 1), F32),
        dataclasses.replace(store, operand=count + 2),
    )
    spec = dataclasses.replace(plain, tree=tree, inputs=(*plain.inputs, TensorType((7, 12), F32)))
    want = (exact(*inputs[:-1]) + inputs[-1]) ** 2
    for config in CONFIGS:
        got = interpreter.run(spec, *inputs, config=config)[0]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_beyond_a_segment_nothing_leaks():
    """NaN and infinity of other rows stay there, also in the same block of positions."""
    bounds, columns, table, weights = arrays(4, 12, 12, 5)
    bounds = np.array([0, 3, 6, 9, 12], np.int32)
    columns = np.arange(12, dtype=np.int32)
    table[4], table[7] = np.nan, np.inf
    got = interpreter.run(
        spec_of((bounds, columns, table, weights)), bounds, columns, table, weights
    )
    assert np.isfinite(got[0][[0, 3]]).all()
    assert np.isnan(got[0][1]).all()
    assert not np.isfinite(got[0][2]).any()


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch):
    table = TensorType((1000, 64), contract.BFLOAT16)
    spec = segment_sum(1000, 5000, table, weight=contract.BFLOAT16)
    for config in MAINLOOPS["segments"].configs(spec):
        assert aot.compile(spec, arch, config=config).spill_bytes == 0


def test_wide_tables_use_64_bit_offsets():
    table = TensorType((1 << 26, 64), contract.BFLOAT16)
    text = codegen.generate(segment_sum(1000, 5000, table)).text
    assert ".to(tl.int64) * 64" in text


def test_what_cannot_be_generated():
    spec = spec_of(arrays(7, 23, 5, 12))
    *tree, store = spec.tree
    with pytest.raises(UnsupportedKernel, match="at least two positions"):
        codegen.generate(spec_of(arrays(7, 1, 5, 12)))
    with pytest.raises(UnsupportedKernel, match="one sum of segments"):
        codegen.generate(
            dataclasses.replace(
                spec, tree=(Load(2, IndexMap((12, 1, 0))), Store(0, 0, store.index))
            )
        )
    bounds = dataclasses.replace(
        spec, inputs=(TensorType((7,), np.dtype("int32")), *spec.inputs[1:])
    )
    with pytest.raises(UnsupportedKernel, match="one bound more than rows"):
        codegen.generate(bounds)
    with pytest.raises(UnsupportedKernel, match="holds no reduction"):
        codegen.generate(
            dataclasses.replace(
                spec,
                tree=(
                    *tree,
                    Reduce("sum", len(tree) - 1, "col", F32),
                    dataclasses.replace(store, operand=len(tree)),
                ),
            )
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [contract.BFLOAT16, F32], ids=str)
def test_on_a_gpu(dtype):
    inputs = arrays(3000, 40000, 2000, 96, dtype, dtype)
    (got,) = launch.run(spec_of(inputs), *(jnp.asarray(a) for a in inputs))
    want = exact(*inputs)
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error < (3e-3 if dtype == contract.BFLOAT16 else 1e-6)
    (again,) = launch.run(spec_of(inputs), *(jnp.asarray(a) for a in inputs))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(again))
