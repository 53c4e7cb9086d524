"""Which device, and with what software: measured times hold for nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

import jax

from jevt_kernels import compat

#: Distributions whose versions change what is generated or how fast it runs.
_DISTRIBUTIONS = ("jaxlib", "triton", "jax-triton", "jax-cuda12-plugin", "jax-cuda13-plugin")

#: Where Linux shows the version of NVIDIA's driver.
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclasses.dataclass(frozen=True)
class Identity:
    """A device and the software that runs on it.

    Attributes:
      device: name, as the device reports itself.
      capability: compute capability, 90 for sm_90.
      versions: pairs of a name and a version, ascending.
    """

    device: str
    capability: int
    versions: tuple[tuple[str, str], ...] = ()

    @property
    def slug(self) -> str:
        """A file name's stem: readable, and another one for other versions."""
        words = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")[:60] or "device"
        text = json.dumps([self.device, self.capability, self.versions])
        return f"{words}-sm{self.capability}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def local() -> Identity | None:
    """The first visible CUDA GPU, None where JAX sees none."""
    capability = compat.local_compute_capability()
    if capability is None:
        return None
    name = jax.local_devices(backend="cuda")[0].device_kind
    return Identity(name, capability, versions())


def versions(driver: Path = _DRIVER) -> tuple[tuple[str, str], ...]:
    """Versions of the compilers, and of the driver where it can be seen."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        text = driver.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    if match := re.search(r"\b(\d+(?:\.\d+)+)\b", text):
        found["driver"] = match[1]
    return tuple(sorted(found.items()))
