"""The ViT of ``vit.py`` written with ``flax.nnx``: modules that own their parameters."""

from __future__ import annotations

import jax
from flax import nnx

from benchmarks.models._attention import attention
from benchmarks.models._init import fill
from benchmarks.models._losses import cross_entropy
from benchmarks.models.vit import random_images, scores_stay_on_chip
from benchmarks.options import Options
from benchmarks.shapes import VIT, VitShape
from benchmarks.workload import Tree, Workload, sgd_step, training_state


class Block(nnx.Module):
    """One pre-LN encoder block on ``[batch, tokens, hidden]``."""

    def __init__(self, shape: VitShape, options: Options, rngs: nnx.Rngs):
        dtypes = {"dtype": options.dtype, "param_dtype": options.param_dtype, "rngs": rngs}
        self.heads = shape.heads
        self.spelling = options.attention
        self.norm_attention = nnx.LayerNorm(shape.hidden, **dtypes)
        self.qkv = nnx.Linear(shape.hidden, 3 * shape.hidden, **dtypes)
        self.projection = nnx.Linear(shape.hidden, shape.hidden, **dtypes)
        self.norm_mlp = nnx.LayerNorm(shape.hidden, **dtypes)
        self.up = nnx.Linear(shape.hidden, shape.ffn, **dtypes)
        self.down = nnx.Linear(shape.ffn, shape.hidden, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.qkv(self.norm_attention(x))
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, x.shape[-1] // self.heads)
        y = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], self.spelling)
        x = x + self.projection(y.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x)), approximate=False))


class Vit(nnx.Module):
    """Images ``[batch, image, image, 3]`` to logits ``[batch, classes]``."""

    def __init__(self, shape: VitShape, options: Options, rngs: nnx.Rngs):
        dtypes = {"dtype": options.dtype, "param_dtype": options.param_dtype, "rngs": rngs}
        patch = (shape.patch, shape.patch)
        self.patch = nnx.Conv(3, shape.hidden, patch, strides=patch, padding="VALID", **dtypes)
        positions = nnx.initializers.normal(0.02)
        size = (1, shape.tokens, shape.hidden)
        self.positions = nnx.Param(positions(rngs.params(), size, options.param_dtype))
        self.blocks = nnx.List([Block(shape, options, rngs) for _ in range(shape.layers)])
        self.norm = nnx.LayerNorm(shape.hidden, **dtypes)
        self.head = nnx.Linear(shape.hidden, shape.classes, **dtypes)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patch(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def make(options: Options) -> Workload:
    """The training step of ViT-B/14 in nnx, its parameters carried as a pure dictionary."""
    s = VIT[options.size]
    abstract = nnx.eval_shape(lambda: Vit(s, options, nnx.Rngs(0)))
    graph, variables = nnx.split(abstract, nnx.Param)
    shapes = nnx.to_pure_dict(variables)

    def loss_fn(params: Tree, stats: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        state = jax.tree.map(lambda x: x, variables)
        nnx.replace_by_pure_dict(state, params)
        logits = nnx.merge(graph, state)(batch["images"])
        return cross_entropy(logits, batch["labels"]), stats

    return Workload(
        "vit-nnx",
        sgd_step(loss_fn),
        init=lambda seed: training_state(fill(shapes, seed)),
        batch=random_images((s.batch, s.image, s.image, 3), s.classes, options.dtype),
        on_chip=scores_stay_on_chip(s),
    )
