"""Products of rows of two tables: against NumPy, with heads, rows of no table, several types."""

from __future__ import annotations

import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, interpreter
from jevt_kernels.mainloops import MAINLOOPS
from jevt_kernels.reference import reference
from jevt_kernels.row_products import row_products
from jevt_kernels.spec import TensorType

F32 = np.dtype("float32")


def arrays(edges, rows, features, dtype=F32, outside=0):
    rng = np.random.default_rng(0)
    indices = [rng.integers(-outside, n + outside, edges).astype(np.int32) for n in rows]
    return *indices, *(rng.normal(size=(n, features)).astype(dtype) for n in rows)


def exact(i, j, a, b, heads=1):
    products = []
    for index, table in ((i, a), (j, b)):
        inside = (index >= 0) & (index < len(table))
        found = table.astype(np.float64)[np.where(inside, index, 0)]
        products.append(np.where(inside[:, None], found, 0))
    return (products[0] * products[1]).reshape(len(i), heads, -1).sum(2)


def spec_of(inputs, **options):
    i, _, a, b = inputs
    tables = tuple(TensorType(t.shape, t.dtype) for t in (a, b))
    return row_products(len(i), tables, **{"dtype": F32, **options})


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("edges", "rows", "features", "heads"),
    [(50, (9, 7), 12, 1), (33, (9, 9), 12, 3), (5, (1, 2), 1, 1), (70, (4, 5), 33, 1)],
)
@pytest.mark.parametrize("outside", [0, 2])
def test_products(edges, rows, features, heads, outside):
    inputs = arrays(edges, rows, features, outside=outside)
    if outside:
        inputs[2][0] = inputs[3][-1] = np.nan  # what an index clipped to the table would read
        keep = np.isfinite(exact(*inputs, heads)).all(1)
        inputs = (*(index[keep] for index in inputs[:2]), *inputs[2:])
    spec = spec_of(inputs, heads=heads, fills=(outside > 0,) * 2)
    want = exact(*inputs, heads)
    for run in (interpreter.run, reference):
        (got,) = run(spec, *inputs)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_halves_are_summed_in_float32():
    inputs = arrays(40, (9, 7), 300, contract.BFLOAT16)
    (got,) = interpreter.run(spec_of(inputs, dtype=F32), *inputs)
    np.testing.assert_allclose(got, exact(*inputs), rtol=1e-4, atol=1e-3)
    (got,) = interpreter.run(spec_of(inputs, dtype=contract.BFLOAT16), *inputs)
    assert got.dtype == contract.BFLOAT16


@pytest.mark.interpret
def test_float64_is_summed_in_float64():
    inputs = arrays(40, (9, 7), 30, np.float64)
    with contract.types_of(*inputs):
        (got,) = interpreter.run(spec_of(inputs, dtype=np.dtype("float64")), *inputs)
    np.testing.assert_allclose(got, exact(*inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch):
    tables = (TensorType((1000, 64), contract.BFLOAT16),) * 2
    for heads, fills in ((1, (False, True)), (4, (True, True))):
        spec = row_products(5000, tables, heads=heads, dtype=contract.BFLOAT16, fills=fills)
        for config in MAINLOOPS["rowwise"].configs(spec):
            assert aot.compile(spec, arch, config=config).spill_bytes == 0
