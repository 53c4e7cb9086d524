"""The variants: which framework runs a workload, how, and in which environment.

Imports no framework; a variant's runner is imported in the worker that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Lane = Literal["xla", "torch"]


@dataclass(frozen=True)
class Variant:
    """One way to run a workload.

    Attributes:
      name: as on the command line.
      lane: workers of one lane load one after the other, so that no two tune at the same time.
      runner: module and class of the runner.
      only: the workloads it is defined for; None for all.
      environment: variables of the worker's process.
    """

    name: str
    lane: Lane
    runner: str
    only: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


_JAX = "benchmarks.runners.jax_runner:JaxRunner"
_TORCH = "benchmarks.runners.torch_runner:TorchRunner"
_WITH_ATTENTION = ("bert", "vit", "vit-nnx", "bert-attention")

# The float32 run that gradients are checked against: no tuning (it is not timed), no TF32.
FLOAT32 = Variant(
    "float32",
    "xla",
    _JAX,
    environment={
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    },
)

VARIANTS: Mapping[str, Variant] = {
    v.name: v
    for v in (
        Variant("jax", "xla", _JAX),
        Variant("jax-cudnn", "xla", _JAX, only=_WITH_ATTENTION),
        Variant("jevt", "xla", _JAX),
        Variant("torch", "torch", _TORCH),
        Variant("inductor", "torch", _TORCH),
        Variant("inductor-max", "torch", _TORCH),
    )
}

# The roofline floor runs nothing: the main process computes it from counts and ceilings.
FLOOR = "floor"
NAMES = (*VARIANTS, FLOOR)


def check(names: list[str]) -> list[str]:
    """The names, each once, in the order given.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"variants: expected some of {', '.join(NAMES)}; got {name!r}")
    return list(dict.fromkeys(names))
