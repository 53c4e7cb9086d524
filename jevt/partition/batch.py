"""Solves many components: equal ones once, several at a time, with limits that depend on neither.

What ends a search is counted in the solver's deterministic seconds, so that the same program gets
the same plan with one worker or many, on a busy machine or an idle one. They are dealt out before
anything is solved, by the components' numbers of variables; what is left over is dealt out again.
The clock is a second limit, for the user's sake: where it strikes first, what is left gets the best
grouping so far, or a greedy one, and the outcome says so.

Only searches run side by side. Writing down a program is a hundred thousand short calls from
Python; workers that made them at once would hand Python's lock to each other at every one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from jevt.partition import apart
from jevt.partition.problem import Problem
from jevt.partition.refusals import Oracle
from jevt.partition.solve import Limits, Outcome, solve

#: Deterministic seconds for all components of a program; for one of them at least and at most.
_ALL, _LEAST, _MOST = 7.0, 0.05, 1.2
#: Of them, what is kept for components that have to be solved again, and for bodies of loops.
_LATER = 0.5
#: More workers than this are of no use to the few components that differ.
_WORKERS = 4


@dataclasses.dataclass(frozen=True)
class Component:
    """A component to solve; ``key`` is equal for those that have the same outcome."""

    key: Hashable
    problem: Problem
    oracle: Oracle


class Solver:
    """Memory of what is solved, and what is left of the limits.

    The clock runs from the first component on. What comes before is linear in the program, and on
    a busy machine must not decide how well the components are solved.
    """

    def __init__(self, seconds: float, workers: int | None = None) -> None:
        self._seconds = seconds
        self._workers = workers or min(_WORKERS, available())
        self._deadline: float | None = None
        self._python = threading.Lock()
        self._work = _ALL
        self._solved: dict[Hashable, Outcome] = {}

    def solve(self, components: Sequence[Component]) -> list[Outcome]:
        """The outcome of each component, in their order."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
        fresh = {c.key: c for c in components if c.key not in self._solved}
        self._round(list(fresh.values()), max(_LATER, self._work))
        # What the others have left over may be enough for those that it was not enough for.
        stopped = [c for c in fresh.values() if self._solved[c.key].stopped == "work"]
        again = [c for c in stopped if self._solved[c.key].work < _MOST]
        if self._work > sum(self._solved[c.key].work for c in again):
            self._round(again, self._work)
        return [self._solved[c.key] for c in components]

    def _round(self, components: Sequence[Component], work: float) -> None:
        limits = self._limits(components, work)
        if self._workers == 1 or len(components) < 2:
            outcomes = list(map(self._solve, components, limits))
        else:
            with ThreadPoolExecutor(min(self._workers, len(components))) as pool:
                outcomes = list(pool.map(self._solve, components, limits))
        self._solved.update(zip((c.key for c in components), outcomes, strict=True))
        self._work -= sum(outcome.work for outcome in outcomes)

    def _limits(self, components: Sequence[Component], work: float) -> list[Limits]:
        assert self._deadline is not None
        weights = [apart.variables(c.problem) ** 2 for c in components]
        share = work / max(1, sum(weights))
        works = (min(max(_LEAST, share * weight), _MOST) for weight in weights)
        return [Limits(work, self._deadline, self._searching) for work in works]

    def _solve(self, component: Component, limits: Limits) -> Outcome:
        with self._python:
            return solve(component.problem, component.oracle, limits)

    @contextlib.contextmanager
    def _searching(self) -> Iterator[None]:
        """Lets another worker write down its program meanwhile."""
        self._python.release()
        try:
            yield
        finally:
            self._python.acquire()


def available() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
