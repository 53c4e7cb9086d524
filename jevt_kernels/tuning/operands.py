"""Operands that are drawn at random, and whether two kernels' results of them agree."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jevt_kernels import visitor
from jevt_kernels.ops import is_float
from jevt_kernels.spec import KernelSpec, TensorType

#: Integers are drawn below this: labels, masks, counts. Those of 32 bits without sign are random
#: bits or keys, of which all may be set.
_SMALL = 8

#: Largest relative norm of the difference by the size of a float in bytes, as far as the order of
#: sums and the rounding of what is kept in between explain it.
_TOLERANCES = {2: 1e-2, 4: 1e-4, 8: 1e-9}
_TF32_TOLERANCE = 5e-3

#: Part of the elements that may differ where a rounding decides: comparisons, infinities.
_FLIPS = 1e-3


def draw(types: Sequence[TensorType], seed: int, *, positive: bool = False) -> tuple[Any, ...]:
    """Random arrays on the default device: normal ones, or for ``positive`` uniform in [½, 1½)."""
    return tuple(_draw(tuple((t.shape, t.dtype) for t in types), positive, seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(
    types: tuple[tuple[tuple[int, ...], np.dtype], ...], positive: bool, seed: Any
) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), max(1, len(types)))
    return [_one(key, shape, dtype, positive) for key, (shape, dtype) in zip(keys, types)]  # noqa: B905


def _one(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, positive: bool) -> jax.Array:
    if dtype == np.dtype(bool):
        return jax.random.bernoulli(key, shape=shape)
    if not is_float(dtype):
        if dtype == np.dtype("uint32"):
            return jax.random.bits(key, shape, jnp.uint32)
        return jax.random.randint(key, shape, 0, _SMALL, jnp.int32).astype(dtype)
    if positive:
        return jax.random.uniform(key, shape, dtype, 0.5, 1.5)
    return jax.random.normal(key, shape, dtype)


def drawable(spec: KernelSpec) -> bool:
    """Whether random operands are legal ones.

    Not where a kernel reads rows that another operand names: it would read outside of its operand.
    """
    return not any(isinstance(n, visitor.Lookup | visitor.Segment) for n in spec.tree)


def tolerances(spec: KernelSpec) -> tuple[float, ...]:
    """For each output, the most by which two right kernels differ, as :func:`difference` has it."""
    types = [t.dtype for t in (*spec.inputs, *spec.outputs)]
    types += [n.dtype for n in spec.tree if isinstance(n, visitor.Compute | visitor.Contract)]
    sizes = [dtype.itemsize for dtype in types if is_float(dtype)]
    floats = _TOLERANCES[min(sizes, default=8)]
    if any(isinstance(n, visitor.Contract) and n.precision == "tf32" for n in spec.tree):
        floats = max(floats, _TF32_TOLERANCE)
    whole = _FLIPS if sizes else 0.0
    return tuple(floats if is_float(t.dtype) else whole for t in spec.outputs)


@jax.jit
def difference(got: Sequence[jax.Array], want: Sequence[jax.Array]) -> list[jax.Array]:
    """For each array, how far it is from the other.

    The relative norm of the difference of floats, infinite where they are not finite in the same
    places; the part of the integers that differ.
    """
    return [_difference(g, w) for g, w in zip(got, want, strict=True)]


def _difference(got: jax.Array, want: jax.Array) -> jax.Array:
    if not is_float(np.dtype(want.dtype)):
        return jnp.mean(got != want, dtype=jnp.float32)
    wide = jnp.promote_types(want.dtype, jnp.float32)
    got, want = got.astype(wide), want.astype(wide)
    finite = jnp.isfinite(got) & jnp.isfinite(want)
    flipped = jnp.mean(jnp.isfinite(got) != jnp.isfinite(want), dtype=jnp.float32)
    norm = jnp.linalg.norm(jnp.where(finite, want, 0).ravel())
    away = jnp.linalg.norm(jnp.where(finite, got - want, 0).ravel())
    relative = jnp.where(norm == 0, away, away / jnp.where(norm == 0, 1, norm))
    return jnp.where(flipped > _FLIPS, jnp.inf, relative).astype(jnp.float32)


@jax.jit
def finite_part(arrays: Sequence[jax.Array]) -> jax.Array:
    """The part of the elements that are finite, of the array that has the fewest."""
    return jnp.min(jnp.stack([jnp.mean(jnp.isfinite(a), dtype=jnp.float32) for a in arrays]))
