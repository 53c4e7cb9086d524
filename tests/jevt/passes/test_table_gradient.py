"""Gradients of lookups in short tables are matrix products with the same sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevt.passes import dce, inline, table_gradient


def traced(function, *args):
    return dce.run(inline.run(jax.make_jaxpr(function)(*args)))


def names(jaxpr):
    return [eqn.primitive.name for eqn in jaxpr.eqns]


def lookup_gradient(mode=None):
    def gradient(table, index, cotangent):
        return jax.vjp(lambda t: t.at[index].get(mode=mode), table)[1](cotangent)[0]

    return gradient


def arguments(rows, index_shape, width, dtype, low=0, high=None):
    rng = np.random.default_rng(0)
    table = jnp.zeros((rows, *width), dtype)
    index = jnp.asarray(rng.integers(low, rows if high is None else high, index_shape), jnp.int32)
    cotangent = jnp.asarray(rng.standard_normal((*index_shape, *width)), dtype)
    return table, index, cotangent


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("mode", [None, "clip", "fill", "drop", "promise_in_bounds"])
@pytest.mark.parametrize(("index_shape", "width"), [((700,), (128,)), ((33, 21), (10, 12))])
def test_same_sums(dtype, mode, index_shape, width):
    outside = 0 if mode == "promise_in_bounds" else 3
    args = arguments(5, index_shape, width, dtype, -outside, 5 + outside)
    mode = None if mode == "drop" else mode
    before = traced(lookup_gradient(mode), *args)
    after = dce.run(table_gradient.run(before))
    assert "scatter-add" in names(before)
    assert "scatter-add" not in names(after)
    assert "dot_general" in names(after)
    (got,) = jax.core.eval_jaxpr(after, after.consts, *args)
    wide = [jnp.asarray(a, jnp.float32) if a.dtype == dtype else a for a in args]
    want = np.asarray(lookup_gradient(mode)(*wide))
    assert got.dtype == dtype
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert error < (1e-6 if dtype == jnp.float32 else 4e-3)


def test_idempotent():
    before = traced(lookup_gradient(), *arguments(4, (1024,), (128,), jnp.bfloat16))
    after = table_gradient.run(before)
    assert table_gradient.run(after) is after


@pytest.mark.parametrize(
    ("rows", "count", "width", "dtype"),
    [
        (table_gradient.MAX_ROWS + 1, 2048, 64, jnp.bfloat16),
        (table_gradient.MAX_ROWS_FLOAT32 + 1, 2048, 64, jnp.float32),
        (4, 16, 16, jnp.bfloat16),  # few updates
        (4, 2048, 64, jnp.int32),
    ],
)
def test_left_alone(rows, count, width, dtype):
    if dtype == jnp.int32:

        def function(table, index, cotangent):
            return (table * 0).at[index].add(cotangent)
    else:
        function = lookup_gradient()
    before = traced(function, *arguments(rows, (count,), (width,), dtype))
    assert table_gradient.run(before) is before


def test_a_table_that_is_not_zero_is_left_alone():
    def function(table, index, update):
        return table.at[index].add(update)

    before = traced(function, *arguments(4, (1024,), (128,), jnp.bfloat16))
    assert table_gradient.run(before) is before


def test_inside_scan():
    def function(table, index, cotangent):
        def body(carry, x):
            return carry + lookup_gradient()(table, index, x), ()

        return jax.lax.scan(body, table, cotangent)[0]

    table, index, cotangent = arguments(4, (1024,), (128,), jnp.float32)
    args = table, index, jnp.stack([cotangent] * 3)
    before = traced(function, *args)
    after = table_gradient.run(before)
    assert "scatter-add" not in str(after)
    (got,) = jax.core.eval_jaxpr(after, after.consts, *args)
    np.testing.assert_allclose(got, function(*args), rtol=1e-4, atol=1e-4)
