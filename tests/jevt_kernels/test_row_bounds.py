"""Where rows begin in ascending numbers of rows: against NumPy's search."""

from __future__ import annotations

import numpy as np
import pytest

from jevt_kernels import aot, interpreter, launch
from jevt_kernels.reference import reference
from jevt_kernels.row_bounds import row_bounds


def numbers(edges: int, low: int = -2, high: int = 60) -> np.ndarray:
    return np.sort(np.random.default_rng(edges).integers(low, high, edges).astype(np.int32))


def check(ascending: np.ndarray, rows: int, run) -> None:
    (got,) = run(row_bounds(len(ascending), rows), ascending)
    got = np.asarray(got)
    assert got.dtype == np.int32 and got.shape == (rows + 1,)
    np.testing.assert_array_equal(got, np.searchsorted(ascending, np.arange(rows + 1)))


@pytest.mark.interpret
@pytest.mark.parametrize("edges", [1, 2, 3, 7, 8, 9, 1000, 1023, 1024, 1025])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_bounds(edges, rows):
    for run in (interpreter.run, reference):
        check(numbers(edges), rows, run)


@pytest.mark.interpret
@pytest.mark.parametrize("number", [-1, 0, 4, 99])
def test_one_row_has_all(number):
    check(np.full(300, number, np.int32), 7, interpreter.run)


@pytest.mark.gpu
@pytest.mark.parametrize("edges", [1, 100, 5_416_271])
def test_bounds_on_a_gpu(edges):
    check(numbers(edges, high=700_000), 736_389, launch.run)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch):
    binary = aot.compile(row_bounds(5_416_271, 736_389), arch)
    assert binary.spill_bytes == 0 and binary.registers <= 32


def test_wrong_numbers():
    for edges in (0, 1 << 31):
        with pytest.raises(ValueError, match=r"expected from 1 to 2\*\*31 - 1 numbers, got"):
            row_bounds(edges, 5)
