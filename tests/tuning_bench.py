"""A bench without a GPU: kernels compute what XLA does, and times come from a table."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jevt_kernels import launch
from jevt_kernels.spec import Config
from jevt_kernels.tuning import operands
from jevt_kernels.tuning.bench import Work


class Program:
    def __init__(self, config: Config | None, results: list[Any]) -> None:
        self.config = config
        self.results = results

    def __call__(self) -> Sequence[Any]:
        return self.results


class FakeBench:
    """See ``jevt_kernels.tuning.bench.Bench``.

    Args:
      us: microseconds of a configuration, None for XLA; or a function that gives them.
      fails: errors that configurations raise when they are compiled.
      wrong: configurations whose results are wrong.
    """

    def __init__(
        self,
        us: Mapping[Config | None, float] | Callable[[Config | None], float],
        fails: Mapping[Config | None, Exception] | None = None,
        wrong: Sequence[Config] = (),
    ) -> None:
        self.us = us if callable(us) else us.__getitem__
        self.fails = fails or {}
        self.wrong = wrong
        self.prepared: list[Config | None] = []
        self.timed: list[Config | None] = []
        self.threads: set[int] = set()
        self.positive: list[bool] = []
        self.results: list[Any] = []

    def work(self, inputs, outputs, us, positive) -> Work:
        self.positive.append(positive)
        return Work(tuple(operands.draw(inputs, seed, positive=positive) for seed in range(2)))

    def prepare(self, function, work) -> Program:
        kernel = isinstance(function, functools.partial) and function.func is launch.call
        config = function.keywords["config"] if kernel else None
        self.prepared.append(config)
        self.threads.add(threading.get_ident())
        if config in self.fails:
            raise self.fails[config]
        if kernel:  # computes what its alternative does, which comes first
            results = self.results
        else:
            results = self.results = [list(jax.jit(function)(*each)) for each in work.sets]
        if config in self.wrong:
            results = [[-r for r in each] for each in results]
        return Program(config, results)

    def seconds(self, program, work) -> float:
        self.timed.append(program.config)
        return self.us(program.config) * 1e-6
