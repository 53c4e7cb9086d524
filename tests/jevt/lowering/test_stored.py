"""What is in memory anyway is read from there by XLA's products, behind a barrier."""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from partitions import context, trace

from jevt.lowering import emit
from jevt.partition import partition

N, C = 1 << 15, 128


def convolved(x, scale):
    y = jax.nn.relu(x * scale).reshape(32, 32, 32, C)
    kernel = jnp.full((3, 3, C, C), 0.01, x.dtype)
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=dims)


def product_of_what_a_call_reads(x, scale, d):
    return convolved(x, scale), jax.nn.relu(x * scale).T @ d


def product_alone(x, scale, d):
    return jax.nn.relu(x * scale).T @ d


def product_of_an_input(x, scale, d):
    return convolved(x, scale), x.T @ d


def lowered(fun, *args, platform="cuda"):
    """The jaxpr that is lowered; none of its groups is a kernel of ours."""
    plan = partition(trace(fun, *args)[0], context("auto"))
    return emit.lower(plan, context("auto", platform=platform))[0]


def arguments(rows=N):
    rng = np.random.default_rng(0)
    shapes = ((rows, C), (C,), (rows, C))
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def barriers(jaxpr):
    return [eqn for eqn in jaxpr.eqns if eqn.primitive is lax.optimization_barrier_p]


def test_a_product_reads_what_a_call_reads():
    jaxpr = lowered(product_of_what_a_call_reads, *arguments())
    jax.extend.core.check_jaxpr(jaxpr)
    (barrier,) = barriers(jaxpr)
    (product,) = (eqn for eqn in jaxpr.eqns if eqn.primitive is lax.dot_general_p)
    readers = [eqn for eqn in jaxpr.eqns if barrier.outvars[0] in eqn.invars]
    assert readers and all(product is eqn or product.invars[0] in eqn.outvars for eqn in readers)
    args = arguments()
    got = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)
    for a, b in zip(got, jax.jit(product_of_what_a_call_reads)(*args), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("fun", "rows"),
    [(product_alone, N), (product_of_an_input, N)],
    ids=["nobody else reads it", "an input"],
)
def test_left_alone(fun, rows):
    assert not barriers(lowered(fun, *arguments(rows)))


def test_cpus_have_none():
    assert not barriers(lowered(product_of_what_a_call_reads, *arguments(), platform="cpu"))


def test_small_values_are_left_alone(monkeypatch):
    monkeypatch.setattr("jevt.lowering.stored._LEAST", 1 << 30)
    assert not barriers(lowered(product_of_what_a_call_reads, *arguments()))
