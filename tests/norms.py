"""Norms in many spellings: what the tests of raising share."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Jaxpr, check_jaxpr

from jevt.passes import cse, dce, expand_composites, raise_norms
from jevt.pipeline import GRAPH_PASSES


def canonical(fun: Callable, *args) -> Jaxpr:
    """The jaxpr of ``fun`` in front of raising."""
    jaxpr = jax.make_jaxpr(fun)(*args)
    for _, graph_pass in GRAPH_PASSES:
        jaxpr = graph_pass(jaxpr)
    return jaxpr


def raised(jaxpr: Jaxpr) -> tuple[Jaxpr, list[str]]:
    """The jaxpr with composites, and what the pass notes."""
    notes: list[str] = []
    result = dce.run(raise_norms.run(jaxpr, notes.append))
    check_jaxpr(result)
    assert result.out_avals == jaxpr.out_avals
    assert raise_norms.run(result) is result, "not idempotent"
    return result, notes


def expanded(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with equations for composites."""
    result = expand_composites.run(jaxpr)
    check_jaxpr(result)
    assert expand_composites.run(result) is result, "not idempotent"
    return dce.run(cse.run(result))


def training(norm: Callable) -> Callable:
    """``(*operands, g) -> (y, *gradients)``, y times something that depends on it."""

    def step(*args):
        *operands, g = args
        y, vjp = jax.vjp(norm, *operands)
        return y, *vjp(g)

    return step


def arrays(*shapes, dtype=jnp.float32):
    """Normal numbers around 1/2."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape) + 0.5, dtype) for shape in shapes]


def of_module(module: nn.Module) -> Callable:
    """A linen norm as a function of x, scale and bias."""

    def norm(x, scale, bias):
        return module.apply({"params": {"scale": scale, "bias": bias}}, x)

    return norm


def linen_rms(x, scale, bias):
    return nn.RMSNorm(epsilon=1e-5).apply({"params": {"scale": scale}}, x) + bias


def nnx_layer(x, scale, bias):
    graph, state = nnx.split(nnx.LayerNorm(x.shape[-1], rngs=nnx.Rngs(0)))
    state["scale"], state["bias"] = nnx.Param(scale), nnx.Param(bias)
    return nnx.merge(graph, state)(x)


def with_variance(root: Callable, axes=-1, variance: Callable = jnp.var) -> Callable:
    """A norm by hand: ``root`` says what the centred x is divided by, or multiplied with."""

    def norm(x, scale, bias):
        mean = jnp.mean(x, axes, keepdims=True)
        return root(x - mean, variance(x, axes, keepdims=True)) * scale + bias

    return norm


def _two_pass(x, axes, *, keepdims):
    return jnp.mean((x - jnp.mean(x, axes, keepdims=True)) ** 2, axes, keepdims=keepdims)


def _one_pass(x, axes, *, keepdims):
    square = jnp.mean(x * x, axes, keepdims=keepdims)
    return jax.nn.relu(square - jnp.mean(x, axes, keepdims=keepdims) ** 2)


def rms(x, scale, bias):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * scale + bias


def gemma_rms(x, scale, bias):
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + 1e-6) * (1 + scale) + bias


@jax.custom_vjp
def by_hand(x, scale, bias):
    return _by_hand_forward(x, scale, bias)[0]


def _by_hand_forward(x, scale, bias):
    c = x - x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5)
    return c * rstd * scale + bias, (c * rstd, rstd, scale)


def _by_hand_backward(residuals, g):
    xhat, rstd, scale = residuals
    d = g * scale
    dx = rstd * (d - d.mean(-1, keepdims=True) - xhat * (d * xhat).mean(-1, keepdims=True))
    return dx, (g * xhat).sum((0, 1)), g.sum((0, 1))


by_hand.defvjp(_by_hand_forward, _by_hand_backward)


def residual(x, scale, bias):
    """A norm beside which its input goes on."""
    return x + jnp.tanh(of_module(nn.LayerNorm())(x, scale, bias))


def twice(x, scale, bias):
    y = of_module(nn.LayerNorm())(x, scale, bias)
    return of_module(nn.LayerNorm())(jnp.sin(y), scale, bias)


RSQRT = lambda c, v: c * jax.lax.rsqrt(v + 1e-5)  # noqa: E731

LAYER = {
    "linen": of_module(nn.LayerNorm()),
    "linen, two passes": of_module(nn.LayerNorm(use_fast_variance=False)),
    "nnx": nnx_layer,
    "jnp.var, rsqrt": with_variance(RSQRT),
    "jnp.var, 1 / sqrt": with_variance(lambda c, v: c * (1 / jnp.sqrt(v + 1e-5))),
    "jnp.var, / sqrt": with_variance(lambda c, v: c / jnp.sqrt(v + 1e-5)),
    "jnp.var, ** -0.5": with_variance(lambda c, v: c * (v + 1e-5) ** -0.5),
    "two passes": with_variance(RSQRT, variance=_two_pass),
    "one pass": with_variance(RSQRT, variance=_one_pass),
    "jax.nn.standardize": lambda x, s, b: jax.nn.standardize(x, epsilon=1e-5) * s + b,
    "gradient by hand": by_hand,
    "residual": residual,
}

RMS = {"linen": linen_rms, "by hand": rms, "gemma": gemma_rms}


def grouped(x, scale, bias):
    """Group norm by hand."""
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, 2, c // 2)
    y = with_variance(RSQRT, (1, 3))(y, 1.0, 0.0)
    return y.reshape(x.shape) * scale + bias


def linen_batch(x, scale, bias):
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])},
    }
    module = nn.BatchNorm(use_running_average=False)
    return module.apply(variables, x, mutable=["batch_stats"])[0]


def batch_channels_first(x, scale, bias):
    y = with_variance(RSQRT, (0, 2, 3))(x.transpose(0, 3, 1, 2), 1.0, 0.0)
    return y * scale[:, None, None] + bias[:, None, None]


def nnx_group(x, scale, bias):
    module = nnx.GroupNorm(x.shape[-1], num_groups=2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    state["scale"], state["bias"] = nnx.Param(scale), nnx.Param(bias)
    return nnx.merge(graph, state)(x)


GROUP = {
    "linen": of_module(nn.GroupNorm(num_groups=2)),
    "linen, two passes": of_module(nn.GroupNorm(num_groups=4, use_fast_variance=False)),
    "linen, instance": of_module(nn.InstanceNorm()),
    "nnx": nnx_group,
    "by hand": grouped,
    "instance": with_variance(RSQRT, (1, 2)),
}

BATCH = {
    "linen": linen_batch,
    "two passes": with_variance(RSQRT, (0, 1, 2), _two_pass),
    "one pass": with_variance(RSQRT, (0, 1, 2), _one_pass),
    "/ sqrt": with_variance(lambda c, v: c / jnp.sqrt(v + 1e-5), (0, 1, 2)),
}
