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
from jevt_kernels.segment_sum import BLOCK, block_sums, segment_sum
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


def spec_of(inputs, **options):
    bounds, columns, table, *weights = inputs
    return segment_sum(
        len(bounds) - 1,
        len(columns),
        TensorType(table.shape, table.dtype),
        weight=TensorType(weights[0].shape, weights[0].dtype) if weights else None,
        **options,
    )


SHAPES = [
    (7, 23, 5, 12),
    (3, 200, 50, 33),
    (40, 9, 2, 1),
    (1, 70, 70, 8),
    (5, 2, 1, 3),
    (1, 9, 9, 1),
]


@pytest.mark.interpret
@pytest.mark.parametrize("weight", [None, F32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape, weight):
    inputs = arrays(*shape, weight=weight)
    spec = spec_of(inputs)
    want = exact(*inputs)
    np.testing.assert_allclose(contract.referred(spec, *inputs)[0], want, rtol=1e-4, atol=1e-5)
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
    own = Load(4, IndexMap((12, 0, 1, 0)))
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


@pytest.mark.interpret
@pytest.mark.parametrize("heads", [2, 12])
def test_a_weight_for_each_head(heads):
    """Each of the equal parts of a row has a weight of its own."""
    inputs = arrays(5, 60, 9, 12)
    weights = np.random.default_rng(1).normal(size=(60, heads)).astype(F32)
    bounds, columns, table, _ = inputs
    terms = table[columns] * np.repeat(weights, 12 // heads, axis=1)
    want = [terms[i:j].sum(0) for i, j in itertools.pairwise(bounds)]
    spec = spec_of((bounds, columns, table, weights))
    for config in CONFIGS:
        (got,) = interpreter.run(spec, bounds, columns, table, weights, config=config)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    (got,) = contract.referred(spec, bounds, columns, table, weights)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_columns_that_are_no_row_count_as_zero():
    bounds, columns, table, weights = arrays(6, 60, 9, 5)
    table[0] = np.nan  # what an index clipped to the table would read
    columns = np.where(np.arange(60) % 3, columns % 8 + 1, np.resize([-1, 9, -100, 10**6], 60))
    columns = columns.astype(np.int32)
    spec = spec_of((bounds, columns, table, weights), fills=True)
    inside = (columns >= 0) & (columns < 9)
    want = exact(bounds, np.where(inside, columns, 1), table, weights * inside)
    for run in (interpreter.run, contract.referred):
        (got,) = run(spec, bounds, columns, table, weights)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_a_result_of_another_type():
    inputs = arrays(6, 60, 9, 5, contract.BFLOAT16, F32)
    spec = spec_of(inputs, dtype=F32)
    (got,) = interpreter.run(spec, *inputs)
    assert got.dtype == F32
    np.testing.assert_allclose(got, exact(*inputs), rtol=1e-4, atol=1e-5)


#: Where rows begin and end: blocks of 512 that lie within one row, and such that do not.
LONG = (
    [3, 1999, 1999, 2001, 4000],
    [0, 512, 1023, 2560, 2561],
    [0, 511, 1024, 1536, 3000],
    [7, 519, 1031, 1031, 1032],
)


def inside_one_row(bounds, edges):
    """Where each block begins and ends, at the same position if it is not within a row."""
    blocks = np.arange(edges // BLOCK) * BLOCK
    owner = np.searchsorted(bounds, [blocks, blocks + BLOCK - 1], side="right") - 1
    inside = (owner[0] == owner[1]) & (owner[0] >= 0) & (owner[0] < len(bounds) - 1)
    return np.stack([blocks, np.where(inside, blocks + BLOCK, blocks)]).astype(np.int32)


@pytest.mark.interpret
@pytest.mark.parametrize("bounds", LONG, ids=str)
def test_long_rows_are_summed_in_blocks(bounds):
    _, *rest = arrays(4, 4000, 50, 5)
    bounds = np.array(bounds, np.int32)
    want = exact(bounds, *rest)
    spec = spec_of((bounds, *rest), blocks=True)
    first = block_sums(spec)
    ranges = inside_one_row(bounds, 4000)
    for config in CONFIGS:
        (sums,) = interpreter.run(first, ranges, *rest, config=config)
        (given,) = contract.referred(first, ranges, *rest)
        np.testing.assert_allclose(sums, given, rtol=1e-3, atol=1e-4)
        # What lies across two rows is never read.
        sums = np.where((ranges[0] < ranges[1])[:, None], sums, np.nan)
        for run in (lambda *a, c=config: interpreter.run(spec, *a, config=c), None):
            (got,) = (run or (lambda *a: contract.referred(spec, *a)))(bounds, *rest, sums)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch):
    table = TensorType((1000, 64), contract.BFLOAT16)
    spec = segment_sum(1000, 5000, table, weight=TensorType((5000,), contract.BFLOAT16))
    split = dataclasses.replace(
        segment_sum(1000, 5000, table, weight=TensorType((5000, 4), F32), fills=True, blocks=True),
        name="split",
    )
    for config in MAINLOOPS["segments"].configs(spec):
        for each in (spec, split, block_sums(split)):
            assert aot.compile(each, arch, config=config).spill_bytes == 0


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
                spec, tree=(Load(2, IndexMap((12, 0, 1, 0))), Store(0, 0, store.index))
            )
        )
    bounds = dataclasses.replace(
        spec, inputs=(TensorType((7,), np.dtype("int32")), *spec.inputs[1:])
    )
    with pytest.raises(UnsupportedKernel, match="one bound more than rows"):
        codegen.generate(bounds)
    sums = spec_of(arrays(7, 1023, 5, 12), blocks=True)
    with pytest.raises(UnsupportedKernel, match=r"expected sums of blocks .*got float32\[2,12\]"):
        codegen.generate(
            dataclasses.replace(sums, inputs=(*sums.inputs[:-1], TensorType((2, 12), F32)))
        )
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
