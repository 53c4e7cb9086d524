"""Layers that passes rewrite for kernels, on a GPU: the way is taken, and gradients are right."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jevt

pytestmark = pytest.mark.gpu

BFLOAT16 = jnp.bfloat16


def projections(params, x):
    """Queries, keys and values, each a product of its own; enough of an attention to read them."""
    q, k, v = (x @ params[name] for name in ("q", "k", "v"))
    return x + jnp.tanh(q) * jax.nn.sigmoid(k) * v


def perceptron(params, x):
    hidden = jax.nn.gelu(x @ params["up"] + params["bias"], approximate=False)
    return hidden @ params["down"]


def bottleneck(params, x):
    """The end of a ResNet's bottleneck: a product whose batch norm, residual and relu follow."""
    norm = nn.BatchNorm(use_running_average=False, dtype=BFLOAT16)
    y = jax.nn.relu(x @ params["in"])
    statistics = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
    z, _ = norm.apply(
        {"params": params["norm"], "batch_stats": statistics},
        y @ params["out"],
        mutable=["batch_stats"],
    )
    return jax.nn.relu(x + z)


def stem(params, x):
    y = jax.nn.relu(x * params["scale"])
    return nn.max_pool(y, (3, 3), (2, 2), "SAME")


def text(params, x):
    """Convolutions of several widths over one document."""
    apart = [
        nn.Conv(32, (width,), strides=(2,), dtype=BFLOAT16).apply({"params": params[str(width)]}, x)
        for width in (2, 4, 8)
    ]
    return jnp.concatenate([jax.nn.relu(y) for y in apart], -1)


def step(layer, params, x, g):
    """The result y and the gradients of Σ g·y²/2."""
    y, pull = jax.vjp(layer, params, x)
    return y, pull(g.astype(y.dtype) * y)


def arguments(layer, params, shape):
    rng = np.random.default_rng(0)

    def draw(size):
        return jnp.asarray(rng.standard_normal(size), BFLOAT16)

    values = jax.tree.map(draw, params, is_leaf=lambda s: isinstance(s, tuple))
    matrices = jax.tree.map(lambda a: a / a.shape[-2] ** 0.5 if a.ndim > 1 else a, values)
    x = draw(shape)
    return matrices, x, draw(jax.eval_shape(layer, matrices, x).shape)


def checked(layer, params, shape):
    """The plan's equations, by who runs them; values against ``jax.jit`` in float32."""
    args = arguments(layer, params, shape)
    run = jevt.jit(functools.partial(step, layer))
    got = jax.tree.leaves(run(*args))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), args)
    with jax.default_matmul_precision("float32"):
        want = jax.tree.leaves(jax.jit(functools.partial(step, layer))(*wide))
        plain = jax.tree.leaves(jax.jit(functools.partial(step, layer))(*args))
    for mine, theirs, exact in zip(got, plain, want, strict=True):
        mine, theirs, exact = (np.asarray(a, np.float64) for a in (mine, theirs, exact))
        scale = np.linalg.norm(exact)
        error, usual = np.linalg.norm(mine - exact) / scale, np.linalg.norm(theirs - exact) / scale
        assert error < max(2e-2, 1.5 * usual), (error, usual)
    groups = jevt.last_trace(run).plan.groups
    return {
        target: [e.primitive.name for g in groups if g.target == target for e in g.jaxpr.eqns]
        for target in ("triton", "xla")
    }


def test_products_are_added_up():
    sizes = dict.fromkeys(("q", "k", "v"), (1024, 1024))
    assert "product_sum" in checked(projections, sizes, (16, 256, 1024))["triton"]


def test_derivatives_are_kept():
    sizes = {"up": (512, 2048), "bias": (2048,), "down": (2048, 512)}
    eqns = checked(perceptron, sizes, (32, 256, 512))
    both = eqns["triton"] + eqns["xla"]
    assert both.count("erfc") == 1 and "optimization_barrier" in both


def test_a_product_and_its_batch_norm():
    sizes = {
        "in": (256, 64),
        "out": (64, 256),
        "norm": {"scale": (256,), "bias": (256,)},
    }
    eqns = checked(bottleneck, sizes, (64, 56, 56, 256))
    assert "product_sum" in eqns["triton"]
    assert not {"norm_statistics", "norm_gradient"} & set(eqns["triton"] + eqns["xla"])


def test_a_pool_and_its_gradient():
    eqns = checked(stem, {"scale": (64,)}, (16, 112, 111, 64))
    assert {"pool", "pool_gradient"} <= set(eqns["xla"])


def test_convolutions_of_one_input():
    sizes = {str(w): {"kernel": (w, 304, 32), "bias": (32,)} for w in (2, 4, 8)}
    eqns = checked(text, sizes, (256, 512, 304))
    assert eqns["xla"].count("conv_general_dilated") == 5  # three for the input's gradient
