"""Arithmetic that kernels shorten, with the GPU's own exponentials and reciprocals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jevt

pytestmark = pytest.mark.gpu


def exact_gelu(x, g):
    value, pull = jax.vjp(lambda x: jax.nn.gelu(x, approximate=False), x)
    return value, pull(g)[0]


def tanh_gelu(x, g):
    value, pull = jax.vjp(jax.nn.gelu, x)
    return value, pull(g)[0], jnp.tanh(x)


def cross_entropy(x, y):
    return jax.value_and_grad(lambda x: optax.sigmoid_binary_cross_entropy(x, y).sum())(x)


def column_sums(*tensors):
    return [jnp.exp(x).sum((0, 1)) for x in tensors]


def operands(dtype):
    x = jnp.linspace(-9, 9, 1 << 20).astype(dtype).reshape(1024, 1024)
    return x, jax.random.normal(jax.random.key(0), x.shape, dtype)


def follows(function, arguments, tolerance):
    """Both the values and where they are not finite, against the float32 run."""
    step = jevt.jit(function, backend="triton")
    got = jax.tree.leaves(step(*arguments))
    assert any(group.target == "triton" for group in jevt.last_trace(step).plan.groups)
    wide = (x.astype(jnp.float32) for x in arguments)
    for mine, want in zip(got, jax.tree.leaves(jax.jit(function)(*wide)), strict=True):
        mine, want = np.asarray(mine, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(mine - want) / np.linalg.norm(want)
        assert error < tolerance, error
    return step


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
@pytest.mark.parametrize("function", [exact_gelu, tanh_gelu])
def test_gelus(function, dtype):
    follows(function, operands(dtype), 1e-5 if dtype == jnp.float32 else 5e-3)


def test_tails_of_a_gelu_keep_their_digits():
    x = jnp.linspace(-8, -2, 1 << 16).astype(jnp.bfloat16)
    step = jevt.jit(lambda x: jax.scipy.special.erfc(-x), backend="triton")
    tail = step(x)
    assert [group.target for group in jevt.last_trace(step).plan.groups] == ["triton"]
    exact = jax.jit(jax.scipy.special.erfc)(-x.astype(jnp.float32))
    np.testing.assert_allclose(tail.astype(jnp.float32), exact, rtol=5e-3)


def test_binary_cross_entropy():
    x, y = operands(jnp.float32)
    follows(cross_entropy, (8 * x, jax.nn.sigmoid(y)), 1e-5)
    follows(cross_entropy, (8 * x, (y > 0).astype(jnp.float32)), 1e-5)


def test_column_sums_of_several_tensors():
    keys = jax.random.split(jax.random.key(0), 3)
    step = follows(
        column_sums, [jax.random.normal(key, (32, 500, 96), jnp.bfloat16) for key in keys], 5e-3
    )
    assert len(jevt.last_trace(step).plan.groups) == 1
