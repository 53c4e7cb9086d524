"""The gradient of maximum pooling, in plain arithmetic.

    pool_gradient:   dy[P…] x[N…] -> dx[N…]

It is what ``select_and_scatter_add`` computes: each window gives its gradient to its largest
element, to the first of equal ones. Here one of XLA's fusions finds the number of that element
within its window, and another one adds up, for each element, the gradients of those windows whose
largest it is. A pass puts it in, after differentiation and batching, so it has no rules for either.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jevt import _jax_internals as internals
from jevt.primitives._define import composite

type Pairs = tuple[tuple[int, int], ...]


def _type(
    dy: Any,
    x: Any,
    *,
    largest: bool,
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: Pairs,
) -> Any:
    del largest
    extents = zip(x.shape, window_dimensions, window_strides, padding, strict=True)
    pooled = tuple((n + low + high - size) // step + 1 for n, size, step, (low, high) in extents)
    if dy.shape != pooled or dy.dtype != x.dtype:
        raise ValueError(f"pool_gradient: expected gradients of shape {pooled}, got {dy} of {x}")
    return internals.array_like(x, x.shape, x.dtype)


def reference(
    dy: jax.Array,
    x: jax.Array,
    *,
    largest: bool,
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: Pairs,
) -> jax.Array:
    """The gradient of ``x``.

    Args:
      dy: gradient of the pool, of its shape.
      x: what was pooled, of the same type.
      largest: whether by its maxima, or by its minima.
      window_dimensions: extents of a window.
      window_strides: from one window to the next.
      padding: of ``x``, below and above.
    """
    beyond = np.asarray(-np.inf if largest else np.inf, x.dtype)
    padded = lax.pad(x, beyond, [(low, high, 0) for low, high in padding])
    spans = [(n - 1) * step + 1 for n, step in zip(dy.shape, window_strides, strict=True)]
    places = list(itertools.product(*map(range, window_dimensions)))

    def element(place: tuple[int, ...]) -> jax.Array:
        limits = [at + span for at, span in zip(place, spans, strict=True)]
        return lax.slice(padded, place, limits, window_strides)

    best, number = element(places[0]), jnp.zeros(dy.shape, jnp.uint8)
    for k, place in enumerate(places[1:], 1):
        other = element(place)
        keeps = lax.ge(best, other) if largest else lax.le(best, other)
        best = jnp.where(keeps, best, other)
        number = jnp.where(keeps, number, jnp.uint8(k))
    dtype = jnp.promote_types(dy.dtype, jnp.float32)
    wide, zero = dy.astype(dtype), jnp.zeros((), dtype)
    terms = []
    for k, place in enumerate(places):
        shifts = zip(place, padding, x.shape, spans, window_strides, strict=True)
        config = [
            (at - low, size - (at - low) - span, step - 1)
            for at, (low, _), size, span, step in shifts
        ]
        terms.append(lax.pad(jnp.where(number == k, wide, zero), zero, config))
    return functools.reduce(lax.add, terms).astype(dy.dtype)


pool_gradient_p = composite("pool_gradient", _type, reference, several=False)
