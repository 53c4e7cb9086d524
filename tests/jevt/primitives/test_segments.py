"""Orders, bounds and blocks of sums of segments, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevt.primitives import segments
from jevt_kernels.segment_sum import BLOCK


@pytest.mark.parametrize("count", [0, 1, 50])
def test_order_and_bounds(count):
    indices = np.random.default_rng(0).integers(-2, 9, count).astype(np.int32)
    order = segments.segment_order_p.bind(indices)
    np.testing.assert_array_equal(order, np.argsort(indices, kind="stable"))
    bounds = segments.segment_bounds_p.bind(indices, order, rows=7)
    want = [(indices < r).sum() for r in range(8)]
    np.testing.assert_array_equal(bounds, want)
    np.testing.assert_array_equal(
        segments.segment_bounds_p.bind(np.sort(indices), rows=7), want
    )  # sorted already


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 20_000],
        [3, 1999, 1999, 20_000],
        [0, BLOCK, 2 * BLOCK - 1, 19_000],
        [5000, 5000, 9000],  # positions of no row
        list(range(0, 20_001, 10)),  # no row is long
    ],
    ids=lambda b: str(b[:4]),
)
def test_blocks_lie_within_one_row(bounds):
    edges = 20_000
    begin, end = segments.segment_blocks_p.bind(np.array(bounds, np.int32), edges=edges)
    begin, end = np.asarray(begin), np.asarray(end)
    np.testing.assert_array_equal(begin, np.arange(edges // BLOCK) * BLOCK)
    for first, last in zip(begin, end, strict=True):
        within = any(a <= first and first + BLOCK <= b for a, b in zip(bounds, bounds[1:]))  # noqa: B905, RUF007
        assert last - first == (BLOCK if within else 0)


def test_few_positions_are_not_split():
    bounds = jax.ShapeDtypeStruct((5,), jnp.int32)
    few = segments.SPLIT_FROM - 1
    out = jax.eval_shape(lambda b: segments.segment_blocks_p.bind(b, edges=few), bounds)
    assert out.shape == (2, 0)


def test_what_does_not_belong_together():
    bounds, blocks, table = jnp.zeros(4, int), jnp.zeros((2, 0), int), jnp.zeros((3, 6))
    columns, params = jnp.zeros(9, int), {"dtype": jnp.float32, "fills": False, "capability": 90}
    for weights in (jnp.zeros(8), jnp.zeros((9, 4)), jnp.zeros((9, 2, 3))):
        with pytest.raises(ValueError, match=r"expected columns \[E\].*a divisor of F, got"):
            jax.eval_shape(
                lambda *a: segments.segment_sum_p.bind(*a, **params),
                *(bounds, blocks, columns, table, weights),
            )


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("ordered", [False, True])
def test_bounds_are_a_kernel_on_cuda(ordered):
    def function(indices):
        order = (segments.segment_order_p.bind(indices),) if ordered else ()
        return segments.segment_bounds_p.bind(indices, *order, rows=7, capability=90)

    def text(dtype):
        indices = jax.ShapeDtypeStruct((1000,), dtype)
        lowered = jax.jit(function).trace(indices).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    assert "triton_kernel_call" in text(jnp.int32)
    assert "triton_kernel_call" not in text(jnp.uint8)  # rows of other types are searched by XLA
