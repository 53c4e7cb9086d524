"""The fastest configuration of a kernel, measured on the device within a time limit."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax

import jevt_kernels
from jevt_kernels.mainloops import MAINLOOPS
from jevt_kernels.spec import Config, KernelSpec

# Programs compiled at a time; Triton and XLA let go of Python's lock while they compile.
_THREADS = 8
# A program calls the kernel so often, on each set of operands in turn, as long as its results, of
# which each thread may hold those of a program, take no more than so many bytes.
_CALLS = 6
_RESULT_BYTES = 4 << 30
_REPEATS = 3
# Characters of an error's first line that are kept.
_MESSAGE = 80


@dataclass(frozen=True)
class Trial:
    """A configuration and what became of it.

    Attributes:
      config: what was tried.
      us: microseconds a call, launch included; None if it failed.
      error: why it failed.
    """

    config: Config
    us: float | None
    error: str = ""

    def __str__(self) -> str:
        return f"{describe(self.config)}: {self.error or f'{self.us:.1f} µs'}"


def describe(config: Config) -> str:
    """A configuration in a few characters: ``128x256x64 w8 s4``."""
    text = "x".join(str(block) for _, block in config.blocks)
    text += f" w{config.num_warps} s{config.num_stages}"
    usual = Config(config.blocks)
    for name, letter in (("programs", "p"), ("group", "g"), ("splits", "k"), ("subtiles", "e")):
        if getattr(config, name) != getattr(usual, name):
            text += f" {letter}{getattr(config, name)}"
    return text + " tma" * config.descriptors


def fastest(
    spec: KernelSpec, operands: Sequence[tuple[Any, ...]], most: int, limit_s: float
) -> tuple[Config, list[Trial]]:
    """Tries configurations in the order of the mainloop's preference.

    Args:
      spec: the kernel.
      operands: sets of operands, to rotate through.
      most: configurations to try at most.
      limit_s: seconds after which no further one is compiled.

    Returns:
      The fastest, and all trials, the fastest first.

    Raises:
      RuntimeError: if all failed.
    """
    candidates = MAINLOOPS[spec.mainloop].configs(spec)[:most]
    size = sum(output.nbytes for output in spec.outputs)
    calls = max(1, min(_CALLS, _RESULT_BYTES // size))
    sets = [operands[i % len(operands)] for i in range(calls)]
    pool = ThreadPoolExecutor(_THREADS)
    jobs = [pool.submit(_prepared, spec, config, sets) for config in candidates]
    wait(jobs, timeout=limit_s)
    # What runs cannot be cancelled; it would disturb the times of the others, so it is waited for.
    pool.shutdown(cancel_futures=True)
    prepared = zip(candidates, jobs, strict=True)
    trials = [_trial(config, job, sets) for config, job in prepared if not job.cancelled()]
    trials.sort(key=lambda trial: float("inf") if trial.us is None else trial.us)
    if not trials or trials[0].us is None:
        reasons = "; ".join(map(str, trials)) or "nothing was tried"
        raise RuntimeError(f"no configuration of {spec.name} runs: {reasons}")
    return trials[0].config, trials


def _prepared(spec: KernelSpec, config: Config, sets: list[tuple[Any, ...]]) -> Any:
    """The compiled program, run once: ptxas assembles its kernel then."""

    def program(sets: list[tuple[Any, ...]]) -> list[Any]:
        return [jevt_kernels.call(spec, *operands, config=config) for operands in sets]

    compiled = jax.jit(program).lower(sets).compile()
    jax.block_until_ready(compiled(sets))
    return compiled


def _trial(config: Config, job: Any, sets: list[tuple[Any, ...]]) -> Trial:
    try:
        run = functools.partial(job.result(), sets)
        seconds = min(_timed(run) for _ in range(_REPEATS))
    # Triton's compiler and the driver raise whatever they like; a configuration more or less.
    except Exception as error:  # noqa: BLE001
        return Trial(config, None, f"{type(error).__name__}: {error}".splitlines()[0][:_MESSAGE])
    return Trial(config, seconds / len(sets) * 1e6)


def _timed(run: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
