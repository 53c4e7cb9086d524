"""Random operands, and when two kernels' results agree."""

from __future__ import annotations

import gemm_kernels
import jax.numpy as jnp
import kernel_contract as contract
import kernel_gallery
import numpy as np
import pytest

from jevt_kernels.ops import TRITON_TYPES
from jevt_kernels.spec import TensorType
from jevt_kernels.tuning import operands


@pytest.mark.parametrize("dtype", [d for d in TRITON_TYPES if d.itemsize < 8], ids=str)
def test_every_type_can_be_drawn(dtype):
    for shape in ((), (0,), (1,), (7, 300)):
        (one,), (two,) = (operands.draw([TensorType(shape, dtype)], seed) for seed in (0, 1))
        assert (one.shape, one.dtype) == (shape, dtype)
    assert not np.array_equal(one, two)
    assert np.array_equal(one, operands.draw([TensorType((7, 300), dtype)], 0)[0])


def test_what_is_drawn():
    types = [TensorType((1000,), np.dtype(t)) for t in ("float32", "int32", "uint32")]
    normal, small, bits = operands.draw(types, 0)
    assert float(normal.min()) < -1 and float(normal.max()) > 1
    assert (int(small.min()), int(small.max())) == (0, 7)
    assert int(bits.max()) > 1 << 31
    (positive, *_) = operands.draw(types, 0, positive=True)
    assert float(positive.min()) >= 0.5 and float(positive.max()) < 1.5
    assert operands.draw([], 0) == ()


def far(got, want):
    (result,) = operands.difference([jnp.asarray(got)], [jnp.asarray(want)])
    return float(result)


def test_differences():
    x = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    assert far(x, x) == 0
    assert far(x * 1.01, x) == pytest.approx(0.01, rel=1e-3)
    assert far(x[::-1], x) > 1
    assert far(np.zeros(5, np.float32), np.zeros(5, np.float32)) == 0
    assert far(np.ones(4, np.float32), np.zeros(4, np.float32)) == 2
    assert far([1, 2, 3, 4], [1, 2, 3, 5]) == 0.25
    assert far([True, False], [True, True]) == 0.5


def test_values_that_are_not_finite():
    x = np.arange(2000, dtype=np.float32)
    one, many = x.copy(), x.copy()
    one[0], many[:100] = np.nan, np.inf
    assert far(one, x) == 0, "one of 2000 may be on the other side of a border"
    assert far(many, x) == np.inf
    assert far(x, many) == np.inf
    assert far(many, many) == 0
    assert far(np.full(9, np.nan, np.float32), np.ones(9, np.float32)) == np.inf


def test_how_much_of_the_results_says_something():
    x = jnp.asarray([1.0, np.nan, 2.0, np.inf])
    assert float(operands.finite_part([jnp.ones(3), x])) == 0.5
    assert float(operands.finite_part([jnp.arange(3), jnp.ones(2, bool)])) == 1


def test_tolerances():
    sizes = (1, 64, 64, 64)
    assert operands.tolerances(gemm_kernels.product(sizes, contract.BFLOAT16)) == (1e-2,)
    wide = gemm_kernels.product(sizes, contract.BFLOAT16, out_dtype=np.float32)
    assert operands.tolerances(wide) == (1e-2,)
    assert operands.tolerances(gemm_kernels.product(sizes, np.float32)) == (1e-4,)
    assert operands.tolerances(gemm_kernels.product(sizes, np.int8)) == (0.0,)
    # with floats in between, a rounding may decide an integer
    assert set(operands.tolerances(kernel_gallery.spec("pointwise_integers"))) == {1e-3}
