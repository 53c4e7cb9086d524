"""What the stages of a compilation may know beside the jaxpr."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jevt_kernels.tuning import NOTHING, Snapshot

type Backend = Literal["auto", "triton", "xla", "interpret"]


@dataclasses.dataclass(frozen=True)
class Device:
    """Roofline of one device.

    Attributes:
      name: as the device reports itself, or the table's name.
      compute_capability: major * 10 + minor; 0 for a CPU.
      bytes_per_us: sustained copy bandwidth, bytes read plus bytes written per microsecond.
      flops_per_us: dense bfloat16 rate with float32 accumulation.
      xla_launch_us: cost of one small XLA fusion inside a program.
      triton_launch_us: cost of one small Triton call inside a program.
      l2_bytes: size of the last-level cache.
      processors: number of streaming multiprocessors.
      cublas_flops_per_us: bfloat16 rate of cuBLAS in the matrix products of training steps.
      kernel_flops_per_us: the same of our matrix products, where their tiles fill the processors.
      exposed_epilogue: the part of an epilogue's time, beyond one plain store, that is not hidden
        behind other tiles' products.
      memory_bytes: what programs may use of its memory.
    """

    name: str
    compute_capability: int
    bytes_per_us: float
    flops_per_us: float
    xla_launch_us: float
    triton_launch_us: float
    l2_bytes: int
    processors: int
    cublas_flops_per_us: float
    kernel_flops_per_us: float
    exposed_epilogue: float
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Context:
    """Circumstances of one compilation; hashable, part of the cache key.

    Attributes:
      platform: "cpu", "cuda", …: what the program is lowered for.
      backend: the user's choice, see ``jevt.jit``.
      strict: raise where a fallback is not the cost model's decision.
      donated: for each flat input, whether its buffer may be overwritten.
      device: the cost model's picture of the device.
      partitioned: more than one device under automatic partitioning, so that custom calls would be
        replicated.
      fuel: number of groups that may be lowered to Triton, None for no limit (``JEVT_FUEL``).
      check: run every group beside its own equations (``JEVT_CHECK``).
      partition_seconds: time limit of the partitioner.
      known: measured times of this device, as the store had them when the compilation began.
      tune: plan what may be worth it too, since it will be measured (``jevt.jit(tune="on")``).
    """

    platform: str
    backend: Backend
    strict: bool
    donated: tuple[bool, ...]
    device: Device
    partitioned: bool = False
    fuel: int | None = None
    check: bool = False
    partition_seconds: float = 10.0
    known: Snapshot = NOTHING
    tune: bool = False

    @property
    def own_kernels(self) -> bool:
        """Whether a pass may put in an equation that runs as a kernel of its own.

        Not where the user or automatic partitioning leaves everything to XLA, nor when only the
        first few groups are to be kernels.
        """
        wanted = self.backend in ("auto", "triton") and not self.partitioned
        return self.platform == "cuda" and wanted and self.fuel is None
