"""The kernel families: how tiles are produced and walked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops import (
    columnwise,
    gemm,
    multi_tensor,
    parts,
    pointwise,
    rowwise,
    segments,
)
from jevt_kernels.spec import Config, KernelSpec, Stages


class Mainloop(Protocol):
    """What a module of this package offers.

    Attributes:
      SMALLEST_BLOCK: the least size of a block, however short its axis is.
    """

    SMALLEST_BLOCK: int

    def configs(self, spec: KernelSpec) -> tuple[Config, ...]:
        """Configurations worth trying, the preferred one first."""
        ...

    def emit(self, printer: Printer) -> int:
        """Prints the kernel's body and returns the number of program instances."""
        ...


MAINLOOPS: dict[str, Mainloop] = {
    "pointwise": pointwise,
    "multi_tensor": multi_tensor,
    "rowwise": rowwise,
    "columnwise": columnwise,
    "gemm": gemm,
    "segments": segments,
    "parts": parts,
}

#: Mainloops that can leave a kernel to several: which ones, in a configuration; None for one.
STAGES: dict[str, Callable[[KernelSpec, Config], Stages | None]] = {
    "columnwise": columnwise.stages,
    "gemm": gemm.stages,
    "multi_tensor": multi_tensor.stages,
    "rowwise": rowwise.stages,
}
