"""Binary cross entropy in few operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import optax
import pytest

from jevt_kernels import interpreter, visitor


def softplus(x):
    """As the passes spell ``jax.nn.softplus``."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def sums(x, y):
    """As optax has it, and its gradient."""
    loss = y * softplus(-x) + (1 - y) * softplus(x)
    return loss, (1 - y) * jax.nn.sigmoid(x) - y * jax.nn.sigmoid(-x)


def differences(x, y):
    """Negated, in another order, with factors."""
    loss = -(0.5 * (1 - y) * softplus(x)) - (y * softplus(-x)) * 0.5
    return loss, 0.25 * (jax.nn.sigmoid(-x) * y) - (0.25 * jax.nn.sigmoid(x)) * (1 - y)


def reversed_labels(x, y):
    """Labels of what is not there."""
    loss = (1 - y) * softplus(-x) + y * softplus(x)
    return loss, y * jax.nn.sigmoid(x) - (1 - y) * jax.nn.sigmoid(-x)


def gradient(x, y):
    """What autodiff and the passes make of optax's spelling."""
    return jax.value_and_grad(lambda x: optax.sigmoid_binary_cross_entropy(x, y).sum())(x)


PROGRAMS = [sums, differences, reversed_labels]

#: Labels that are not complementary, sums where a difference is meant, another argument.
OTHERS = [
    lambda x, y: y * softplus(-x) + (2 - y) * softplus(x),
    lambda x, y: y * softplus(-x) - (1 - y) * softplus(x),
    lambda x, y: (1 - y) * jax.nn.sigmoid(x) + y * jax.nn.sigmoid(-x),
    lambda x, y: y * softplus(x) + (1 - y) * softplus(x),
    lambda x, y: y * softplus(-x) + (1 - y) * softplus(x + y),
    lambda x, y: 0.5 * (y * softplus(-x)) + (1 - y) * softplus(x),
    lambda x, y: y * softplus(-x) + (1 - y) * softplus(x) + y,
]


def ops_of(spec):
    return [node.op for node in spec.tree if isinstance(node, visitor.Compute)]


def operands(dtype=np.float32):
    x = np.concatenate([np.linspace(-90, 90, 501), [0.0, -0.0, 1e-30, np.nan]])
    x = np.concatenate([x, contract.random((500,)) * 8]).astype(dtype)
    y = np.abs(np.sin(np.arange(x.size))).astype(dtype)
    y[::3], y[1::3] = 0, 1
    return x, y


@pytest.mark.interpret
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", [np.float32, contract.BFLOAT16])
def test_values(program, dtype) -> None:
    spec = contract.check(program, *operands(dtype))
    assert ops_of(spec).count("log1p_of_unit") == ops_of(spec).count("of_odds") == 1
    assert "logistic_of" not in ops_of(spec)


@pytest.mark.interpret
def test_float64() -> None:
    x, y = operands(np.float64)
    contract.check(sums, x, y)


@pytest.mark.interpret
@pytest.mark.parametrize("program", PROGRAMS)
def test_infinities_stay(program) -> None:
    x, y = (a.ravel() for a in np.meshgrid(np.float32([np.inf, -np.inf]), np.float32([0, 0.5, 1])))
    got = interpreter.run(contract.build(program, x, y), x, y)
    for mine, want in zip(got, program(x, y), strict=True):
        np.testing.assert_array_equal(mine, want)


@pytest.mark.interpret
def test_hard_labels_keep_their_digits() -> None:
    x = np.linspace(0, 80, 301, dtype=np.float32)
    x, y = np.concatenate([x, -x]), np.repeat(np.float32([1, 0]), x.size)
    loss, gradients = interpreter.run(contract.build(sums, x, y), x, y)
    magnitude = np.exp(-np.abs(x).astype(np.float64))
    np.testing.assert_allclose(loss, np.log1p(magnitude), rtol=1e-5)
    expected = np.where(y == 1, -1, 1) * magnitude / (1 + magnitude)
    np.testing.assert_allclose(gradients, expected, rtol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("other", range(len(OTHERS)))
def test_what_is_left_alone(other: int) -> None:
    spec = contract.check(OTHERS[other], *operands())
    assert "of_odds" not in ops_of(spec)


def test_many_shared_factors_take_no_time() -> None:
    def doubled(x, y):
        for _ in range(60):
            x, y = x * x, y + y
        return x * y + y

    contract.build(doubled, *operands())
