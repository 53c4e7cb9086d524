"""A batch norm of a product in kernels: what takes the place of reading the product."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from jax import lax
from rewriting import relative_norm

import jevt
from jevt import pipeline
from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.passes import cse, dce, product_norms, raise_norms

M, C, N = 192, 16, 80


def layer(x, w, scale, shift, other):
    """The end of a bottleneck."""
    z = (x @ w).astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = z.mean(0)
    variance = jnp.maximum(jnp.square(z).mean(0) - jnp.square(mean), 0)
    normal = (z - mean) * (lax.rsqrt(variance + 1e-5) * scale) + shift
    return jax.nn.relu(normal.astype(x.dtype) + other)


def step(x, w, scale, shift, other, g):
    y, vjp = jax.vjp(layer, x, w, scale, shift, other)
    return y, *vjp(g)


def arguments():
    bfloat16 = contract.BFLOAT16
    return (
        contract.random((M, C), bfloat16, 0),
        contract.random((C, N), bfloat16, 1),
        contract.random((N,), np.float32, 2) + 2,
        contract.random((N,), np.float32, 3),
        contract.random((M, N), bfloat16, 4),
        contract.random((M, N), bfloat16, 5),
    )


@pytest.mark.interpret
def test_a_step_in_the_interpreter(monkeypatch):
    """As near to a reference in float64 as ``jax.jit`` is."""
    free = dataclasses.replace(DEVICES["H100"], xla_launch_us=0.0, cublas_flops_per_us=1e12)
    context = Context("cuda", "auto", False, (), free)
    passes = [
        *pipeline.GRAPH_PASSES,
        ("raise_norms", raise_norms.run),
        ("cse", cse.run),
        ("dce", dce.run),
        ("product_norms", functools.partial(product_norms.run, context=context)),
        ("dce", dce.run),
    ]
    monkeypatch.setattr(pipeline, "GRAPH_PASSES", tuple(passes))
    args = arguments()
    compiled = jevt.jit(step, backend="interpret")
    got = compiled(*args)
    plan = jevt.last_trace(compiled).plan
    names = [e.primitive.name for g in plan.groups if g.target == "triton" for e in g.jaxpr.eqns]
    # y, xᵀx, three for its product with W, xᵀg, A·Wᵀ, and three for the gradient of x.
    assert names.count("dot_general") == 10
    assert names.count("reduce_precision") == 6
    want = jax.jit(step)(*args)
    with jax.enable_x64(True):
        exact = jax.jit(step)(*(np.asarray(a, np.float64) for a in args))
    for ours, theirs, reference in zip(got, want, exact, strict=True):
        limit = 1.5 * relative_norm([theirs], [reference]) + 1e-3
        assert relative_norm([ours], [reference]) <= limit
