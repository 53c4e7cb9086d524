"""Kernels that reduce along rows: the gradients of biases and norms, BatchNorm's statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import Case, suite
from benchmarks.kernels.rowwise import layer_norm
from benchmarks.options import Size

_DTYPE = jnp.bfloat16
# (rows, columns): BERT-Large's and ViT-B/14's feed-forward networks.
_LINEAR = {"full": ((16384, 4096), (32768, 3072)), "smoke": ((32, 64),)}
# (rows, columns): the tokens of BERT-Large and of ViT-B/14.
_NORM = {"full": ((16384, 1024), (32768, 768)), "smoke": ((32, 64),)}
# (batch, height, width, channels) of ResNet-50's second and fourth stage.
_IMAGES = {"full": ((128, 56, 56, 256), (128, 14, 14, 1024)), "smoke": ((2, 4, 4, 8),)}


def bias_gradient(dy: jax.Array) -> jax.Array:
    """The sum over all rows."""
    return dy.astype(jnp.float32).sum(0).astype(dy.dtype)


def gelu_gradient(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient of gelu's input, and of the bias that was added to it."""
    dx = jax.vjp(lambda x: jax.nn.gelu(x, approximate=False), x)[1](dy)[0]
    return dx, bias_gradient(dx)


def layer_norm_gradients(
    x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array
) -> tuple[jax.Array, ...]:
    """The gradients of layer norm's input, scale and bias."""
    return jax.vjp(layer_norm, x, scale, bias)[1](dy)


def batch_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and mean square of each channel."""
    wide = x.astype(jnp.float32)
    return wide.mean((0, 1, 2)), jnp.square(wide).mean((0, 1, 2))


def batch_norm_sums(
    x: jax.Array, mean: jax.Array, scale: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums that BatchNorm's gradient needs behind a ReLU: of dy, and of dy times normal x."""
    normal = (x.astype(jnp.float32) - mean) * scale
    masked = jnp.where(normal > 0, dy.astype(jnp.float32), 0)
    return masked.sum((0, 1, 2)), (masked * normal).sum((0, 1, 2))


@suite("columnwise")
def columnwise(size: Size) -> Sequence[Case]:
    """Bias, gelu and layer norm gradients; BatchNorm's statistics and gradient sums."""
    made = []
    for shape in _LINEAR[size]:
        made += [
            _case("bias-gradient", bias_gradient, shape, ("full",), 1),
            _case("gelu-gradient", gelu_gradient, shape, ("full", "full"), 3),
        ]
    for shape in _NORM[size]:
        operands = ("full", "vector", "vector", "full")
        made.append(_case("layernorm-gradients", layer_norm_gradients, shape, operands, 3))
    for shape in _IMAGES[size]:
        made += [
            _case("batch-statistics", batch_statistics, shape, ("full",), 1),
            _case(
                "batchnorm-sums", batch_norm_sums, shape, ("full", "vector", "vector", "full"), 2
            ),
        ]
    return made


def _case(
    family: str,
    function: Callable[..., Any],
    shape: tuple[int, ...],
    operands: tuple[str, ...],
    passes: int,
) -> Case:
    """A case whose traffic is ``passes`` full tensors; vectors are float32, one value a column."""

    def args(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.PRNGKey(seed), len(operands))
        return tuple(
            jax.random.normal(key, shape, _DTYPE)
            if kind == "full"
            else 1 + 0.1 * jax.random.normal(key, shape[-1:])
            for key, kind in zip(keys, operands, strict=True)
        )

    traffic = passes * math.prod(shape) * jnp.dtype(_DTYPE).itemsize
    name = f"{family}-{'x'.join(map(str, shape))}-bfloat16"
    return Case(name, function, args, bytes=traffic, batches=4)
