"""``norm_statistics`` and ``norm_gradient``: layer, RMS, batch and group norms, one equation each.

    norm_statistics:  x                               -> mean variance rstd          centred
                      x                               -> meansquare rstd             not centred
    norm_gradient:    x mean rstd g scale*            -> dx sum_g sum_gc             centred
                      x rstd g scale*                 -> dx sum_gc                   not centred

Over n elements along ``axes``, with c = x - mean, or c = x, and γ the product of the scales,

    mean = Σx / n,  variance = Σc² / n,  rstd = 1 / √(variance + epsilon)
    dx = rstd·(γg - Σγg / n - c·rstd²·Σγgc / n)

and without the term Σγg where it is not centred: the cotangent of x where g is that of
``c·rstd·γ``. What is normalised, ``c·rstd·γ + β``, is arithmetic element by element and stays as it
is spelled. ``sum_g`` and ``sum_gc`` are Σγ'g and Σγ'gc over the axes ``summed``, all of these axes
or some, where γ' are the scales that vary along them: in a batch norm, whose scale does not, they
are the gradients of bias and, times rstd, of the scale. In a group norm they are that for each
example, if height and width are summed; times the scale they add up to the sums over a group.

Raising passes put them in, and :mod:`jevt.passes.expand_composites` takes those out again that no
kernel or library takes whole. They come after differentiation and batching, so they have no rules
for either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jevt import _jax_internals as internals
from jevt.primitives._define import composite


def kept(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """The shape of the statistics."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def name_of(shape: Sequence[int], axes: Sequence[int], *, centred: bool) -> str:
    """What such a norm is called: by the axes over which it runs."""
    if not centred:
        return "rms_norm"
    rank = len(shape)
    if tuple(axes) == tuple(range(rank - len(axes), rank)):
        return "layer_norm"
    return "batch_norm" if 0 in axes else "group_norm"


def _statistics_type(
    x: Any, *, axes: tuple[int, ...], epsilon: float, centred: bool, two_pass: bool
) -> list[Any]:
    del epsilon, two_pass
    _check(x, axes)
    row = internals.array_like(x, kept(x.shape, axes), x.dtype)
    return [row] * (3 if centred else 2)


def _gradient_type(
    x: Any,
    *rest: Any,
    axes: tuple[int, ...],
    summed: tuple[int, ...],
    centred: bool,
    two_pass: bool,
) -> list[Any]:
    del two_pass
    _check(x, axes)
    _check(x, summed)
    if not set(summed) <= set(axes):
        raise ValueError(f"norm_gradient: expected sums over some of the axes {axes}, got {summed}")
    statistics, (g, *scales) = rest[: 1 + centred], rest[1 + centred :]
    rows = kept(x.shape, axes)
    if any(s.shape != rows for s in statistics) or g.shape != x.shape:
        raise ValueError(
            f"norm_gradient: expected statistics of shape {rows} and a cotangent of shape"
            f" {x.shape}, got {[s.shape for s in statistics]} and {g.shape}"
        )
    for scale in scales:
        if len(scale.shape) != len(x.shape) or any(
            have not in (1, want) for have, want in zip(scale.shape, x.shape, strict=True)
        ):
            raise ValueError(
                f"norm_gradient: expected a scale that broadcasts to {x.shape} and has as many"
                f" axes, got {scale.shape}"
            )
    row = internals.array_like(x, kept(x.shape, summed), x.dtype)
    return [internals.array_like(x, x.shape, x.dtype), *[row] * (1 + centred)]


def _check(x: Any, axes: tuple[int, ...]) -> None:
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"a norm's statistics are float32 or float64, got {x.dtype}")
    if not axes or tuple(sorted(set(axes))) != axes or axes[-1] >= len(x.shape):
        raise ValueError(f"axes in ascending order expected, of {len(x.shape)}, got {axes}")


def statistics(
    x: jax.Array, *, axes: tuple[int, ...], epsilon: float, centred: bool, two_pass: bool
) -> list[jax.Array]:
    """Mean (where centred), variance or mean square, and 1/√(that + epsilon), in plain JAX.

    Args:
      x: of any shape, float32 or float64.
      axes: over which they run, ascending.
      epsilon: added to the variance.
      centred: whether the mean is subtracted.
      two_pass: whether the program takes the variance of ``x - mean``; ``E[x²] - mean²`` else.
    """
    del two_pass
    if not centred:
        square = jnp.mean(jnp.square(x), axes)
        return [square, jax.lax.rsqrt(square + epsilon)]
    variance = jnp.var(x, axes)
    return [jnp.mean(x, axes), variance, jax.lax.rsqrt(variance + epsilon)]


def gradient(
    x: jax.Array,
    *rest: jax.Array,
    axes: tuple[int, ...],
    summed: tuple[int, ...],
    centred: bool,
    two_pass: bool,
) -> list[jax.Array]:
    """The cotangent of x and the two sums, in plain JAX.

    Args:
      x: what is normalised.
      *rest: mean (where centred), rstd, the cotangent g of the scaled result, like x, and scales,
        of as many axes as x.
      axes: over which the norm runs, ascending.
      summed: those of them over which the two sums run, ascending.
      centred: whether the mean is subtracted.
      two_pass: as of the statistics.
    """
    del two_pass
    *statistics_, rstd = (jnp.expand_dims(s, axes) for s in rest[: 1 + centred])
    g, *scales = (a.astype(x.dtype) for a in rest[1 + centred :])
    n = math.prod(x.shape[axis] for axis in axes)
    c = x - statistics_[0] if centred else x
    inner = [s for s in scales if varies(s.shape, summed)]
    middle = [s for s in scales if varies(s.shape, axes) and not varies(s.shape, summed)]
    outer = [s for s in scales if not varies(s.shape, axes)]
    for scale in inner:
        g = g * scale
    sum_g, sum_gc = (jnp.sum(a, summed, keepdims=True) for a in (g, g * c))
    whole_g, whole_gc = sum_g, sum_gc
    for scale in middle:
        g, whole_g, whole_gc = g * scale, whole_g * scale, whole_gc * scale
    whole_g, whole_gc = (jnp.sum(a, axes, keepdims=True) for a in (whole_g, whole_gc))
    dx = g - c * jnp.square(rstd) * whole_gc / n
    if centred:
        dx = dx - whole_g / n
    for factor in (rstd, *outer):
        dx = dx * factor
    sums = [jnp.squeeze(a, summed) for a in (sum_g, sum_gc)]
    return [dx, *sums[1 - centred :]]


def varies(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether a scale of this shape varies along the axes."""
    return any(shape[axis] != 1 for axis in axes)


norm_statistics_p = composite("norm_statistics", _statistics_type, statistics, several=True)
norm_gradient_p = composite("norm_gradient", _gradient_type, gradient, several=True)
