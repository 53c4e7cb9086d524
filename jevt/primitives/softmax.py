"""``softmax_statistics`` and ``softmax_gradient``: a softmax's rows, and its gradient.

    softmax_statistics:  x                     -> maximum total
    softmax_gradient:    x maximum total g     -> dx

Over the elements along ``axes``,

    maximum = max x,  where ``guarded`` 0 if that is not finite
    total = Σ exp(x - maximum)
    p = exp(x - maximum) / total
    dx = p·(g - Σ p·g)

The rest is arithmetic element by element and stays equations: p itself, the logarithm of a softmax
``(x - maximum) - log total``, the logsumexp ``log total + maximum``, and its gradient, which is p
times a number a row. So two primitives serve all of them, and a cross entropy as well, which is the
difference of a logsumexp and of the target's x. The maximum is kept beside the total, not
the logsumexp instead of both, because ``x - maximum`` is exact to a rounding of itself, however
far from 0 the row lies.

Raising passes put them in, and :mod:`jevt.passes.expand_composites` takes those out again that no
kernel or library takes whole. They come after differentiation and batching, so they have no rules
for either.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jevt import _jax_internals as internals
from jevt.primitives._define import composite
from jevt.primitives.norms import kept


def _statistics_type(x: Any, *, axes: tuple[int, ...], guarded: bool) -> list[Any]:
    del guarded
    _check("softmax_statistics", x, axes)
    return [internals.array_like(x, kept(x.shape, axes), x.dtype)] * 2


def _gradient_type(x: Any, maximum: Any, total: Any, g: Any, *, axes: tuple[int, ...]) -> list[Any]:
    _check("softmax_gradient", x, axes)
    rows = kept(x.shape, axes)
    if maximum.shape != rows or total.shape != rows or g.shape != x.shape:
        raise ValueError(
            f"softmax_gradient: expected statistics of shape {rows} and a cotangent of shape"
            f" {x.shape}, got {maximum.shape}, {total.shape} and {g.shape}"
        )
    return [internals.array_like(x, x.shape, x.dtype)]


def _check(name: str, x: Any, axes: tuple[int, ...]) -> None:
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: expected x in float32 or float64, got {x.dtype}; cast it")
    if not axes or tuple(sorted(set(axes))) != axes or not 0 <= axes[0] <= axes[-1] < len(x.shape):
        raise ValueError(f"{name}: expected ascending axes of {len(x.shape)}, got {axes}")


def statistics(x: jax.Array, *, axes: tuple[int, ...], guarded: bool) -> list[jax.Array]:
    """The maximum and the sum of exponentials of each row, in plain JAX.

    Args:
      x: of any shape, float32 or float64.
      axes: over which they run, ascending.
      guarded: whether 0 is subtracted where the maximum is not finite.
    """
    maximum = jnp.max(x, axes)
    if guarded:
        maximum = jnp.where(jnp.isfinite(maximum), maximum, 0.0)
    return [maximum, jnp.sum(jnp.exp(x - jnp.expand_dims(maximum, axes)), axes)]


def gradient(
    x: jax.Array, maximum: jax.Array, total: jax.Array, g: jax.Array, *, axes: tuple[int, ...]
) -> list[jax.Array]:
    """The cotangent of x, in plain JAX.

    Args:
      x: of which the softmax is.
      maximum: of the statistics.
      total: of the statistics.
      g: the cotangent of the softmax, like x.
      axes: over which the softmax runs, ascending.
    """
    g = g.astype(x.dtype)
    probability = jnp.exp(x - jnp.expand_dims(maximum, axes)) / jnp.expand_dims(total, axes)
    return [probability * (g - jnp.sum(probability * g, axes, keepdims=True))]


softmax_statistics_p = composite("softmax_statistics", _statistics_type, statistics, several=True)
softmax_gradient_p = composite("softmax_gradient", _gradient_type, gradient, several=True)
