"""Attention, spelled the ways users spell it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.options import Attention


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spelling: Attention,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention without a mask; the softmax is in float32.

    Args:
      q, k, v: ``[batch, tokens, heads, head_dim]``.
      spelling: see ``Options.attention``.
      dropout: rate on the attention probabilities, for ``einsum`` only: the library call has none.
      dropout_key: a key; required where ``dropout`` is above zero.

    Returns:
      ``[batch, tokens, heads, head_dim]`` in q's dtype.
    """
    if spelling == "dpa":
        return jax.nn.dot_product_attention(q, k, v)
    if spelling == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(q.dtype)
    if dropout > 0.0:
        assert dropout_key is not None
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout, probabilities.shape)
        probabilities = jnp.where(keep, probabilities / (1.0 - dropout), 0).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, v)
