"""ResNet's bottleneck with BatchNorm and its training step, written by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv(x, w, stride=1):
    pad = w.shape[0] // 2
    return lax.conv_general_dilated(
        x, w, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=NUMBERS
    )


def statistics(y):
    """What BatchNorm asks of a layer's result: the result, its sums and those of its squares."""
    wide = y.astype(jnp.float32)
    return y, wide.sum((0, 1, 2)), jnp.square(wide).sum((0, 1, 2))


def batch_norm(y, scale, shift):
    y, total, squares = statistics(y)
    count = y.size // y.shape[-1]
    mean = total / count
    variance = squares / count - jnp.square(mean)
    normal = (y.astype(jnp.float32) - mean) * lax.rsqrt(variance + 1e-5) * scale + shift
    return normal.astype(y.dtype)


def bottleneck(params, x):
    """1×1, 3×3 and 1×1, the second strided, beside a strided shortcut; BatchNorm behind each."""
    narrow, middle, wide, shortcut = params

    def layer(x, weights, stride=1):
        w, scale, shift = weights
        return batch_norm(conv(x, w, stride), scale, shift)

    y = jax.nn.relu(layer(jax.nn.relu(layer(x, narrow)), middle, 2))
    return jax.nn.relu(layer(y, wide) + layer(x, shortcut, 2))


def step(params, x, target):
    """One step of gradient descent, and the input's gradient, as a layer before would want it."""

    def loss(params, x):
        return jnp.square(bottleneck(params, x).astype(jnp.float32) - target).mean()

    value, (gradients, dx) = jax.value_and_grad(loss, (0, 1))(params, x)
    params = jax.tree.map(lambda p, g: (p - 0.1 * g).astype(p.dtype), params, gradients)
    return value, params, dx
