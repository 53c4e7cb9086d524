"""The fastest configuration of a kernel, beside the time of what XLA would run instead.

    search space ─▶ compiled side by side, each run once ─▶ timed in turns ─▶ fastest that is right

The winner's results are compared with XLA's before anybody hears of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jevt_kernels import launch
from jevt_kernels.spec import Config, KernelSpec
from jevt_kernels.tuning import operands, space
from jevt_kernels.tuning.bench import Bench, Program, Work
from jevt_kernels.tuning.contest import LIMITS, Limits, Trial, contest, first_line
from jevt_kernels.tuning.record import Record, now

#: Part of the elements of random operands' results that must be finite to say something.
_FINITE = 0.5


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
      record: for the store; None if nothing was learned.
      trials: all candidates, the fastest first.
      reason: why there is no record.
    """

    record: Record | None
    trials: tuple[Trial, ...] = ()
    reason: str = ""


def measure(
    spec: KernelSpec,
    alternative: Callable[..., Sequence[Any]],
    bench: Bench,
    *,
    capability: int,
    expected_us: float = 0.0,
    limits: Limits = LIMITS,
) -> Result:
    """Tries a kernel's configurations and XLA.

    Args:
      spec: the kernel. Outputs that share a buffer with an input get one of their own.
      alternative: the same function of the same operands for XLA, which is the reference, too.
      bench: where.
      capability: compute capability of the device, 90 for sm_90.
      expected_us: about how long the kernel takes, which decides how often a program calls it.
      limits: of the search.
    """
    if not operands.drawable(spec):
        return Result(None, reason="operands name rows, so they cannot be drawn at random")
    spec = dataclasses.replace(spec, aliases=())
    try:
        work, reference = _reference(spec, alternative, bench, expected_us)
    except Exception as error:  # noqa: BLE001 - the device may be full, or XLA unable
        return Result(None, reason=f"XLA's own run failed: {first_line(error)}")
    chosen = space.search_space(spec, capability, limits.configs).chosen
    functions: dict[Config | None, Callable[..., Sequence[Any]]] = {
        config: functools.partial(launch.call, spec, config=config, compute_capability=capability)
        for config in chosen
    }
    ran = contest(functions, bench, work, limits, given={None: reference})
    right: Trial | None = None
    wrong = ""
    trials: list[Trial] = []
    for trial, program in ran:
        if right is None and trial.config is not None and trial.us is not None:
            assert program is not None
            try:
                complaint = _disagreement(spec, program, reference)
            except Exception as error:  # noqa: BLE001 - of the driver, for want of memory
                complaint = f"could not be compared: {first_line(error)}"
            else:
                wrong = wrong or complaint
            if complaint:
                trial = dataclasses.replace(trial, us=None, error=complaint)
            else:
                right = trial
        trials.append(trial)
    trials.sort(key=lambda trial: trial.rank)
    xla_us = next(trial.us for trial in trials if trial.config is None)
    about = f"{spec.mainloop} {'x'.join(map(str, spec.space.sizes))}"[:80]
    if right is not None:
        record = Record(right.config, right.us, xla_us, "", about, now())
    elif wrong:
        record = Record(None, None, xla_us, wrong, about, now())
    else:  # a lack of memory or of a compiler says nothing of the kernel
        reasons = "; ".join(str(t) for t in trials if t.config is not None)
        return Result(None, tuple(trials), reasons or "no configuration can run on this device")
    return Result(record, tuple(trials))


def _reference(
    spec: KernelSpec, alternative: Callable[..., Sequence[Any]], bench: Bench, expected_us: float
) -> tuple[Work, Program]:
    """Operands whose results say something, and XLA's program for them."""
    for positive in (False, True):
        work = bench.work(spec.inputs, spec.outputs, expected_us, positive)
        program = bench.prepare(alternative, work)
        # Logarithms and roots of normal numbers may give nothing but NaNs, which agree with any.
        if float(operands.finite_part(program()[0])) >= _FINITE:
            break
    return work, program


def _disagreement(spec: KernelSpec, program: Program, reference: Program) -> str:
    """How results differ from the reference's by more than rounding, "" if they do not."""
    results = [
        [float(d) for d in operands.difference(got, want)]
        for got, want in zip(program(), reference(), strict=True)
    ]
    limits = operands.tolerances(spec)
    for output, limit in enumerate(limits):
        worst = max(differences[output] for differences in results)
        if not worst <= limit:
            return f"wrong: output {output} differs from XLA's by {worst:.1e}, at most {limit:.0e}"
    return ""
