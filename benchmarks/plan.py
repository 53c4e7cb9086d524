"""What a run of the benchmarks is asked to do, validated once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from benchmarks.options import Options

# Bounds of the steps of a block, where the run chooses them.
FEWEST_STEPS, MOST_STEPS = 4, 1000


@dataclass(frozen=True)
class Plan:
    """Settings of a run.

    Attributes:
      options: of the workloads.
      steps: steps per timed block; 0 to choose them by ``block_s``.
      block_s: seconds that a block should last.
      blocks: timed blocks per variant, taken in turns.
      time_limit_s: seconds that one variant of one workload may take.
      total_limit_s: seconds after which nothing new is started.
      serial: whether one variant at a time compiles; otherwise the JAX variants, one after the
        other, compile beside the PyTorch variants, one after the other.
      reference: whether gradients are checked.
      measure_warm: whether warm starts are measured.
      profile_steps: steps under the profiler; 0 for no profile.
      configs, search_s: see ``messages.Job``.
    """

    options: Options = field(default_factory=Options)
    steps: int = 0
    block_s: float = 0.4
    blocks: int = 7
    time_limit_s: float = 300.0
    total_limit_s: float = float("inf")
    serial: bool = False
    reference: bool = True
    measure_warm: bool = True
    profile_steps: int = 3
    configs: int = 12
    search_s: float = 60.0

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {self.blocks}")

    def steps_per_block(self, step_s: float) -> int:
        """The steps of a block, for a step of so many seconds."""
        if self.steps:
            return self.steps
        wanted = round(self.block_s / max(step_s, 1e-9))
        return min(max(wanted, FEWEST_STEPS), MOST_STEPS)


class Clock:
    """Seconds left of the whole run."""

    def __init__(self, limit_s: float) -> None:
        self._deadline = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left; not below zero."""
        return max(self._deadline - time.monotonic(), 0.0)
