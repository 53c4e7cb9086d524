"""The common shape of the PyTorch twins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.options import Options

Batch = dict[str, Any]


@dataclass(frozen=True)
class Twin:
    """A PyTorch workload.

    Attributes:
      module: the model, on the device, in the options' dtype.
      forward: ``(module, batch) -> tensor``: the loss of a training step, or the output of a
        subgraph, whose cotangent is ``batch["dy"]``.
      batch: seed -> batch on the device.
      trains: whether a step ends with an SGD update; a subgraph's ends with its gradients.
      batches: how many batches to rotate through.
    """

    module: nn.Module
    forward: Callable[[nn.Module, Batch], torch.Tensor]
    batch: Callable[[int], Batch]
    trains: bool = True
    batches: int = 3


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(options: Options) -> torch.dtype:
    """The dtype of the computation."""
    return getattr(torch, options.dtype)


def build(make: Callable[[], nn.Module], options: Options) -> nn.Module:
    """The module drawn from seed 0 on the device, as ``models/_init.py`` draws: kernels normal
    with variance 1 / fan-in, embeddings and biases with deviation 0.02.

    BatchNorm stays in float32: cuDNN's fast path wants it so.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        module = make()
    module.to_empty(device=device())
    for part in module.modules():
        _initialise(part)
    module.to(dtype_of(options))
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.float()
    return module.train()


def generator(seed: int) -> torch.Generator:
    """A generator on the device."""
    return torch.Generator(device()).manual_seed(1000 + seed)


def normal(shape: Iterable[int], options: Options, random: torch.Generator) -> torch.Tensor:
    """Normal numbers on the device in the dtype of the computation."""
    return torch.randn(*shape, generator=random, device=device(), dtype=dtype_of(options))


def integers(shape: Iterable[int], below: int, random: torch.Generator) -> torch.Tensor:
    """Uniform ``int64`` below a bound, on the device."""
    return torch.randint(below, tuple(shape), generator=random, device=device())


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean softmax cross entropy in float32."""
    flat = logits.flatten(0, -2).float()
    return nn.functional.cross_entropy(flat, labels.flatten())


def _initialise(part: nn.Module) -> None:
    if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
        part.reset_parameters()
    for name, value in part.named_parameters(recurse=False):
        is_norm = isinstance(part, nn.BatchNorm2d | nn.LayerNorm)
        if is_norm and name == "weight":
            continue
        kernel = name == "weight" and not isinstance(part, nn.Embedding)
        deviation = value[0].numel() ** -0.5 if kernel else 0.02
        nn.init.normal_(value, std=deviation)
