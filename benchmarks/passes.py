"""Time and effect of the graph passes on a deep model, run by hand:

    python -m benchmarks.passes [layers]

prints, for the training step of a BERT of that depth (24) and a width of 32, what each pass takes
and leaves. Passes are linear: all of them together should take less than 3 s of processor time.
"""

from __future__ import annotations

import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Jaxpr

from jevt.pipeline import GRAPH_PASSES

WIDTH, HEADS, TOKENS, BATCH, WORDS = 32, 4, 8, 2, 50


class Layer(nn.Module):
    """Post-norm attention and MLP, in bfloat16, with dropout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(width: int, x: jax.Array) -> jax.Array:
            return nn.Dense(width, dtype=jnp.bfloat16)(x)

        def heads() -> jax.Array:
            return dense(WIDTH, x).reshape(*x.shape[:2], HEADS, WIDTH // HEADS)

        drop = nn.Dropout(0.1, deterministic=False)
        q, k, v = heads(), heads(), heads()
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // HEADS).astype(q.dtype)
        weights = drop(jax.nn.softmax(scores.astype(jnp.float32)).astype(q.dtype))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = nn.LayerNorm(dtype=jnp.bfloat16)(x + drop(dense(WIDTH, mixed)))
        hidden = nn.gelu(dense(4 * WIDTH, x), approximate=False)
        return nn.LayerNorm(dtype=jnp.bfloat16)(x + drop(dense(WIDTH, hidden)))


class Bert(nn.Module):
    """Masked-word prediction over every token."""

    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(WORDS, WIDTH, dtype=jnp.bfloat16)
        x = nn.LayerNorm(dtype=jnp.bfloat16)(embed(tokens))
        for _ in range(self.layers):
            x = Layer()(x)
        return embed.attend(x).astype(jnp.float32)


def joint_graph(layers: int) -> Jaxpr:
    """The jaxpr of a training step."""
    model, optimizer = Bert(layers), optax.sgd(1e-3)
    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda t: model.init({"params": key, "dropout": key}, t), tokens)
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, tokens, key):
        def loss(params):
            logits = model.apply(params, tokens, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.make_jaxpr(step)(params, state, tokens, key)


def main(layers: int = 24) -> float:
    """Prints a line a pass; returns processor seconds of all of them."""
    jaxpr = joint_graph(layers)
    print(f"{'traced':22} {'':>9} {len(jaxpr.eqns):6} equations {_reductions(jaxpr):4} reductions")
    total = 0.0
    for name, graph_pass in GRAPH_PASSES:
        start = time.process_time()
        jaxpr = graph_pass(jaxpr)
        seconds = time.process_time() - start
        total += seconds
        size = f"{len(jaxpr.eqns):6} equations {_reductions(jaxpr):4} reductions"
        print(f"{name:22} {seconds * 1e3:6.0f} ms {size}")
    print(f"{'all':22} {total * 1e3:6.0f} ms")
    return total


def _reductions(jaxpr: Jaxpr) -> int:
    names = ("reduce_sum", "reduce_max", "reduce_min")
    return sum(eqn.primitive.name in names for eqn in jaxpr.eqns)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
