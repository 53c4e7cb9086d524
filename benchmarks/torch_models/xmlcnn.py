"""The twin of ``models/xmlcnn.py``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from benchmarks.options import Options
from benchmarks.shapes import XMLCNN, XmlcnnShape
from benchmarks.torch_models.twin import Batch, Twin, build, generator, integers, normal


class Xmlcnn(nn.Module):
    """Documents ``[batch, embedding, sequence]`` to logits ``[batch, labels]``."""

    def __init__(self, shape: XmlcnnShape) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(shape.embedding, shape.filters, width, stride=2, padding=(width - 2) // 2)
            for width in shape.widths
        )
        self.window = shape.sequence // 2 // shape.pooled
        pooled = len(shape.widths) * shape.filters * shape.pooled
        self.hidden = nn.Linear(pooled, shape.hidden)
        self.labels = nn.Linear(shape.hidden, shape.labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = [
            functional.max_pool1d(functional.relu(conv(x)), self.window).flatten(1)
            for conv in self.convolutions
        ]
        return self.labels(functional.relu(self.hidden(torch.cat(pooled, dim=1))))


def multi_hot(s: XmlcnnShape, random: torch.Generator) -> torch.Tensor:
    """``float32[batch, labels]`` with ``positives`` ones a row, made on the device."""
    labels = torch.zeros(s.batch, s.labels, device=random.device)
    return labels.scatter_(1, integers((s.batch, s.positives), s.labels, random), 1.0)


def binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sigmoid cross entropy in float32, summed over labels, divided by the batch."""
    losses = functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    return losses / logits.shape[0]


def make(options: Options) -> Twin:
    """The twin of XML-CNN's training step."""
    s = XMLCNN[options.size]

    def batch(seed: int) -> Batch:
        random = generator(seed)
        return {
            "documents": normal((s.batch, s.embedding, s.sequence), options, random),
            "labels": multi_hot(s, random),
        }

    def forward(module: nn.Module, batch: Batch) -> torch.Tensor:
        return binary_cross_entropy(module(batch["documents"]), batch["labels"])

    return Twin(build(lambda: Xmlcnn(s), options), forward, batch)
