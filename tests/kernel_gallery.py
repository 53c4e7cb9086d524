"""The kernels whose printed text is kept in ``tests/golden/kernels``, one or two a family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
from jax import lax
from jax.extend.core import primitives

from jevt.lowering import spec as lowering
from jevt_kernels.spec import KernelSpec

BFLOAT16 = contract.BFLOAT16


def tensor(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def bias_gelu(x: Any, bias: Any) -> Any:
    return jax.nn.gelu(x + bias, approximate=False)


def adamw(w: Any, m: Any, v: Any, g: Any, step: Any) -> Any:
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g * g
    rate = 1e-3 * lax.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return w - rate * (m / (lax.sqrt(v) + 1e-8) + 0.01 * w), m, v


def dropout(k0: Any, k1: Any, x: Any) -> Any:
    position = lax.iota(jnp.uint32, x.size).reshape(x.shape)
    high, low = primitives.threefry2x32_p.bind(k0, k1, jnp.zeros(x.shape, jnp.uint32), position)
    keep = (high ^ low) < np.uint32(0.9 * 2**32)
    return jnp.where(keep, x / 0.9, 0)


def split_heads(qkv: Any, bias: Any) -> Any:
    """The queries by head, from the projection to queries, keys and values."""
    batch, length, width = qkv.shape
    queries = (qkv[:, :, : width // 3] + bias).reshape(batch, length, 16, width // 48)
    return queries.transpose(0, 2, 1, 3) / 8


def transposed(x: Any) -> Any:
    return x.T * 2


def softmax(x: Any) -> Any:
    return jax.nn.softmax(x, axis=-1)


def masked_softmax(x: Any) -> Any:
    row = lax.broadcasted_iota(np.int32, x.shape, 2)
    column = lax.broadcasted_iota(np.int32, x.shape, 3)
    return jax.nn.softmax(jnp.where(row >= column, x / 8, -jnp.inf), axis=-1)


def layer_norm(x: Any, scale: Any, bias: Any) -> Any:
    wide = x.astype(np.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    y = (wide - mean) * lax.rsqrt(variance + 1e-6) * scale + bias
    return y.astype(x.dtype), mean[..., 0], variance[..., 0]


def layer_norm_gradient(x: Any, mean: Any, rstd: Any, scale: Any, dy: Any) -> Any:
    """By the input alone."""
    wide, dy = x.astype(np.float32), dy.astype(np.float32)
    normal = (wide - mean[:, None]) * rstd[:, None]
    d = dy * scale
    first = d.mean(-1, keepdims=True)
    second = (d * normal).mean(-1, keepdims=True)
    return ((d - first - normal * second) * rstd[:, None]).astype(x.dtype)


def layer_norm_all_gradients(x: Any, mean: Any, rstd: Any, scale: Any, dy: Any) -> Any:
    """By the input, the scale and the bias."""
    wide, slope = x.astype(np.float32), dy.astype(np.float32)
    normal = (wide - mean[:, None]) * rstd[:, None]
    dx = layer_norm_gradient(x, mean, rstd, scale, dy)
    return dx, (slope * normal).sum(0), slope.sum(0)


def bias_gradient(x: Any, dy: Any) -> Any:
    """Through a relu."""
    d = jnp.where(x > 0, dy, 0)
    return d, d.astype(np.float32).sum(0)


def integers(x: Any, y: Any) -> Any:
    return lax.div(x, y), lax.rem(x, y), lax.shift_left(x, y), x.astype(np.float32) > 0


GALLERY: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "pointwise_bias_gelu": (
        bias_gelu,
        (tensor(16384, 4096, dtype=BFLOAT16), tensor(4096, dtype=BFLOAT16)),
    ),
    "pointwise_adamw": (adamw, (*(tensor(1000, 1024),) * 4, tensor())),
    "pointwise_dropout": (
        dropout,
        (tensor(dtype=np.uint32), tensor(dtype=np.uint32), tensor(512, 1024, dtype=BFLOAT16)),
    ),
    "pointwise_split_heads": (
        split_heads,
        (tensor(8, 512, 3072, dtype=BFLOAT16), tensor(1024, dtype=BFLOAT16)),
    ),
    "pointwise_transposed": (transposed, (tensor(1000, 600),)),
    "pointwise_integers": (integers, (tensor(777, dtype=np.int32), tensor(777, dtype=np.int32))),
    "rowwise_softmax": (softmax, (tensor(4096, 1000),)),
    "rowwise_softmax_looped": (softmax, (tensor(256, 131072),)),
    "rowwise_softmax_parts": (softmax, (tensor(8, 1000000, dtype=BFLOAT16),)),
    "rowwise_masked_softmax": (masked_softmax, (tensor(2, 16, 512, 512, dtype=BFLOAT16),)),
    "rowwise_layer_norm": (
        layer_norm,
        (tensor(16384, 1024, dtype=BFLOAT16), tensor(1024), tensor(1024)),
    ),
    "rowwise_layer_norm_gradient": (
        layer_norm_gradient,
        (
            tensor(16384, 1024, dtype=BFLOAT16),
            *(tensor(16384), tensor(16384), tensor(1024)),
            tensor(16384, 1024, dtype=BFLOAT16),
        ),
    ),
    "columnwise_bias_gradient": (bias_gradient, (tensor(16384, 4096, dtype=BFLOAT16),) * 2),
    "columnwise_layer_norm_gradients": (
        layer_norm_all_gradients,
        (
            tensor(16384, 1024, dtype=BFLOAT16),
            *(tensor(16384), tensor(16384), tensor(1024)),
            tensor(16384, 1024, dtype=BFLOAT16),
        ),
    ),
    "rowwise_logsumexp_30528": (
        lambda x: jax.nn.logsumexp(x, axis=-1),
        (tensor(4096, 30528, dtype=np.float16),),
    ),
    "rowwise_float16_30528": (softmax, (tensor(4096, 30528, dtype=np.float16),)),
}


def spec(name: str) -> KernelSpec:
    """The kernel, with its jaxpr as comment."""
    function, operands = GALLERY[name]
    jaxpr = contract.group(function, *operands)
    built = lowering.build(jaxpr, name)
    return dataclasses.replace(built, comment=str(jaxpr))
