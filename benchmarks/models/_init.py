"""Parameters and batches drawn on the device, by few and small programs.

Flax's ``init`` under ``jit`` compiles one random stream per parameter (minutes for BERT-Large).
Here the shapes come from ``jax.eval_shape``, one program draws all random numbers at once, and
one small program per distinct shape cuts a parameter out of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def init_variables(init: Callable[..., Tree], seed: int, *dummies: Any) -> Tree:
    """What ``init(key, *dummies)`` describes, with values drawn from ``seed``.

    Args:
      init: a Flax module's ``init`` or any function of a key that returns a tree of arrays.
      seed: the seed.
      dummies: arguments of ``init``, as ``jax.ShapeDtypeStruct``.
    """
    return fill(jax.eval_shape(init, jax.random.PRNGKey(0), *dummies), seed)


def fill(shapes: Tree, seed: int) -> Tree:
    """A tree of arrays for a tree of shapes: kernels normal with variance 1 / fan-in, embeddings
    and biases normal with deviation 0.02, scales and variances one, means zero.

    Biases are not zero, so that a step that drops one shows in the gradients.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    numbers = _normal(jax.random.PRNGKey(seed), sum(leaf.size for _, leaf in leaves))
    filled, offset = [], 0
    for path, leaf in leaves:
        mean, deviation = _distribution(path, leaf.shape)
        filled.append(_cut(numbers, offset, mean, deviation, shape=leaf.shape, dtype=leaf.dtype))
        offset += leaf.size
    return jax.tree.unflatten(treedef, filled)


def from_seed(draw: Callable[[jax.Array], Tree]) -> Callable[[int], Tree]:
    """A function of a seed for a function of a key, compiled as one program."""
    compiled = jax.jit(draw)
    return lambda seed: compiled(jax.random.PRNGKey(1000 + seed))


def _distribution(path: Any, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a parameter, by the last part of its path."""
    role = jax.tree_util.keystr(path[-1:]).strip("[]'.\"")
    if role in ("scale", "var"):
        return 1.0, 0.0
    if role == "mean":
        return 0.0, 0.0
    if role == "kernel":
        return 0.0, 1 / math.sqrt(math.prod(shape[:-1]))
    return 0.0, 0.02


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, count: int) -> jax.Array:
    return jax.random.normal(key, (count,), jnp.float32)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _cut(
    numbers: jax.Array,
    offset: int,
    mean: float,
    deviation: float,
    *,
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    part = jax.lax.dynamic_slice(numbers, (offset,), (math.prod(shape),))
    return (mean + deviation * part.reshape(shape)).astype(dtype)
