"""The shapes of the workloads, in full and in smoke size.

Batch sizes and shapes are those of the evaluation of EVT (Chen et al., ASPLOS 2024). The Flax
models and their PyTorch twins both read them from here. Imports no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.options import Size


@dataclass(frozen=True)
class BertShape:
    """BERT: ``batch`` sequences of ``sequence`` tokens."""

    batch: int
    sequence: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    token_types: int = 2


@dataclass(frozen=True)
class VitShape:
    """ViT: ``batch`` RGB images of ``image`` × ``image`` pixels, cut into square patches."""

    batch: int
    image: int
    patch: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    classes: int

    @property
    def tokens(self) -> int:
        """Patches per image."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class ResnetShape:
    """ResNet with bottleneck blocks: ``blocks[i]`` of them in stage i, ``width * 2**i`` wide."""

    batch: int
    image: int
    channels: int
    width: int
    blocks: tuple[int, ...]
    classes: int


@dataclass(frozen=True)
class XmlcnnShape:
    """XML-CNN: ``batch`` embedded documents, one multi-hot row of ``labels`` each."""

    batch: int
    sequence: int
    embedding: int
    widths: tuple[int, ...]
    filters: int
    pooled: int
    hidden: int
    labels: int
    positives: int = 5


@dataclass(frozen=True)
class GcnShape:
    """GCN on one graph of ``nodes`` nodes and ``edges`` directed edges.

    ``skew`` shapes the power law: node of rank r gets a share of the edges that falls as
    ``r ** (1 / skew - 1)``. 2.14 gives ogbn-mag's largest degree, about 10⁴ of 5.4·10⁶ edges.
    """

    nodes: int
    edges: int
    features: int
    hidden: int
    convolutions: int
    classes: int
    skew: float = 2.14


@dataclass(frozen=True)
class GptShape:
    """GPT: ``batch`` sequences of ``sequence`` tokens."""

    batch: int
    sequence: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int


BERT: Mapping[Size, BertShape] = {
    "full": BertShape(32, 512, 1024, 24, 16, 4096, 30528),
    "smoke": BertShape(2, 32, 64, 1, 4, 128, 256),
}
VIT: Mapping[Size, VitShape] = {
    "full": VitShape(128, 224, 14, 768, 12, 12, 3072, 1000),
    "smoke": VitShape(2, 28, 7, 64, 1, 4, 128, 16),
}
RESNET: Mapping[Size, ResnetShape] = {
    "full": ResnetShape(128, 224, 4, 64, (3, 4, 6, 3), 1000),
    "smoke": ResnetShape(4, 32, 4, 8, (1, 1), 16),
}
XMLCNN: Mapping[Size, XmlcnnShape] = {
    "full": XmlcnnShape(1024, 512, 304, (2, 4, 8), 32, 32, 512, 670208),
    "smoke": XmlcnnShape(8, 64, 16, (2, 4, 8), 8, 8, 32, 512),
}
#: GPT-3 175B (Brown et al. 2020, table 2.1), a batch of eight sequences a device.
GPT3 = GptShape(8, 2048, 12288, 96, 96, 49152, 50257)
GCN: Mapping[Size, GcnShape] = {
    "full": GcnShape(736_389, 5_416_271, 128, 64, 3, 352),
    "smoke": GcnShape(512, 4096, 16, 16, 3, 8),
}
