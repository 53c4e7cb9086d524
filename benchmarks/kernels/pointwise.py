"""Chains of pointwise operations: one read and one write, however long the chain."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import Case, suite
from benchmarks.options import Size

_DTYPES = ("bfloat16", "float32")


def chain(x: jax.Array, y: jax.Array) -> jax.Array:
    """Ten pointwise operations on two arrays of one shape, results of order one."""
    z = x * 0.5  # 1
    z = z + y  # 2
    z = jnp.tanh(z)  # 3
    z = z * x  # 4
    z = jnp.maximum(z, y)  # 5
    z = jnp.exp(-jnp.abs(z))  # 6, 7, 8
    z = z - 0.25  # 9
    return z * y  # 10


@suite("pointwise")
def pointwise(size: Size) -> Sequence[Case]:
    """The chain on 64 Mi elements."""
    elements = 2**26 if size == "full" else 2**12
    return [_chain(elements, dtype) for dtype in _DTYPES]


def _chain(elements: int, dtype: str) -> Case:
    def args(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.PRNGKey(seed))
        return tuple(jax.random.normal(k, (elements,), dtype) for k in keys)

    size = f"{elements >> 20}Mi" if elements >= 2**20 else str(elements)
    traffic = 3 * elements * jnp.dtype(dtype).itemsize
    return Case(f"chain10-{size}-{dtype}", chain, args, bytes=traffic)
