"""The twin of ``models/bert.py``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from benchmarks.options import Options
from benchmarks.shapes import BERT, BertShape
from benchmarks.torch_models.twin import Batch, Twin, build, cross_entropy, generator, integers


class SelfAttention(nn.Module):
    """Multi-head self-attention with its output projection."""

    def __init__(self, shape: BertShape, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, dropout
        self.query = nn.Linear(shape.hidden, shape.hidden)
        self.key = nn.Linear(shape.hidden, shape.hidden)
        self.value = nn.Linear(shape.hidden, shape.hidden)
        self.output = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        q, k, v = (
            layer(x).view(split).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        context = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return self.output(context.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    """Dense, gelu (erf), dense."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, shape.ffn)
        self.down = nn.Linear(shape.ffn, shape.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(x)))


class Residual(nn.Module):
    """A block with dropout, residual and layer norm behind it (post-LN)."""

    def __init__(self, block: nn.Module, hidden: int, dropout: float) -> None:
        super().__init__()
        self.block = block
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.dropout(self.block(x)))


class Bert(nn.Module):
    """Tokens and token types to logits; the decoder shares the word embedding."""

    def __init__(self, shape: BertShape, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.sequence, shape.hidden)
        self.types = nn.Embedding(shape.token_types, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(
            *(
                Residual(block, shape.hidden, dropout)
                for _ in range(shape.layers)
                for block in (SelfAttention(shape, dropout), Mlp(shape))
            )
        )
        self.head = nn.Linear(shape.hidden, shape.hidden)
        self.head_norm = nn.LayerNorm(shape.hidden, eps=1e-12)
        self.bias = nn.Parameter(torch.empty(shape.vocabulary))

    def forward(self, tokens: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.positions.weight + self.types(types)
        x = self.layers(self.dropout(self.norm(x)))
        x = self.head_norm(functional.gelu(self.head(x)))
        return functional.linear(x, self.words.weight, self.bias)


def make(options: Options) -> Twin:
    """The twin of BERT-Large's training step."""
    s = BERT[options.size]

    def batch(seed: int) -> Batch:
        random, size = generator(seed), (s.batch, s.sequence)
        return {
            "tokens": integers(size, s.vocabulary, random),
            "types": integers(size, s.token_types, random),
            "labels": integers(size, s.vocabulary, random),
        }

    def forward(module: nn.Module, batch: Batch) -> torch.Tensor:
        return cross_entropy(module(batch["tokens"], batch["types"]), batch["labels"])

    return Twin(build(lambda: Bert(s, options.dropout), options), forward, batch)
