"""Everything in a training step that memory bounds: norms, softmax, losses, sums, the optimizer.

The bytes of a case are its arguments and its results, each once: what one pass moves. A softmax of
few long rows reads them twice, and says so by a fraction of two thirds at the speed of memory; so
does whatever waits for the norm of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from benchmarks.kernels import columnwise
from benchmarks.kernels.case import Case, suite
from benchmarks.kernels.operands import FLOAT, HALF, case, factors, integers, normal
from benchmarks.kernels.optimizers import optimizers
from benchmarks.kernels.rowwise import layer_norm, softmax
from benchmarks.kernels.vocabulary import vocabulary
from benchmarks.options import Size
from benchmarks.workload import Tree

type Shapes = Sequence[tuple[int, ...]]

#: Beyond the L2 cache of any present GPU, but for the smoke test.
_TOKENS: dict[Size, Shapes] = {"full": ((16384, 1024),), "smoke": ((32, 64),)}
_SCORES: dict[Size, Shapes] = {
    "full": ((131072, 512), (16384, 4096), (4096, 30528), (1024, 131072)),
    "smoke": ((32, 64),),
}
_LOGITS: dict[Size, Shapes] = {"full": ((16384, 30528),), "smoke": ((32, 50),)}
_LINEAR: dict[Size, Shapes] = {
    "full": ((16384, 4096), (33554432, 3), (128, 670208)),
    "smoke": ((32, 64), (32, 3)),
}
_IMAGES: dict[Size, Shapes] = {"full": ((128, 56, 56, 256),), "smoke": ((2, 4, 4, 8),)}
_LONG: dict[Size, Shapes] = {"full": ((8, 16777216),), "smoke": ((2, 200),)}


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS norm over the last axis; statistics in float32."""
    wide = x.astype(FLOAT)
    mean_square = jnp.square(wide).mean(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(x.dtype)


def rms_norm_gradients(x: jax.Array, scale: jax.Array, dy: jax.Array) -> Tree:
    """The gradients of RMS norm's input and scale."""
    return jax.vjp(rms_norm, x, scale)[1](dy)


def dropout_residual_norm(
    x: jax.Array, residual: jax.Array, scale: jax.Array, bias: jax.Array, key: jax.Array
) -> Tree:
    """Dropout, the residual sum, which is kept, and layer norm."""
    keep = jax.random.bernoulli(key, 0.9, x.shape)
    total = residual + jnp.where(keep, x / 0.9, 0).astype(x.dtype)
    return total, layer_norm(total, scale, bias)


def softmax_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """By the scores, which softmax is computed of again."""
    return jax.vjp(softmax, x)[1](dy)[0]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over tokens, in float32."""
    wide = logits.astype(FLOAT)
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels).mean()


def cross_entropy_soft(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of labels that are distributions."""
    return optax.softmax_cross_entropy(logits.astype(FLOAT), labels.astype(FLOAT)).mean()


def cross_entropy_in_full(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Smoothed labels, tokens that do not count (below 0), and z-loss."""
    wide, counts = logits.astype(FLOAT), labels >= 0
    targets = jax.nn.one_hot(jnp.where(counts, labels, 0), logits.shape[-1])
    losses = optax.softmax_cross_entropy(wide, optax.smooth_labels(targets, 0.1))
    losses += 1e-4 * jnp.square(jax.nn.logsumexp(wide, axis=-1))
    return jnp.where(counts, losses, 0).sum() / jnp.maximum(counts.sum(), 1)


def row_sums(x: jax.Array) -> Tree:
    """Of each row and of its squares."""
    wide = x.astype(FLOAT)
    return wide.sum(-1), jnp.square(wide).sum(-1)


def logsumexp(x: jax.Array) -> jax.Array:
    """Of each row, in float32."""
    return jax.nn.logsumexp(x.astype(FLOAT), axis=-1)


def norm(x: jax.Array) -> jax.Array:
    """Of the whole tensor."""
    return jnp.sqrt(jnp.square(x.astype(FLOAT)).sum())


#: The functions of other suites.
_TRIED = (
    layer_norm,
    softmax,
    columnwise.layer_norm_gradients,
    columnwise.bias_gradient,
    columnwise.batch_statistics,
    columnwise.batch_norm_sums,
)


@suite("reductions")
def reductions(size: Size) -> Sequence[Case]:
    """Norms, softmax, cross entropy, sums along rows and columns, optimizers."""
    made = [
        *_norms(size),
        *_softmaxes(size),
        *_losses(size),
        *_columns(size),
        *_long_rows(size),
        *vocabulary(size),
        *optimizers(size),
    ]
    # On a CPU the other suites have tried what they share with this one.
    return made if size == "full" else [c for c in made if c.fun not in _TRIED]


def _norms(size: Size) -> list[Case]:
    made = []
    for shape in _TOKENS[size]:
        full, vector = normal(shape), factors(shape[-1])
        made += [
            case("layernorm", layer_norm, shape, full, vector, vector),
            case(
                "layernorm-gradients",
                columnwise.layer_norm_gradients,
                shape,
                *(full, vector, vector, full),
            ),
            case("rmsnorm", rms_norm, shape, full, vector),
            case("rmsnorm-gradients", rms_norm_gradients, shape, full, vector, full),
            case(
                "dropout-residual-layernorm",
                dropout_residual_norm,
                shape,
                *(full, full, vector, vector, lambda key: key),
            ),
        ]
    return made


def _softmaxes(size: Size) -> list[Case]:
    made = []
    for shape in _SCORES[size]:
        full = normal(shape)
        made.append(case("softmax", softmax, shape, full))
        made.append(case("softmax-gradient", softmax_gradient, shape, full, full))
    return made


def _losses(size: Size) -> list[Case]:
    made = []
    for shape in _LOGITS[size]:
        logits = normal(shape)
        labels, some = integers(shape), integers(shape, -shape[-1] // 4)

        def soft(key: jax.Array, shape: tuple[int, ...] = shape) -> jax.Array:
            return jax.nn.softmax(jax.random.normal(key, shape), axis=-1).astype(HALF)

        for name, function, target in (
            ("cross-entropy", cross_entropy, labels),
            ("cross-entropy-soft", cross_entropy_soft, soft),
            ("cross-entropy-in-full", cross_entropy_in_full, some),
        ):
            both = jax.value_and_grad(function)
            made.append(case(f"{name}-value-and-grad", both, shape, logits, target))
        made.append(case("cross-entropy-grad", jax.grad(cross_entropy), shape, logits, labels))
    return made


def _columns(size: Size) -> list[Case]:
    made = [
        case("bias-gradient", columnwise.bias_gradient, shape, normal(shape))
        for shape in _LINEAR[size]
    ]
    for shape in _IMAGES[size]:
        full, vector = normal(shape), factors(shape[-1])
        operands = (full, vector, vector, full)
        made.append(case("batch-statistics", columnwise.batch_statistics, shape, full))
        made.append(case("batchnorm-sums", columnwise.batch_norm_sums, shape, *operands))
    return made


def _long_rows(size: Size) -> list[Case]:
    return [
        case(name, function, shape, normal(shape))
        for shape in _LONG[size]
        for name, function in (
            ("row-sums", row_sums),
            ("logsumexp", logsumexp),
            ("softmax", softmax),
            ("norm", norm),
        )
    ]
