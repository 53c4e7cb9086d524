"""The losses, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross entropy of ``logits [..., classes]`` and integer ``labels [...]``."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sigmoid cross entropy of ``[batch, labels]``, summed over labels, divided by the batch."""
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels)
    return losses.sum() / logits.shape[0]
