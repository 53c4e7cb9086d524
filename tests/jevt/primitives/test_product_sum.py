"""``product_sum`` is the sum of its products, and says what it does not take."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevt.primitives.product_sum import product_sum_p

ROWS = (((1,), (0,)), ((), ()))
BATCHED = (((2,), (1,)), ((0,), (0,)))


def bind(*operands, dimensions=ROWS, dtype=jnp.float32):
    return product_sum_p.bind(
        *operands,
        dimension_numbers=(dimensions,) * (len(operands) // 2),
        precision=None,
        preferred_element_type=np.dtype(dtype),
    )


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("compiled", [False, True])
def test_values(compiled):
    args = arrays((5, 3), (3, 4), (5, 7), (7, 4), (5, 1), (1, 4))
    got = (jax.jit(bind) if compiled else bind)(*args)
    want = sum(np.asarray(x, np.float64) @ y for x, y in zip(args[::2], args[1::2], strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_batches_and_result_type():
    args = arrays((2, 5, 3), (2, 3, 4), (2, 5, 6), (2, 6, 4), dtype=jnp.bfloat16)
    got = jax.jit(functools.partial(bind, dimensions=BATCHED))(*args)
    want = sum(
        np.asarray(x, np.float64) @ np.asarray(y, np.float64)
        for x, y in zip(args[::2], args[1::2], strict=True)
    )
    assert got.dtype == jnp.float32 and got.shape == (2, 5, 4)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_products_of_other_shapes():
    with pytest.raises(TypeError, match="one shape and type"):
        jax.eval_shape(bind, *arrays((5, 3), (3, 4), (5, 3), (3, 6)))


def test_products_of_other_types():
    with pytest.raises(TypeError, match="one shape and type"):
        jax.eval_shape(bind, *arrays((5, 3), (3, 4)), *arrays((5, 3), (3, 4), dtype=jnp.bfloat16))


@pytest.mark.parametrize("number", [1, 3])
def test_numbers_of_operands(number):
    sum_ = functools.partial(
        product_sum_p.bind,
        dimension_numbers=(ROWS,) * max(1, number // 2),
        precision=None,
        preferred_element_type=np.dtype("float32"),
    )
    with pytest.raises(ValueError, match="two products at least"):
        jax.eval_shape(sum_, *arrays(*[(4, 4)] * number))
