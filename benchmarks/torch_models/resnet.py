"""The twin of ``models/resnet.py``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from benchmarks.options import Options
from benchmarks.shapes import RESNET, ResnetShape
from benchmarks.torch_models.twin import (
    Batch,
    Twin,
    build,
    cross_entropy,
    generator,
    integers,
    normal,
)


class ConvNorm(nn.Sequential):
    """A convolution without bias and its BatchNorm."""

    def __init__(self, inputs: int, outputs: int, width: int, stride: int) -> None:
        conv = nn.Conv2d(inputs, outputs, width, stride, padding=width // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """1×1, 3×3 (strided), 1×1 convolutions, a shortcut, ReLU."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.reduce = ConvNorm(inputs, width, 1, 1)
        self.spatial = ConvNorm(width, width, 3, stride)
        self.expand = ConvNorm(width, outputs, 1, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.reduce(x))
        y = functional.relu(self.spatial(y))
        return functional.relu(self.shortcut(x) + self.expand(y))


class Resnet(nn.Module):
    """Images ``[batch, channels, image, image]``, channels last in memory, to logits."""

    def __init__(self, shape: ResnetShape) -> None:
        super().__init__()
        self.stem = ConvNorm(shape.channels, shape.width, 7, 2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks, inputs = [], shape.width
        for stage, count in enumerate(shape.blocks):
            width = shape.width * 2**stage
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Bottleneck(inputs, width, stride))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, shape.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(functional.relu(self.stem(x)))
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def make(options: Options) -> Twin:
    """The twin of ResNet-50's training step."""
    s = RESNET[options.size]

    def batch(seed: int) -> Batch:
        random = generator(seed)
        images = normal((s.batch, s.channels, s.image, s.image), options, random)
        return {
            "images": images.contiguous(memory_format=torch.channels_last),
            "labels": integers((s.batch,), s.classes, random),
        }

    def forward(module: nn.Module, batch: Batch) -> torch.Tensor:
        return cross_entropy(module(batch["images"]), batch["labels"])

    module = build(lambda: Resnet(s), options).to(memory_format=torch.channels_last)
    return Twin(module, forward, batch)
