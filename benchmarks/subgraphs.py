"""The five subgraphs of EVT's Figures 13 to 17, forward and backward.

Each is ``step(params, batch) -> (gradients, output)``: the gradients with respect to the
parameters and the input, given the output's cotangent (or, at a loss, the loss itself).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models import bert, gcn, resnet
from benchmarks.models._init import from_seed, init_variables
from benchmarks.models._losses import binary_cross_entropy, cross_entropy
from benchmarks.models.xmlcnn import multi_hot
from benchmarks.options import Options
from benchmarks.shapes import BERT, RESNET, XMLCNN
from benchmarks.workload import Step, Tree, Workload

Apply = Callable[..., jax.Array]


def forward_backward(apply: Apply) -> Step:
    """The step of ``apply(params, x) -> y`` given a batch of ``x`` and the cotangent ``dy``."""

    def step(params: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
        y, vjp = jax.vjp(apply, params, batch["x"])
        dparams, dx = vjp(batch["dy"])
        return {"params": dparams, "x": dx}, y

    return step


def loss_and_backward(loss_fn: Callable[[Tree, jax.Array, Tree], jax.Array]) -> Step:
    """The step of ``loss_fn(params, x, batch)``: the gradients of params and x, and the loss."""

    def step(params: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
        loss, (dparams, dx) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, batch["x"], batch)
        return {"params": dparams, "x": dx}, loss

    return step


class MlpBlock(nn.Module):
    """BERT's MLP with its residual and its layer norm."""

    shape: Any
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return bert.layer_norm(self.options)(x + bert.Mlp(self.shape, self.options)(x))


class AttentionBlock(nn.Module):
    """BERT's self-attention with its residual and its layer norm."""

    shape: Any
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return bert.layer_norm(self.options)(x + bert.SelfAttention(self.shape, self.options)(x))


def bert_attention(options: Options) -> Workload:
    """BERT-Large's self-attention block."""
    s = BERT[options.size]
    block = AttentionBlock(s, options.replace(dropout=0.0))

    def on_chip(aval: Any) -> bool:
        return aval.ndim == 4 and aval.shape[-2:] == (s.sequence, s.sequence)

    size = (s.batch, s.sequence, s.hidden)
    return _block("bert-attention", block, size, size, options, on_chip)


def bert_mlp(options: Options) -> Workload:
    """BERT-Large's MLP block."""
    s = BERT[options.size]
    size = (s.batch, s.sequence, s.hidden)
    return _block("bert-mlp", MlpBlock(s, options.replace(dropout=0.0)), size, size, options)


def resnet_bottleneck(options: Options) -> Workload:
    """A bottleneck of ResNet-50's first stage: 256 channels at a quarter of the image's size."""
    s = RESNET[options.size]
    size = (s.batch, s.image // 4, s.image // 4, 4 * s.width)
    block = resnet.Bottleneck(s.width, 1, options)
    return _block("resnet-bottleneck", block, size, size, options)


def xmlcnn_head(options: Options) -> Workload:
    """XML-CNN's label layer with its sigmoid cross entropy."""
    s = XMLCNN[options.size]
    dense = nn.Dense(s.labels, dtype=options.dtype, param_dtype=options.param_dtype)
    x = jax.ShapeDtypeStruct((s.batch, s.hidden), jnp.dtype(options.dtype))

    def draw(key: jax.Array) -> Tree:
        k1, k2 = jax.random.split(key)
        labels = multi_hot(k2, s.batch, s.labels, s.positives)
        return {"x": jax.random.normal(k1, x.shape, x.dtype), "labels": labels}

    def loss_fn(params: Tree, x: jax.Array, batch: Tree) -> jax.Array:
        return binary_cross_entropy(dense.apply({"params": params}, x), batch["labels"])

    return Workload(
        "xmlcnn-head",
        loss_and_backward(loss_fn),
        init=lambda seed: init_variables(dense.init, seed, x)["params"],
        batch=from_seed(draw),
        donate_argnums=(),
        carries_state=False,
        on_chip=lambda aval: aval.shape == (s.batch, s.labels),
    )


def gcn_uturn(options: Options) -> Workload:
    """The GCN's turn from forward to backward: the last aggregation, classes, loss, and back."""
    s = gcn.shape_of(options)
    dense = nn.Dense(s.classes, dtype=options.dtype, param_dtype=options.param_dtype)
    x = jax.ShapeDtypeStruct((s.nodes, s.hidden), jnp.dtype(options.dtype))

    @from_seed
    def draw(key: jax.Array) -> Tree:
        k1, k2 = jax.random.split(key)
        return {
            "x": jax.random.normal(k1, x.shape, x.dtype),
            "labels": jax.random.randint(k2, (s.nodes,), 0, s.classes),
        }

    def loss_fn(params: Tree, x: jax.Array, batch: Tree) -> jax.Array:
        h = nn.relu(gcn.aggregate(x, batch["graph"], "segment_sum") + x)
        return cross_entropy(dense.apply({"params": params}, h), batch["labels"])

    return Workload(
        "gcn-uturn",
        loss_and_backward(loss_fn),
        init=lambda seed: init_variables(dense.init, seed, x)["params"],
        batch=lambda seed: draw(seed) | {"graph": gcn.graph_of(s, options)},
        donate_argnums=(),
        carries_state=False,
        on_chip=gcn.messages_stay_on_chip(s),
    )


def _block(
    name: str,
    module: nn.Module,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    options: Options,
    on_chip: Callable[[Any], bool] | None = None,
) -> Workload:
    """A module as a forward-backward workload on normal inputs and cotangents."""

    def apply(params: Tree, x: jax.Array) -> jax.Array:
        # Running statistics are no part of the subgraph: BatchNorm's are left unused.
        out = module.apply({"params": params}, x, mutable=["batch_stats"])
        return out[0]

    @from_seed
    def batch(key: jax.Array) -> Tree:
        k1, k2 = jax.random.split(key)
        return {
            "x": jax.random.normal(k1, x_shape, options.dtype),
            "dy": jax.random.normal(k2, y_shape, options.dtype),
        }

    x = jax.ShapeDtypeStruct(x_shape, jnp.dtype(options.dtype))
    extra = {} if on_chip is None else {"on_chip": on_chip}
    return Workload(
        name,
        forward_backward(apply),
        init=lambda seed: init_variables(module.init, seed, x)["params"],
        batch=batch,
        donate_argnums=(),
        carries_state=False,
        **extra,
    )
