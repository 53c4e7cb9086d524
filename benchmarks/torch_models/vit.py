"""The twin of ``models/vit.py``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from benchmarks.options import Options
from benchmarks.shapes import VIT, VitShape
from benchmarks.torch_models.twin import (
    Batch,
    Twin,
    build,
    cross_entropy,
    generator,
    integers,
    normal,
)


class Block(nn.Module):
    """One pre-LN encoder block."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(shape.hidden, eps=1e-6)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.projection = nn.Linear(shape.hidden, shape.hidden)
        self.norm_mlp = nn.LayerNorm(shape.hidden, eps=1e-6)
        self.up = nn.Linear(shape.hidden, shape.ffn)
        self.down = nn.Linear(shape.ffn, shape.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm_attention(x))
        qkv = qkv.view(*x.shape[:2], 3, self.heads, x.shape[-1] // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.projection(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.norm_mlp(x))))


class Vit(nn.Module):
    """Images ``[batch, 3, image, image]``, channels last in memory, to logits."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, shape.hidden, shape.patch, stride=shape.patch)
        self.positions = nn.Parameter(torch.empty(1, shape.tokens, shape.hidden))
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.hidden, eps=1e-6)
        self.head = nn.Linear(shape.hidden, shape.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def make(options: Options) -> Twin:
    """The twin of ViT-B/14's training step."""
    s = VIT[options.size]

    def batch(seed: int) -> Batch:
        random = generator(seed)
        images = normal((s.batch, 3, s.image, s.image), options, random)
        return {
            "images": images.contiguous(memory_format=torch.channels_last),
            "labels": integers((s.batch,), s.classes, random),
        }

    def forward(module: nn.Module, batch: Batch) -> torch.Tensor:
        return cross_entropy(module(batch["images"]), batch["labels"])

    module = build(lambda: Vit(s), options).to(memory_format=torch.channels_last)
    return Twin(module, forward, batch)
