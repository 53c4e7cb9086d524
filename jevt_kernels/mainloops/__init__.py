"""The kernel families: how tiles are produced and walked."""

from __future__ import annotations

from typing import Protocol

from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops import columnwise, pointwise, rowwise
from jevt_kernels.spec import Config, KernelSpec


class Mainloop(Protocol):
    """What a module of this package offers."""

    def configs(self, spec: KernelSpec) -> tuple[Config, ...]:
        """Configurations worth trying, the preferred one first."""
        ...

    def emit(self, printer: Printer) -> int:
        """Prints the kernel's body and returns the number of program instances."""
        ...


MAINLOOPS: dict[str, Mainloop] = {
    "pointwise": pointwise,
    "rowwise": rowwise,
    "columnwise": columnwise,
}
