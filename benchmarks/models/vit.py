"""ViT-B/14: pre-LN encoder, learned positions, mean pool."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models._attention import attention
from benchmarks.models._init import from_seed, init_variables
from benchmarks.models._losses import cross_entropy
from benchmarks.options import Options
from benchmarks.shapes import VIT, VitShape
from benchmarks.workload import Tree, Workload, sgd_step, training_state


class Block(nn.Module):
    """One pre-LN encoder block on ``[batch, tokens, hidden]``."""

    shape: VitShape
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, o = self.shape, self.options
        dtypes = {"dtype": o.dtype, "param_dtype": o.param_dtype}

        y = nn.LayerNorm(**dtypes, name="norm_attention")(x)
        qkv = nn.Dense(3 * s.hidden, **dtypes, name="qkv")(y)
        qkv = qkv.reshape(*x.shape[:2], 3, s.heads, s.hidden // s.heads)
        y = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], o.attention)
        x = x + nn.Dense(s.hidden, **dtypes, name="projection")(y.reshape(x.shape))

        y = nn.LayerNorm(**dtypes, name="norm_mlp")(x)
        y = nn.gelu(nn.Dense(s.ffn, **dtypes, name="up")(y), approximate=False)
        return x + nn.Dense(s.hidden, **dtypes, name="down")(y)


class Vit(nn.Module):
    """Images ``[batch, image, image, 3]`` to logits ``[batch, classes]``."""

    shape: VitShape
    options: Options

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        s, o = self.shape, self.options
        dtypes = {"dtype": o.dtype, "param_dtype": o.param_dtype}
        patch = (s.patch, s.patch)
        x = nn.Conv(s.hidden, patch, strides=patch, padding="VALID", **dtypes, name="patch")(images)
        x = x.reshape(x.shape[0], s.tokens, s.hidden)
        positions = nn.initializers.normal(0.02)
        x = x + self.param("positions", positions, (1, s.tokens, s.hidden), o.param_dtype)
        for i in range(s.layers):
            x = Block(s, o, name=f"block_{i}")(x)
        x = nn.LayerNorm(**dtypes, name="norm")(x).mean(axis=1)
        return nn.Dense(s.classes, **dtypes, name="head")(x)


def random_images(size: tuple[int, ...], classes: int, dtype: str) -> Callable[[int], Tree]:
    """Seed -> normal images of that size (NHWC) and uniform labels ``int32[batch]``."""

    def draw(key: jax.Array) -> Tree:
        k1, k2 = jax.random.split(key)
        return {
            "images": jax.random.normal(k1, size, dtype),
            "labels": jax.random.randint(k2, size[:1], 0, classes),
        }

    return from_seed(draw)


def scores_stay_on_chip(shape: VitShape):
    """The ``on_chip`` of a ViT: attention scores ``[batch, heads, tokens, tokens]``."""
    return lambda aval: aval.ndim == 4 and aval.shape[-2:] == (shape.tokens, shape.tokens)


def make(options: Options) -> Workload:
    """The training step of ViT-B/14 on random images."""
    s = VIT[options.size]
    model = Vit(s, options)
    size = (s.batch, s.image, s.image, 3)

    def init(seed: int) -> Tree:
        images = jax.ShapeDtypeStruct(size, jnp.dtype(options.dtype))
        return training_state(init_variables(model.init, seed, images)["params"])

    def loss_fn(params: Tree, stats: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        logits = model.apply({"params": params}, batch["images"])
        return cross_entropy(logits, batch["labels"]), stats

    return Workload(
        "vit",
        sgd_step(loss_fn),
        init,
        batch=random_images(size, s.classes, options.dtype),
        on_chip=scores_stay_on_chip(s),
    )
