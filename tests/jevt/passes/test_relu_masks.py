"""The gradient's mask of a relu is taken from its result, and is the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Var
from rewriting import EDGES, evaluate, rewritten, same, traced

from jevt.passes import relu_masks

X = jnp.asarray(EDGES)


def gradient(x, y):
    return jax.vjp(jax.nn.relu, x)[1](y)[0]


def forward_and_backward(x, y):
    result, vjp = jax.vjp(jax.nn.relu, x)
    return result, vjp(y)[0]


def comparisons(jaxpr):
    return [eqn for eqn in jaxpr.eqns if eqn.primitive is lax.gt_p]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_mask_is_taken_from_the_result(dtype):
    args = X.astype(dtype), jnp.ones_like(X, dtype)
    before = traced(forward_and_backward, *args)
    after = rewritten(relu_masks.run, before)
    (mask,) = comparisons(after)
    assert mask.invars[0] is after.outvars[0]
    # An infinity, a NaN, zeros of both signs.
    same(evaluate(after, *args), evaluate(before, *args))


def test_of_another_constant_that_stands_first():
    def program(x, y):
        largest = lax.max(jnp.float32(6.0), x)
        return largest, jnp.where(x > 6.0, y, 0.0)

    before = traced(program, X, X + 1)
    after = rewritten(relu_masks.run, before)
    (mask,) = comparisons(after)
    assert mask.invars[0] is after.outvars[0]
    same(evaluate(after, X, X + 1), evaluate(before, X, X + 1))


def test_in_the_body_of_a_loop():
    def loss(w, x):
        def layer(x, w):
            return jax.nn.relu(x * w), None

        return lax.scan(layer, x, w)[0].sum()

    w, x = jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.arange(-2.0, 2.0)
    before = traced(jax.grad(loss), w, x)
    after = rewritten(relu_masks.run, before)
    assert after is not before
    same(evaluate(after, w, x), evaluate(before, w, x))


@pytest.mark.parametrize(
    "fun",
    [
        gradient,  # nobody computes the relu
        lambda x, y: (jnp.maximum(x, 1.0), jnp.where(x > 0.0, y, 0.0)),
        lambda x, y: (jnp.maximum(x, 0.0), jnp.where(x >= 0.0, y, 0.0)),
        lambda x, y: (jnp.maximum(x, 0.0), jnp.where(x < 0.0, y, 0.0)),
        lambda x, y: (jnp.minimum(x, 0.0), jnp.where(x > 0.0, y, 0.0)),
        lambda x, y: (jnp.maximum(x, y), jnp.where(x > y, y, 0.0)),
        lambda x, y: (jnp.where(x > 0.0, y, 0.0), jnp.maximum(x, 0.0)),  # computed afterwards
        lambda x, y: (jnp.maximum(x, -jnp.inf), jnp.where(x > -jnp.inf, y, 0.0)),
    ],
)
def test_left_alone(fun):
    before = traced(fun, X, X + 1)
    assert relu_masks.run(before) is before


def test_constants_that_are_equal_as_floats_only():
    """Of which the smaller one has another mask than the result's."""
    with jax.enable_x64(True):
        least = 2**53
        x = jnp.asarray([least - 1, least, least + 1, least + 2])
        before = traced(lambda x: (lax.max(x, np.int64(least + 1)), x > np.int64(least)), x)
        assert relu_masks.run(before) is before


def test_complex_numbers():
    x = jnp.asarray([1 + 2j, -1j], jnp.complex64)
    before = traced(lambda x: lax.max(x, np.complex64(1)), x)
    assert relu_masks.run(before) is before


def test_nothing_else_reads_what_the_relu_reads():
    """A layer keeps its result for the backward pass, not what its relu reads."""

    def step(x, w, v, dy):
        def layers(w, v):
            return jax.nn.relu(x @ w) @ v

        return jax.vjp(layers, w, v)[1](dy)

    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal((8, 8)), jnp.float32) for _ in range(4)]
    before = traced(step, *args)
    after = rewritten(relu_masks.run, before)

    def readers(jaxpr):
        (relu,) = (eqn for eqn in jaxpr.eqns if eqn.primitive is lax.max_p)
        (read,) = (a for a in relu.invars if isinstance(a, Var))
        return sum(read in eqn.invars for eqn in jaxpr.eqns)

    assert (readers(before), readers(after)) == (2, 1)
    same(evaluate(after, *args), evaluate(before, *args))
