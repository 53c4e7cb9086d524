"""Kernels that reduce along rows: softmax, layer norm forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import Case, suite
from benchmarks.options import Size

_DTYPES = ("bfloat16", "float32")
# (rows, columns): half of BERT-Large's attention scores; a wide row.
_SOFTMAX = {"full": ((131072, 512), (16384, 4096)), "smoke": ((32, 64),)}
# (rows, columns): the tokens of BERT-Large and of ViT-B/14.
_LAYER_NORM = {"full": ((16384, 1024), (32768, 768)), "smoke": ((32, 64),)}


def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis, in float32, in x's dtype again."""
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Layer norm over the last axis; statistics in float32."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    variance = ((wide - mean) ** 2).mean(axis=-1, keepdims=True)
    normal = (wide - mean) * jax.lax.rsqrt(variance + 1e-6)
    return (normal * scale + bias).astype(x.dtype)


def layer_norm_both_ways(
    x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Layer norm's output, and the gradient of its input given the output's cotangent."""
    y, vjp = jax.vjp(lambda x: layer_norm(x, scale, bias), x)
    return y, vjp(dy)[0]


@suite("rowwise")
def rowwise(size: Size) -> Sequence[Case]:
    """Softmax forward, layer norm forward, and layer norm forward with the gradient of x."""
    made = [_softmax(shape, dtype) for shape in _SOFTMAX[size] for dtype in _DTYPES]
    for shape in _LAYER_NORM[size]:
        for dtype in _DTYPES:
            made += [_layer_norm(shape, dtype), _layer_norm_both_ways(shape, dtype)]
    return made


def _name(family: str, shape: tuple[int, int], dtype: str) -> str:
    return f"{family}-{shape[0]}x{shape[1]}-{dtype}"


def _passes(count: int, shape: tuple[int, int], dtype: str) -> int:
    return count * shape[0] * shape[1] * jnp.dtype(dtype).itemsize


def _softmax(shape: tuple[int, int], dtype: str) -> Case:
    def args(seed: int) -> tuple[jax.Array]:
        return (jax.random.normal(jax.random.PRNGKey(seed), shape, dtype),)

    return Case(_name("softmax", shape, dtype), softmax, args, bytes=_passes(2, shape, dtype))


def _layer_norm_args(shape: tuple[int, int], dtype: str, seed: int) -> tuple[jax.Array, ...]:
    k1, k2, k3, k4 = jax.random.split(jax.random.PRNGKey(seed), 4)
    x = 2 * jax.random.normal(k1, shape, dtype) + 1
    scale = 1 + 0.1 * jax.random.normal(k2, shape[1:])
    bias = 0.1 * jax.random.normal(k3, shape[1:])
    return x, scale, bias, jax.random.normal(k4, shape, dtype)


def _layer_norm(shape: tuple[int, int], dtype: str) -> Case:
    return Case(
        _name("layernorm", shape, dtype),
        layer_norm,
        lambda seed: _layer_norm_args(shape, dtype, seed)[:3],
        bytes=_passes(2, shape, dtype),
        batches=6,
    )


def _layer_norm_both_ways(shape: tuple[int, int], dtype: str) -> Case:
    return Case(
        _name("layernorm-fwd-bwd", shape, dtype),
        layer_norm_both_ways,
        lambda seed: _layer_norm_args(shape, dtype, seed),
        bytes=_passes(4, shape, dtype),
        batches=4,
    )
