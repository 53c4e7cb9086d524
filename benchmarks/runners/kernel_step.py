"""The step of a case that brings its kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

import jevt_kernels
from benchmarks.workload import Tree
from jevt_kernels import reference
from jevt_kernels.spec import KernelSpec


class KernelStep:
    """Runs a kernel in its fastest configuration; without a GPU, the kernel's reference.

    Args:
      spec: the kernel.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self._spec = spec
        self._run: Any = None

    def prepare(self, batches: Sequence[tuple[Any, ...]], most: int, limit_s: float) -> str:
        """Finds the configuration; returns what was tried."""
        if jax.default_backend() != "gpu":
            self._run = jax.jit(functools.partial(reference.reference, self._spec))
            return "the reference: there is no GPU"
        from benchmarks.kernels.search import fastest

        config, trials = fastest(self._spec, batches, most, limit_s)
        self._run = jax.jit(functools.partial(jevt_kernels.call, self._spec, config=config))
        return "; ".join(map(str, trials))

    def __call__(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """A step without state."""
        del state
        return self._run(*batch), ()
