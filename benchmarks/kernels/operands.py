"""What the arguments of cases are drawn with, and the bytes that they and the results take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import Case
from benchmarks.workload import Tree

type Draw = Callable[[jax.Array], jax.Array]

HALF, FLOAT = jnp.dtype("bfloat16"), jnp.dtype("float32")


def normal(shape: tuple[int, ...], scale: float = 1.0) -> Draw:
    """Normal numbers in bfloat16, times ``scale``."""
    return lambda key: scale * jax.random.normal(key, shape, HALF)


def factors(columns: int) -> Draw:
    """Numbers about 1 in float32, as a norm's scale."""
    return lambda key: 1 + 0.1 * jax.random.normal(key, (columns,))


def integers(shape: tuple[int, ...], low: int = 0) -> Draw:
    """An integer for each row, from ``low`` up to the columns, which do not count."""
    return lambda key: jax.random.randint(key, shape[:1], low, shape[1])


def case(
    family: str,
    function: Callable[..., Tree],
    shape: tuple[int, ...],
    *draws: Draw,
    flops: int = 0,
    reference: Callable[..., Tree] | None = None,
) -> Case:
    """A case in bfloat16 whose arguments are drawn from keys of their own."""

    def args(seed: int) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.PRNGKey(seed), len(draws))
        return tuple(draw(key) for draw, key in zip(draws, keys, strict=True))

    large = math.prod(shape) >= 1 << 27
    name = f"{family}-{'x'.join(map(str, shape))}-bfloat16"
    batches = 2 if large else 4
    size = moved(function, args)
    return Case(name, function, args, size, flops, batches=batches, reference=reference)


def moved(function: Callable[..., Tree], args: Callable[[int], tuple[Any, ...]]) -> int:
    """Bytes of the arguments and of the results."""
    operands = jax.eval_shape(lambda: args(0))
    everything = jax.tree.leaves((operands, jax.eval_shape(function, *operands)))
    return sum(x.size * x.dtype.itemsize for x in everything)
