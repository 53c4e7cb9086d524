"""What the main process and its workers say to each other, as JSON lines.

The main process sends ``Request``s; a worker answers each with one reply: the JSON of one of the
dataclasses below, or ``{"error": "..."}``. Imports no framework.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.options import Options

Verb = Literal["hello", "ceilings", "work", "load", "block", "profile", "quit"]


@dataclass(frozen=True)
class Job:
    """What a worker is to load.

    Attributes:
      kind: ``workload`` (a name of ``registry``) or ``case`` (``suite/name`` of the kernel suites).
      name: of the workload or case.
      variant: a name of ``variants.VARIANTS``, or a peer of the case.
      options: the workload's options.
      references: folder with the gradients to compare with, and where they are written.
      measure_warm: whether to measure the warm start too.
      configs: configurations of a case's kernel to try at most.
      search_s: seconds after which no further configuration is compiled.
    """

    kind: Literal["workload", "case"]
    name: str
    variant: str
    options: Options
    references: str | None = None
    measure_warm: bool = True
    configs: int = 12
    search_s: float = 60.0

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Job:
        """The inverse of ``to_json``."""
        return Job(**{**fields, "options": Options(**fields["options"])})


@dataclass(frozen=True)
class Hello:
    """Who the worker is: the device's name, and the versions only a loaded framework can tell."""

    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on the device: bf16 matmul FLOP/s, and copied bytes/s (read plus written)."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class WorkCount:
    """FLOPs and bytes of one step."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Loaded:
    """What loading a job measured.

    Attributes:
      cold_start_s: seconds from calling the step first to its result, caches empty.
      warm_start_s: the same with the caches on disk filled, or None if not measured.
      peak_bytes: peak device memory of the step with one batch resident; None on a CPU.
      rel_err: relative error against the float32 reference; None without one or if not finite.
      note: what else the row should say.
      step_s: seconds of a warm step, roughly.
      tried: configurations of a kernel that were tried, with their times.
    """

    cold_start_s: float
    warm_start_s: float | None
    peak_bytes: int | None
    rel_err: float | None
    note: str
    step_s: float
    tried: str = ""


@dataclass(frozen=True)
class Block:
    """Seconds of a block of pipelined steps."""

    seconds: float


@dataclass(frozen=True)
class Kernel:
    """One kernel's share of a step: its name, a category, milliseconds and launches per step."""

    name: str
    category: str
    ms: float
    count: float


@dataclass(frozen=True)
class Profile:
    """The kernels of a step by time, longest first; empty where the profiler sees no GPU."""

    kernels: tuple[Kernel, ...]

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Profile:
        """The inverse of ``dataclasses.asdict``."""
        return Profile(tuple(Kernel(**k) for k in fields["kernels"]))

    @property
    def total_ms(self) -> float | None:
        """Device milliseconds per step, or None."""
        return sum(k.ms for k in self.kernels) if self.kernels else None

    @property
    def launches(self) -> int | None:
        """Kernels per step, or None."""
        return round(sum(k.count for k in self.kernels)) if self.kernels else None
