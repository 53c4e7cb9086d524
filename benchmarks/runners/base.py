"""What a worker asks of a runner."""

from __future__ import annotations

import importlib
from typing import Protocol

from benchmarks.messages import Job, Loaded, Profile

WARM_UP_STEPS = 3


class Runner(Protocol):
    """A loaded job. ``load`` comes first and once."""

    def __init__(self, job: Job) -> None: ...

    def load(self) -> Loaded:
        """Builds the workload, compiles and checks it, warms it up."""
        ...

    def block(self, steps: int) -> float:
        """Seconds of ``steps`` pipelined steps, waited for once at the end."""
        ...

    def profile(self, steps: int) -> Profile:
        """The kernels of ``steps`` steps."""
        ...


def runner_class(path: str) -> type[Runner]:
    """The class named ``module:Class``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
