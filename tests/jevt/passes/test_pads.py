"""Sums of padded pieces: side by side where they touch, left alone where they do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewriting import rewritten, traced

from jevt.passes import canonicalize, dce

X = np.arange(1.0, 61.0, dtype=np.float32).reshape(3, 20)


def names(jaxpr):
    return [eqn.primitive.name for eqn in jaxpr.eqns]


def gradient(pieces):
    """The gradient of the sum of differently scaled pieces of x."""
    return jax.grad(lambda x: sum((i + 1.0) * (p**2).sum() for i, p in enumerate(pieces(x))))


def pad(x, low, high, value=0.0, interior=0):
    return lax.pad(x, np.float32(value), ((0, 0, 0), (low, high, interior)))


JOINED = {
    "split in two": gradient(lambda x: jnp.split(x, 2, axis=1)),
    "split in five": gradient(lambda x: jnp.split(x, 5, axis=1)),
    "split along the first axis": gradient(lambda x: jnp.split(x, 3, axis=0)),
    "uneven": gradient(lambda x: jnp.split(x, [3, 7], axis=1)),
    "slices": gradient(lambda x: (x[:, :8], x[:, 8:])),
    "the first three of five": gradient(lambda x: (x[:, :4], x[:, 4:8], x[:, 8:12])),
    "not the whole": lambda x: pad(x, 2, 25) + pad(x, 22, 5),
}


@pytest.mark.parametrize("name", JOINED)
def test_touching_pieces_are_concatenated(name):
    before = traced(JOINED[name], X)
    after = dce.run(rewritten(canonicalize.run, before))
    assert "concatenate" in names(after)
    assert names(after).count("pad") <= ("not the whole" in name) + ("first" in name)
    got, want = (jax.core.eval_jaxpr(j, j.consts, X)[0] for j in (after, before))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: pad(x, 0, 19) + pad(x, 19, 0),  # overlap
        lambda x: pad(x, 0, 21) + pad(x, 21, 0),  # a gap
        lambda x: pad(x, 0, 20, 1.0) + pad(x, 20, 0, 1.0),  # not zeros
        lambda x: pad(x, 0, 39, interior=1) + pad(x, 39, 0, interior=1),  # spread
        lambda x: pad(x, 0, 20) + pad(x, 20, 0)[::-1],  # something between
        lambda x: pad(x, 0, 20) * pad(x, 20, 0),  # not a sum
        lambda x: pad(x, 5, -5) + pad(x, -5, 5),  # cut
    ],
)
def test_left_alone(function):
    before = traced(function, X)
    after = rewritten(canonicalize.run, before)
    assert names(after) == names(before)
    got, want = (jax.core.eval_jaxpr(j, j.consts, X)[0] for j in (after, before))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.0])
def test_special_values_stay_in_their_piece(value):
    x = X.copy()
    x[1, 3] = value
    before = traced(lambda x: pad(x, 0, 20) + pad(x, 20, 0), x)
    after = rewritten(canonicalize.run, before)
    got, want = (np.asarray(jax.core.eval_jaxpr(j, j.consts, x)[0]) for j in (after, before))
    np.testing.assert_array_equal(got, want)
