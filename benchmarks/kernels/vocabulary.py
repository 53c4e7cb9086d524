"""Ends of a language model: the layer of logits with its loss, and the gradient of embeddings.

A layer of logits and a cross entropy, forward and backward, are three products with the logits, or
their gradient, between them. ``linear-cross-entropy`` is written as models write it, and it is up
to the compiler whether the logits exist as a whole; ``-in-chunks`` is the loop over chunks of
tokens that a user writes where they must not. At the first size both fit into a GPU's memory with
ease; at the second jevt chooses chunks by itself. The float32 reference goes by chunks: whole, its
logits and their gradient at the second size take 8.4 GB each, several times over.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from benchmarks.kernels.case import Case
from benchmarks.kernels.operands import FLOAT, Draw, case, integers, normal
from benchmarks.options import Size
from benchmarks.workload import Tree

#: (tokens, features, words): BERT-Large's, and those of a model with a large vocabulary.
_LAYERS: dict[Size, Sequence[tuple[int, int, int]]] = {
    "full": ((16384, 1024, 30528), (16384, 2048, 128256)),
    "smoke": ((32, 16, 50),),
}
#: (tokens, words, features).
_EMBEDDINGS = {"full": ((16384, 30528, 1024),), "smoke": ((32, 50, 16),)}
#: Tokens of a chunk.
CHUNK = {"full": 4096, "smoke": 8}


def linear_cross_entropy(hidden: jax.Array, weights: jax.Array, labels: jax.Array) -> Tree:
    """The mean loss over tokens, and the gradients of hidden states and weights."""

    def loss(hidden: jax.Array, weights: jax.Array) -> jax.Array:
        return _sum_of_losses(hidden, weights, labels) / len(labels)

    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, weights)


def linear_cross_entropy_in_chunks(
    hidden: jax.Array, weights: jax.Array, labels: jax.Array, chunk: int
) -> Tree:
    """The same, for ``chunk`` tokens at a time, without ever having all logits."""

    def one(sums: Tree, tokens: Tree) -> tuple[Tree, jax.Array]:
        part = jax.value_and_grad(_sum_of_losses, argnums=(0, 1))
        loss, (dhidden, dweights) = part(tokens[0], weights, tokens[1])
        return (sums[0] + loss, sums[1] + dweights), dhidden

    zeros = jnp.zeros((), FLOAT), jnp.zeros(weights.shape, FLOAT)
    chunks = hidden.reshape(-1, chunk, hidden.shape[1]), labels.reshape(-1, chunk)
    (loss, dweights), dhidden = jax.lax.scan(one, zeros, chunks)
    count = len(labels)
    dhidden = dhidden.reshape(hidden.shape) / count
    return loss / count, (dhidden, (dweights / count).astype(weights.dtype))


def _sum_of_losses(hidden: jax.Array, weights: jax.Array, labels: jax.Array) -> jax.Array:
    logits = (hidden @ weights).astype(FLOAT)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()


def embedding_gradient(tokens: jax.Array, dy: jax.Array, words: int) -> jax.Array:
    """Of a table of ``words`` rows, from the cotangent of each token's row."""
    table = jax.ShapeDtypeStruct((words, dy.shape[1]), dy.dtype)
    (gradient,) = jax.linear_transpose(lambda table: table[tokens], table)(dy)
    return gradient


def vocabulary(size: Size) -> list[Case]:
    """Linear layers with their cross entropies, in one and by chunks; gradients of embeddings."""
    made = []
    in_chunks = functools.partial(linear_cross_entropy_in_chunks, chunk=CHUNK[size])
    for tokens, features, words in _LAYERS[size]:
        operands = (
            normal((tokens, features)),
            normal((features, words), features**-0.5),
            integers((tokens, words)),
        )
        for name, function in (
            ("linear-cross-entropy", linear_cross_entropy),
            ("linear-cross-entropy-in-chunks", in_chunks),
        ):
            shape, flops = (tokens, features, words), 6 * tokens * features * words
            made.append(case(name, function, shape, *operands, flops=flops, reference=in_chunks))
    for tokens, words, features in _EMBEDDINGS[size]:
        gradient = functools.partial(embedding_gradient, words=words)
        shape = (tokens, words, features)
        operands = (_frequent_first(tokens, words), normal((tokens, features)))
        made.append(case("embedding-gradient", gradient, shape, *operands))
    return made


def _frequent_first(tokens: int, words: int) -> Draw:
    """Words of which the first are drawn more often, as in text."""
    return lambda key: (words * jax.random.uniform(key, (tokens,)) ** 3).astype(jnp.int32)
