"""What follows a product becomes part of cuBLAS's call only where XLA makes it so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from partitions import context, trace

from jevt.partition import epilogues, partition

X, W, B = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((16384, 1024), (1024, 1024), (1024,))
)
WIDE = jax.ShapeDtypeStruct((3072,), jnp.bfloat16)
EXACT = jax.ShapeDtypeStruct((1024,), jnp.float32)
ROW = jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16)


def given(x, w, bias):
    return x @ w + bias


def seen_otherwise(x, w, bias):
    return x @ w + bias.reshape(1024)


def scaled(x, w, bias):
    return jax.nn.relu((x @ w) * 0.125 + bias)


def sliced(x, w, bias):
    return x @ w + bias[1024:2048]


def cast(x, w, bias):
    return x @ w + bias.astype(x.dtype)


def behind_a_barrier(x, w, bias):
    return x @ w + lax.optimization_barrier(bias)


def sums(jaxpr):
    return frozenset(eqn.outvars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "add")


@pytest.mark.parametrize(("fun", "bias"), [(given, B), (seen_otherwise, ROW), (scaled, B)])
def test_inputs_of_the_program_are_taken_along(fun, bias):
    jaxpr = trace(fun, X, W, bias)[0]
    assert not epilogues.apart(jaxpr)
    assert [group.target for group in partition(jaxpr, context("auto")).groups] == ["xla"]


@pytest.mark.parametrize(("fun", "bias"), [(sliced, WIDE), (cast, EXACT), (behind_a_barrier, B)])
def test_what_is_computed_is_added_apart(fun, bias):
    jaxpr = trace(fun, X, W, bias)[0]
    assert epilogues.apart(jaxpr) == sums(jaxpr)
    (group,) = (g for g in partition(jaxpr, context("auto")).groups if g.kind == "gemm")
    assert group.target == "triton" and group.predicted_us < group.xla_us
    (alone,) = partition(trace(given, X, W, B)[0], context("auto")).groups
    assert group.xla_us > alone.xla_us + 2 * 16384 * 1024 * 2 / context("auto").device.bytes_per_us


def test_what_follows_products_that_xla_multiplies_together_is_apart():
    def both(x, w, v, bias):
        return x @ w + bias, x @ v

    jaxpr = trace(both, X, W, W, B)[0]
    assert epilogues.apart(jaxpr) == sums(jaxpr)


def test_two_products_are_added_apart():
    jaxpr = trace(lambda x, y, w, v: x @ w + y @ v, X, X, W, W)[0]
    assert epilogues.apart(jaxpr) == sums(jaxpr)
