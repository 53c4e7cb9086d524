"""The device's ceilings, measured: bf16 matrix product and copy. Everything else is a fraction."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.messages import Ceilings
from benchmarks.options import Size

# (side of the square matrices, elements copied)
_SIZES: dict[Size, tuple[int, int]] = {"full": (8192, 2**30), "smoke": (256, 2**20)}


def measure(size: Size) -> Ceilings:
    """Measures both ceilings with random data in a few hundred milliseconds of device time."""
    side, elements = _SIZES[size]
    k1, k2, k3 = jax.random.split(jax.random.PRNGKey(0), 3)
    a = jax.random.normal(k1, (side, side), jnp.bfloat16)
    b = jax.random.normal(k2, (side, side), jnp.bfloat16)
    x = jax.random.normal(k3, (elements,), jnp.bfloat16)
    matmul = _best_seconds(jax.jit(jnp.matmul), a, b)
    copy = _best_seconds(jax.jit(jnp.copy), x)
    return Ceilings(flops=2 * side**3 / matmul, bytes=2 * x.nbytes / copy)


def _best_seconds(fun: Callable[..., jax.Array], *args: jax.Array, blocks: int = 5) -> float:
    """The shortest of several pipelined blocks' seconds per call: a ceiling is what can be."""
    calls = 8
    for _ in range(3):
        jax.block_until_ready(fun(*args))
    best = float("inf")
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(calls):
            out = fun(*args)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / calls)
    return best
