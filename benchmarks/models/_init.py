"""Parameters drawn on the device, leaf by leaf, without compiling the model's own initialiser.

Flax's ``init`` under ``jit`` compiles one random stream per parameter (minutes for BERT-Large).
Here the shapes come from ``jax.eval_shape`` and one small program per distinct shape draws them.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def init_variables(init: Callable[..., Tree], seed: int, *dummies: Any, **kwargs: Any) -> Tree:
    """What ``init(key, *dummies)`` describes, with values drawn from ``seed``.

    Args:
      init: a Flax module's ``init`` or any function of a key that returns a tree of arrays.
      seed: the seed; each leaf draws from it and from its own path.
      dummies: arguments of ``init``, as ``jax.ShapeDtypeStruct``.
      kwargs: static keyword arguments of ``init``.
    """
    key = jax.random.PRNGKey(seed)
    shapes = jax.eval_shape(functools.partial(init, **kwargs), key, *dummies)
    return fill(shapes, seed)


def fill(shapes: Tree, seed: int) -> Tree:
    """A tree of arrays for a tree of shapes: kernels normal with variance 1 / fan-in, embeddings
    and biases normal with deviation 0.02, scales and variances one, means zero.

    Biases are not zero, so that a step that drops one shows in the gradients.
    """
    key = jax.random.PRNGKey(seed)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        role = jax.tree_util.keystr(path[-1:]).strip("[]'.\"")
        if role in ("scale", "var"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if role == "mean":
            return jnp.zeros(leaf.shape, leaf.dtype)
        fan_in = math.prod(leaf.shape[:-1])
        deviation = 1 / math.sqrt(fan_in) if role == "kernel" else 0.02
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return _normal(leaf_key, deviation, shape=leaf.shape, dtype=leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, deviation: float, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * deviation).astype(dtype)
