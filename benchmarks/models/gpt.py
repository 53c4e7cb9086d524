"""A GPT: pre-LN decoder with a causal mask. No workload: the partitioner is timed on its graph."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models._init import from_seed
from benchmarks.models._losses import cross_entropy
from benchmarks.options import Options
from benchmarks.shapes import GptShape
from benchmarks.workload import Tree, Workload, sgd_step, training_state


class Block(nn.Module):
    """One decoder block on ``[batch, tokens, hidden]``."""

    shape: GptShape
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, o = self.shape, self.options
        dtypes = {"dtype": o.dtype, "param_dtype": o.param_dtype}
        head = s.hidden // s.heads

        y = nn.LayerNorm(**dtypes, name="norm_attention")(x)
        qkv = nn.Dense(3 * s.hidden, **dtypes, name="qkv")(y)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, s.heads, head), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(head).astype(q.dtype)
        causal = np.tri(x.shape[1], dtype=bool)
        scores = jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores).astype(q.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + nn.Dense(s.hidden, **dtypes, name="projection")(y)

        y = nn.LayerNorm(**dtypes, name="norm_mlp")(x)
        y = nn.gelu(nn.Dense(s.ffn, **dtypes, name="up")(y))
        return x + nn.Dense(s.hidden, **dtypes, name="down")(y)


class Gpt(nn.Module):
    """Tokens ``int32[batch, sequence]`` to logits ``[batch, sequence, vocabulary]``."""

    shape: GptShape
    options: Options

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        s, o = self.shape, self.options
        dtypes = {"dtype": o.dtype, "param_dtype": o.param_dtype}
        words = nn.Embed(s.vocabulary, s.hidden, **dtypes, name="words")
        positions = nn.initializers.normal(0.02)
        x = words(tokens)
        x = x + self.param("positions", positions, (s.sequence, s.hidden), o.param_dtype)
        for i in range(s.layers):
            x = Block(s, o, name=f"block_{i}")(x)
        return words.attend(nn.LayerNorm(**dtypes, name="norm")(x))


def make(shape: GptShape, options: Options) -> Workload:
    """The training step on batches of random tokens."""
    model = Gpt(shape, options)
    size = (shape.batch, shape.sequence)

    def init(seed: int) -> Tree:
        tokens = jax.ShapeDtypeStruct(size, jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.PRNGKey(seed), tokens)["params"]
        # Its size is beyond what one program can draw, and it is only traced.
        return training_state(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

    def draw(key: jax.Array) -> Tree:
        k1, k2 = jax.random.split(key)
        return {
            "tokens": jax.random.randint(k1, size, 0, shape.vocabulary),
            "labels": jax.random.randint(k2, size, 0, shape.vocabulary),
        }

    def loss_fn(params: Tree, stats: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        return cross_entropy(
            model.apply({"params": params}, batch["tokens"]), batch["labels"]
        ), stats

    return Workload("gpt", sgd_step(loss_fn), init, from_seed(draw))
