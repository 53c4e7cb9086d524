"""The twins of ``subgraphs.py``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from benchmarks.options import Options
from benchmarks.shapes import BERT, GCN, RESNET, XMLCNN
from benchmarks.torch_models import bert, gcn, resnet, xmlcnn
from benchmarks.torch_models.twin import (
    Batch,
    Twin,
    build,
    cross_entropy,
    generator,
    integers,
    normal,
)


def bert_attention(options: Options) -> Twin:
    """Self-attention with residual and layer norm."""
    s = BERT[options.size]
    size = (s.batch, s.sequence, s.hidden)
    block = build(lambda: bert.Residual(bert.SelfAttention(s, 0.0), s.hidden, 0.0), options)
    return _block(block, size, options)


def bert_mlp(options: Options) -> Twin:
    """The MLP with residual and layer norm."""
    s = BERT[options.size]
    size = (s.batch, s.sequence, s.hidden)
    return _block(build(lambda: bert.Residual(bert.Mlp(s), s.hidden, 0.0), options), size, options)


def resnet_bottleneck(options: Options) -> Twin:
    """A bottleneck of the first stage."""
    s = RESNET[options.size]
    channels, side = 4 * s.width, s.image // 4
    block = build(lambda: resnet.Bottleneck(channels, s.width, 1), options)
    block = block.to(memory_format=torch.channels_last)
    return _block(block, (s.batch, channels, side, side), options)


def xmlcnn_head(options: Options) -> Twin:
    """The label layer with its loss."""
    s = XMLCNN[options.size]

    def batch(seed: int) -> Batch:
        random = generator(seed)
        x = normal((s.batch, s.hidden), options, random)
        return {"x": x, "labels": xmlcnn.multi_hot(s, random)}

    def forward(module: nn.Module, batch: Batch) -> torch.Tensor:
        return xmlcnn.binary_cross_entropy(module(batch["x"]), batch["labels"])

    module = build(lambda: nn.Linear(s.hidden, s.labels), options)
    return Twin(module, forward, batch, trains=False)


def gcn_uturn(options: Options, *, compiled: bool = False) -> Twin:
    """The last aggregation, classes and loss."""
    s = GCN[options.size]
    graph = gcn.draw_graph(s, options, csr=not compiled)

    def batch(seed: int) -> Batch:
        random = generator(seed)
        return {
            "x": normal((s.nodes, s.hidden), options, random),
            "labels": integers((s.nodes,), s.classes, random),
            "graph": graph,
        }

    def forward(module: nn.Module, batch: Batch) -> torch.Tensor:
        h = functional.relu(batch["graph"].aggregate(batch["x"]) + batch["x"])
        return cross_entropy(module(h), batch["labels"])

    module = build(lambda: nn.Linear(s.hidden, s.classes), options)
    return Twin(module, forward, batch, trains=False)


def _block(module: nn.Module, size: tuple[int, ...], options: Options) -> Twin:
    def batch(seed: int) -> Batch:
        random = generator(seed)
        x, dy = normal(size, options, random), normal(size, options, random)
        if len(size) == 4:
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        return {"x": x, "dy": dy}

    return Twin(module, lambda module, batch: module(batch["x"]), batch, trains=False)
