"""BERT-Large with a masked-language-model head on all tokens, post-LN, gelu (erf)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models._attention import attention
from benchmarks.models._init import from_seed, init_variables
from benchmarks.models._losses import cross_entropy
from benchmarks.options import Options
from benchmarks.shapes import BERT, BertShape
from benchmarks.workload import Tree, Workload, sgd_step, training_state


class SelfAttention(nn.Module):
    """Multi-head self-attention with its output projection, ``[batch, tokens, hidden]`` to same."""

    shape: BertShape
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, o = self.shape, self.options
        split = (*x.shape[:2], s.heads, s.hidden // s.heads)
        q, k, v = (
            nn.Dense(s.hidden, dtype=o.dtype, param_dtype=o.param_dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        context = attention(
            q.reshape(split),
            k.reshape(split),
            v.reshape(split),
            o.attention,
            dropout=o.dropout,
            dropout_key=self.make_rng("dropout") if o.dropout > 0.0 else None,
        )
        out = nn.Dense(s.hidden, dtype=o.dtype, param_dtype=o.param_dtype, name="output")
        return out(context.reshape(x.shape))


class Mlp(nn.Module):
    """Dense, gelu, dense: ``[batch, tokens, hidden]`` to same through ``ffn`` features."""

    shape: BertShape
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, o = self.shape, self.options
        x = nn.Dense(s.ffn, dtype=o.dtype, param_dtype=o.param_dtype, name="up")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(s.hidden, dtype=o.dtype, param_dtype=o.param_dtype, name="down")(x)


class Layer(nn.Module):
    """One post-LN encoder layer."""

    shape: BertShape
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        o = self.options
        drop = nn.Dropout(o.dropout, deterministic=o.dropout == 0.0)
        for block in (SelfAttention(self.shape, o), Mlp(self.shape, o)):
            x = layer_norm(o)(x + drop(block(x)))
        return x


class Bert(nn.Module):
    """Tokens and token types ``int32[batch, sequence]`` to logits ``[batch, sequence, vocab]``."""

    shape: BertShape
    options: Options

    @nn.compact
    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        s, o = self.shape, self.options

        def embedding(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, s.hidden, dtype=o.dtype, param_dtype=o.param_dtype, name=name)

        words = embedding(s.vocabulary, "words")
        positions = embedding(s.sequence, "positions")(jnp.arange(s.sequence)[None])
        x = words(tokens) + positions + embedding(s.token_types, "types")(types)
        x = nn.Dropout(o.dropout, deterministic=o.dropout == 0.0)(layer_norm(o)(x))
        for i in range(s.layers):
            x = Layer(s, o, name=f"layer_{i}")(x)
        x = nn.Dense(s.hidden, dtype=o.dtype, param_dtype=o.param_dtype, name="head")(x)
        x = layer_norm(o)(nn.gelu(x, approximate=False))
        bias = self.param("bias", nn.initializers.zeros, (s.vocabulary,), o.param_dtype)
        return words.attend(x) + bias.astype(o.dtype)


def layer_norm(options: Options) -> nn.LayerNorm:
    """BERT's layer norm; Flax takes the statistics in float32."""
    return nn.LayerNorm(1e-12, dtype=options.dtype, param_dtype=options.param_dtype)


def make(options: Options, shape: BertShape | None = None) -> Workload:
    """The training step of BERT-Large, or of another shape, on batches of random tokens."""
    s = shape or BERT[options.size]
    model = Bert(s, options)

    def init(seed: int) -> Tree:
        tokens = jax.ShapeDtypeStruct((s.batch, s.sequence), jnp.int32)
        # Dropout draws nothing at initialisation; its stream only has to exist.
        variables = init_variables(_init_with_dropout_stream(model), seed, tokens, tokens)
        return training_state(variables["params"])

    def draw(key: jax.Array) -> Tree:
        k1, k2, k3, k4 = jax.random.split(key, 4)
        shape = (s.batch, s.sequence)
        made = {
            "tokens": jax.random.randint(k1, shape, 0, s.vocabulary),
            "types": jax.random.randint(k2, shape, 0, s.token_types),
            "labels": jax.random.randint(k3, shape, 0, s.vocabulary),
        }
        return made | ({"dropout_key": k4} if options.dropout > 0.0 else {})

    def loss_fn(params: Tree, stats: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        rngs = {"dropout": batch["dropout_key"]} if options.dropout > 0.0 else None
        logits = model.apply({"params": params}, batch["tokens"], batch["types"], rngs=rngs)
        return cross_entropy(logits, batch["labels"]), stats

    def on_chip(aval: jax.core.ShapedArray) -> bool:
        return aval.shape[-2:] == (s.sequence, s.sequence) and aval.ndim == 4  # attention scores

    return Workload("bert", sgd_step(loss_fn), init, from_seed(draw), on_chip=on_chip)


def _init_with_dropout_stream(model: nn.Module):
    return lambda key, *args: model.init({"params": key, "dropout": key}, *args)
