"""Errors of gradients: their value, the worst one, and NaN."""

import math

import numpy as np
import pytest

from benchmarks import accuracy

REFERENCE = [np.full((1000,), 1.0, np.float32), np.full((4,), 2.0, np.float32)]


def named(*arrays):
    return zip("abcdef", arrays, strict=False)


def test_equal_is_zero():
    assert accuracy.compare(named(*REFERENCE), REFERENCE).total == 0.0


def test_wrong_small_gradient_is_the_worst():
    error = accuracy.compare(named(REFERENCE[0], 0 * REFERENCE[1]), REFERENCE)
    assert error.total == pytest.approx(4 / math.sqrt(1016))
    assert error.worst == pytest.approx(1.0)
    assert error.where == "b"


def test_rounding_of_a_zero_gradient_is_not_the_worst():
    zero = [REFERENCE[0], np.zeros((4,), np.float32)]
    noise = [1.01 * REFERENCE[0], np.full((4,), 1e-6, np.float32)]
    assert accuracy.compare(named(*noise), zero).where == "a"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_never_passes(bad):
    broken = [REFERENCE[0], np.array([2, bad, 2, 2], np.float32)]
    error = accuracy.compare(named(*broken), REFERENCE)
    assert error.total == math.inf
    value, note = accuracy.describe(error, None)
    assert value is None
    assert note.startswith("NOT FINITE")


def test_saved_references_come_back(tmp_path):
    accuracy.save(named(*REFERENCE), tmp_path / "r")
    assert accuracy.compare(named(*REFERENCE), accuracy.references(tmp_path / "r")).total == 0.0
    assert accuracy.references(tmp_path / "none") is None


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="b: expected shape"):
        accuracy.compare(named(REFERENCE[0], REFERENCE[1][:2]), REFERENCE)
