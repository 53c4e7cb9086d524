"""Candidates compiled side by side and timed in turns.

A candidate that fails, to compile or to run, is skipped with its reason. What is measured in one
turn is measured again in the next, as long as it is not far behind, so that a drift of the clock
meets all alike. The first turn warms up (memory is allocated, an idle clock rises) and decides
nothing: it was ten times too long for whoever came first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax

from jevt_kernels import launch
from jevt_kernels.spec import Config
from jevt_kernels.tuning.bench import Bench, Program, Work, undisturbed
from jevt_kernels.tuning.space import describe

#: Programs compiled at a time; Triton and XLA let go of Python's lock while they compile.
_THREADS = 8

#: Turns, of which the first does not count.
_TURNS = 4

#: A candidate that is so many times slower than the best in one turn gets no further one.
_FAR = 1.5

#: Characters of an error's first line that are kept.
_MESSAGE = 80


@dataclass(frozen=True)
class Limits:
    """How long a search may take.

    Attributes:
      configs: configurations to try at most.
      seconds: after which no further candidate of a kernel is compiled.
    """

    configs: int = 12
    seconds: float = 60.0


#: Of a search whose caller has no wishes.
LIMITS = Limits()


@dataclass(frozen=True)
class Trial:
    """A candidate and what became of it.

    Attributes:
      config: what was tried; None is XLA.
      us: microseconds a call, launch included; None if it failed.
      error: why it failed.
    """

    config: Config | None
    us: float | None
    error: str = ""

    @property
    def rank(self) -> float:
        """Sorts the fastest first, and last what failed."""
        return float("inf") if self.us is None else self.us

    def __str__(self) -> str:
        name = describe(self.config) if self.config else "XLA"
        return f"{name}: {self.error or f'{self.us:.1f} µs'}"


def contest(
    functions: Mapping[Config | None, Callable[..., Sequence[Any]]],
    bench: Bench,
    work: Work,
    limits: Limits,
    given: Mapping[Config | None, Program] | None = None,
) -> list[tuple[Trial, Program | None]]:
    """Compiles candidates side by side and times them in turns.

    Args:
      functions: candidates.
      bench: where.
      work: what they are run on.
      limits: of the search.
      given: further candidates, which are compiled already.

    Returns:
      What became of each, the fastest first, with its program if it has one.
    """
    ready: dict[Config | None, Program] = dict(given or {})
    times: dict[Config | None, float] = {}
    errors: dict[Config | None, str] = {}
    x64 = jax.config.jax_enable_x64
    pool = ThreadPoolExecutor(_THREADS)
    jobs: dict[Config | None, Future[Program]] = {
        config: pool.submit(_prepared, bench, function, work, x64)
        for config, function in functions.items()
    }
    wait(jobs.values(), timeout=limits.seconds)
    # What runs cannot be cancelled; it would disturb the times of the others, so it is waited for.
    pool.shutdown(cancel_futures=True)
    for config, job in jobs.items():
        if job.cancelled():
            errors[config] = f"not tried within {limits.seconds:.0f} s"
        elif (failure := job.exception()) is not None:
            errors[config] = first_line(failure)
        else:
            ready[config] = job.result()
    for turn in range(_TURNS):
        best = min(times.values(), default=0.0)
        for config, program in ready.items():
            far = config is not None and times.get(config, 0.0) > _FAR * best
            if far or config in errors:
                continue
            try:
                seconds = bench.seconds(program, work)
            except Exception as error:  # noqa: BLE001 - the driver raises whatever it likes
                errors[config] = first_line(error)
            else:
                if turn > 0:
                    times[config] = min(seconds, times.get(config, seconds))
    trials = [
        Trial(config, None, errors[config])
        if config in errors
        else Trial(config, times[config] * 1e6)
        for config in (*ready, *(c for c in functions if c not in ready))
    ]
    trials.sort(key=lambda trial: trial.rank)
    return [(trial, ready.get(trial.config)) for trial in trials]


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    return launch.described(error)[:_MESSAGE]


def _prepared(
    bench: Bench, function: Callable[..., Sequence[Any]], work: Work, x64: bool
) -> Program:
    with undisturbed(x64):
        return bench.prepare(function, work)
