"""Under what a kernel's measured times are stored."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

from jevt_kernels import launch
from jevt_kernels.spec import KernelSpec


def key(spec: KernelSpec, alternative: str = "") -> str:
    """A digest of all that decides how long a kernel and its alternative take.

    Args:
      spec: the kernel. Its name and comment say nothing; neither does which outputs share a buffer
        with an input, as it moves the same bytes.
      alternative: text of what XLA would run instead, "" for nothing.

    Raises:
      UnsupportedKernel: the spec cannot be generated.
    """
    return hashlib.sha256(f"{_spec(anonymous(spec))}\n{alternative}".encode()).hexdigest()[:32]


def anonymous(spec: KernelSpec) -> KernelSpec:
    """The spec as far as it decides its times."""
    return dataclasses.replace(spec, name="kernel", comment="", aliases=())


@functools.lru_cache(maxsize=4096)
def _spec(spec: KernelSpec) -> str:
    # With the text that is printed for it: times of another code generator say nothing of this one.
    text = f"{spec!r}\n{launch.source_for(spec, None).text}"
    return hashlib.sha256(text.encode()).hexdigest()
