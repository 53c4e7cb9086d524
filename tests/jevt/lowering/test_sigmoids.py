"""Sigmoids and softplus from one exponential."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import interpreter, visitor

EDGES = (0.0, -0.0, 1e-30, -1e-4, 0.3, -1.0, 5.0, -17.0, 88.0, -89.0, 104.0, -1e30, np.inf, -np.inf)


def softplus(x):
    """As the passes spell ``jax.nn.softplus``."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def bce(x, y):
    """As optax has it, and its gradient."""
    loss = y * softplus(-x) + (1 - y) * softplus(x)
    return loss, (1 - y) * jax.nn.sigmoid(x) - y * jax.nn.sigmoid(-x)


PROGRAMS = {
    "binary cross entropy": (bce, 2),
    "softplus": (lambda x, y: softplus(x) * y, 1),
    "both sigmoids": (lambda x, y: (jax.nn.sigmoid(x), jax.nn.sigmoid(-x) * y), 2),
    "of a negative": (
        lambda x, y: (jnp.log1p(jnp.exp(-jnp.abs(-x))), jax.nn.sigmoid(jnp.negative(-x)) * y),
        2,
    ),
}


def ops_of(spec):
    return [node.op for node in spec.tree if isinstance(node, visitor.Compute)]


@pytest.mark.interpret
@pytest.mark.parametrize("name", PROGRAMS)
def test_values(name: str) -> None:
    function, _ = PROGRAMS[name]
    x = np.concatenate([np.float32(EDGES), np.float32([np.nan])])
    x = np.concatenate([x, contract.random((500,)) * 8])
    contract.check(function, x, np.abs(contract.random(x.shape, seed=1)))


@pytest.mark.interpret
def test_small_losses_keep_their_digits() -> None:
    x = np.linspace(0, 80, 301, dtype=np.float32)
    (got,) = interpreter.run(contract.build(softplus, -x), -x)
    np.testing.assert_allclose(got, np.log1p(np.exp(-x.astype(np.float64))), rtol=1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_exponential(name: str) -> None:
    function, arguments = PROGRAMS[name]
    x = np.zeros(5, np.float32)
    ops = ops_of(contract.build(function, x, x))
    assert ops.count("exp") == 1
    assert sum(map(ops.count, ("log1p_of_unit", "logistic_of", "of_odds"))) >= arguments
    assert "log1p" not in ops
    assert "logistic" not in ops


def test_what_is_left_alone() -> None:
    """A sigmoid by itself, those of different arguments, and other exponentials."""

    def function(x, y):
        return jax.nn.sigmoid(x), jax.nn.sigmoid(y), jnp.log1p(jnp.exp(x)), jnp.exp(-jnp.abs(x + y))

    x = np.zeros(5, np.float32)
    ops = ops_of(contract.build(function, x, x))
    assert ops.count("logistic") == 2
    assert "log1p" in ops
    assert not {"logistic_of", "log1p_of_unit"} & set(ops)
