"""Maximum pooling and its gradient, in plain arithmetic.

    pool:            x[N…] -> y[P…]
    pool_gradient:   dy[P…] x[N…] -> dx[N…]

They are what ``reduce_window_max`` and ``select_and_scatter_add`` compute: each window gives its
gradient to its largest element, to the first of equal ones. One of XLA's fusions finds the maxima
and, of the same elements, their numbers within their windows; another one adds up, for each
element, the gradients of those windows whose largest it is. A pass puts them in, after
differentiation and batching, so they have no rules for either.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jevt import _jax_internals as internals
from jevt.primitives._define import composite

type Pairs = tuple[tuple[int, int], ...]


def _pooled(
    shape: tuple[int, ...],
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: Pairs,
) -> tuple[int, ...]:
    """The shape of a pool."""
    extents = zip(shape, window_dimensions, window_strides, padding, strict=True)
    return tuple((n + low + high - size) // step + 1 for n, size, step, (low, high) in extents)


def _type(x: Any, *, largest: bool, **window: Any) -> Any:
    del largest
    return internals.array_like(x, _pooled(x.shape, **window), x.dtype)


def _gradient_type(dy: Any, x: Any, *, largest: bool, **window: Any) -> Any:
    del largest
    pooled = _pooled(x.shape, **window)
    if dy.shape != pooled or dy.dtype != x.dtype:
        raise ValueError(f"pool_gradient: expected gradients of shape {pooled}, got {dy} of {x}")
    return internals.array_like(x, x.shape, x.dtype)


def _elements(
    x: jax.Array,
    largest: bool,
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: Pairs,
) -> Iterator[jax.Array]:
    """The first element of each window, the second, and so on; no number beyond the array."""
    beyond = np.asarray(-np.inf if largest else np.inf, x.dtype)
    padded = lax.pad(x, beyond, [(low, high, 0) for low, high in padding])
    pooled = _pooled(x.shape, window_dimensions, window_strides, padding)
    spans = [(n - 1) * step + 1 for n, step in zip(pooled, window_strides, strict=True)]
    for place in itertools.product(*map(range, window_dimensions)):
        limits = [at + span for at, span in zip(place, spans, strict=True)]
        yield lax.slice(padded, place, limits, window_strides)


def pool(
    x: jax.Array,
    *,
    largest: bool,
    window_dimensions: tuple[int, ...],
    window_strides: tuple[int, ...],
    padding: Pairs,
) -> jax.Array:
    """The largest element of each window, or the smallest; NaN where a window has one.

    Args:
      x: of any floating-point type.
      largest: whether the largest.
      window_dimensions: extents of a window.
      window_strides: from one window to the next.
      padding: of ``x``, below and above.
    """
    elements = _elements(x, largest, window_dimensions, window_strides, padding)
    return functools.reduce(lax.max if largest else lax.min, elements)


def gradient(
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
    first, *others = _elements(x, largest, window_dimensions, window_strides, padding)
    best, number = first, jnp.zeros(dy.shape, jnp.uint8)
    for k, other in enumerate(others, 1):
        keeps = lax.ge(best, other) if largest else lax.le(best, other)
        best = jnp.where(keeps, best, other)
        number = jnp.where(keeps, number, jnp.uint8(k))
    wide = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
    given = _Given(wide, number, x.shape, window_dimensions, window_strides, padding)
    return given.interleaved(()).astype(dy.dtype)


class _Given:
    """What windows give to the elements of an array.

    A window that starts ``step·j - low`` has element ``k`` at ``step·j - low + k``. So the windows
    of the elements ``step·i + remainder`` are the same for all i, relative to i: the elements of
    each remainder are computed from no more windows than they are in, and put in between.
    """

    def __init__(
        self,
        dy: jax.Array,
        number: jax.Array,
        shape: tuple[int, ...],
        window_dimensions: tuple[int, ...],
        window_strides: tuple[int, ...],
        padding: Pairs,
    ) -> None:
        self._dy = dy
        self._number = number
        self._shape = shape
        self._window = window_dimensions
        self._strides = window_strides
        self._lows = tuple(low for low, _ in padding)
        self._counts = tuple(-(-n // step) for n, step in zip(shape, window_strides, strict=True))

    def interleaved(self, remainders: tuple[int, ...]) -> jax.Array:
        """The elements of these remainders along the first axes, the other axes whole."""
        axis = len(remainders)
        if axis == len(self._shape):
            return self._of(remainders)
        parts = [self.interleaved((*remainders, r)) for r in range(self._strides[axis])]
        if len(parts) == 1:
            return parts[0]
        joined = jnp.stack(parts, axis + 1)
        shape = list(parts[0].shape)
        shape[axis] *= len(parts)
        return lax.slice_in_dim(joined.reshape(shape), 0, self._shape[axis], axis=axis)

    def _of(self, remainders: tuple[int, ...]) -> jax.Array:
        """The sums of the elements of these remainders along all axes."""
        zero = jnp.zeros((), self._dy.dtype)
        ways = [self._windows(axis, r) for axis, r in enumerate(remainders)]
        terms = []
        for way in itertools.product(*ways):
            places, offsets = zip(*way, strict=True)
            k = sum(
                place * math.prod(self._window[axis + 1 :]) for axis, place in enumerate(places)
            )
            # Element i is given something by window i + offset.
            config = [
                (-offset, count + offset - n, 0)
                for offset, count, n in zip(offsets, self._counts, self._dy.shape, strict=True)
            ]
            chosen = jnp.where(self._number == k, self._dy, zero)
            terms.append(lax.pad(chosen, zero, config))
        if not terms:
            return jnp.zeros(self._counts, self._dy.dtype)
        return functools.reduce(lax.add, terms)

    def _windows(self, axis: int, remainder: int) -> list[tuple[int, int]]:
        """The places in a window that elements of a remainder have, and the windows' offsets."""
        step, start = self._strides[axis], remainder + self._lows[axis]
        return [(k, (start - k) // step) for k in range(start % step, self._window[axis], step)]


pool_p = composite("pool", _type, pool, several=False)
pool_gradient_p = composite("pool_gradient", _gradient_type, gradient, several=False)
