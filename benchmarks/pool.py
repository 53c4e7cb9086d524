"""Starts workers with the right environment, ahead of their turn, and ends them all."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.process import WorkerProcess
from benchmarks.variants import Variant


class Pool:
    """The workers of a run.

    Args:
      scratch: folder for logs, compilation caches and reference gradients; each worker's caches
        start empty, so that a cold start is cold, unless workers are shared.
      share: whether one worker serves all jobs of a variant, and all share their caches. Quick,
        but memory peaks then mix and one job's death is the next one's; for smoke runs and for
        the kernel suites.
      torch_python: the interpreter of the PyTorch variants; None for this one.
      torch_path: ``PYTHONPATH`` of the PyTorch variants, which pin their own Triton; None for
        this process's.
      xla_flags: added to ``XLA_FLAGS``.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        share: bool,
        torch_python: str | None = None,
        torch_path: str | None = None,
        xla_flags: str = "",
    ) -> None:
        self.scratch = scratch
        self.share = share
        self._xla_flags = xla_flags
        self._torch_python = torch_python
        self._torch_path = torch_path
        self._ready: dict[str, list[WorkerProcess]] = {}
        self._all: list[WorkerProcess] = []

    def prestart(self, variants: list[Variant]) -> None:
        """Starts one worker of each, so that ``take`` finds its imports done."""
        for variant in variants:
            ready = self._ready.setdefault(variant.name, [])
            if not (self.share and ready):
                ready.append(self._start(variant))

    def take(self, variant: Variant) -> WorkerProcess:
        """A living worker of the variant: a shared one, one started ahead, or a new one."""
        ready = self._ready.setdefault(variant.name, [])
        ready[:] = [worker for worker in ready if worker.alive]
        if not ready:
            ready.append(self._start(variant))
        return ready[0] if self.share else ready.pop(0)

    def give_back(self, worker: WorkerProcess, *, broken: bool = False) -> None:
        """Ends a worker, and with it frees its device memory; a shared one only if broken."""
        if broken or not self.share:
            worker.close()

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._all:
            worker.kill()
        self._ready.clear()

    def _start(self, variant: Variant) -> WorkerProcess:
        folder = self.scratch / f"{len(self._all):03d}-{variant.name}"
        folder.mkdir(parents=True)
        cache = (self.scratch if self.share else folder) / "cache"
        environment = _environment(variant, cache, self._xla_flags)
        python = None
        if variant.lane == "torch":
            python = self._torch_python
            if self._torch_path is not None:
                environment["PYTHONPATH"] = self._torch_path
        worker = WorkerProcess(variant.runner, environment, folder / "log.txt", python)
        self._all.append(worker)
        return worker


def _environment(variant: Variant, cache: Path, xla_flags: str) -> dict[str, str]:
    """This process's environment, with caches in a folder of the run and memory taken as needed."""
    own = variant.environment
    flags = (os.environ.get("XLA_FLAGS"), xla_flags, own.get("XLA_FLAGS"))
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        **own,
        "XLA_FLAGS": " ".join(filter(None, flags)),
    }
