"""The fastest configuration of a kernel on a case's own operands, within a time limit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jevt_kernels
from jevt_kernels import compat
from jevt_kernels.spec import Config, KernelSpec
from jevt_kernels.tuning import Bench, DeviceBench, Limits, Trial, Work, contest, search_space

# A program calls the kernel so often, on each set of operands in turn, as long as its results, of
# which each thread may hold those of a program, take no more than so many bytes.
_CALLS = 6
_RESULT_BYTES = 4 << 30


def fastest(
    spec: KernelSpec,
    operands: Sequence[tuple[Any, ...]],
    most: int,
    limit_s: float,
    bench: Bench | None = None,
) -> tuple[Config, list[Trial]]:
    """Tries configurations in the order of the mainloop's preference.

    Args:
      spec: the kernel.
      operands: sets of operands, to rotate through.
      most: configurations to try at most.
      limit_s: seconds after which no further one is compiled.
      bench: where; the default device by default.

    Returns:
      The fastest, and all trials, the fastest first.

    Raises:
      RuntimeError: if all failed.
    """
    capability = compat.local_compute_capability() or 90
    size = sum(output.nbytes for output in spec.outputs)
    calls = max(1, min(_CALLS, _RESULT_BYTES // size))
    functions = {
        config: functools.partial(jevt_kernels.call, spec, config=config)
        for config in search_space(spec, capability, most).chosen
    }
    work = Work(tuple(operands[call % len(operands)] for call in range(calls)))
    # The operands are there, so nothing has to exceed the cache.
    ran = contest(functions, bench or DeviceBench(0), work, Limits(most, limit_s))
    trials = [trial for trial, _ in ran]
    best = trials[0].config if trials else None
    if best is None or trials[0].us is None:
        reasons = "; ".join(map(str, trials)) or "nothing was tried"
        raise RuntimeError(f"no configuration of {spec.name} runs: {reasons}")
    return best, trials
