"""Runs kernel cases: cases × variants into ``<device>-kernels.json``."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.contest import Contest
from benchmarks.entry import Entry
from benchmarks.machine import ROOT
from benchmarks.messages import Ceilings, Job
from benchmarks.options import Size
from benchmarks.plan import Clock, Plan
from benchmarks.progress import Progress
from benchmarks.results import KernelRow, ResultFile
from benchmarks.variants import VARIANTS, Variant
from benchmarks.workbench import Workbench

# A call whose wall time is so many times its device time is bound by dispatch; its row says so.
_DISPATCH_BOUND = 1.3


@dataclass(frozen=True)
class CaseInfo:
    """What the main process needs to know of a case."""

    suite: str
    name: str
    flops: int
    bytes: int
    peers: tuple[str, ...]


def list_cases(size: Size, suites: Sequence[str]) -> list[CaseInfo]:
    """The cases of the suites, asked in a process that has no device.

    Raises:
      ValueError: if a suite is unknown.
    """
    command = [sys.executable, "-m", "benchmarks.kernels.list_cases", size, *suites]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    if done.returncode != 0:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return [CaseInfo(**{**c, "peers": tuple(c["peers"])}) for c in json.loads(done.stdout)]


def run_cases(
    infos: Sequence[CaseInfo],
    variants: Sequence[str],
    plan: Plan,
    bench: Workbench,
    file: ResultFile,
) -> None:
    """Runs the cases one after the other, the variants of each in turns.

    ``us`` is the device time of a call's kernels from the profiler; where there is no profile, it
    is the pipelined wall time.
    """
    assert bench.ceilings is not None
    ceilings = bench.ceilings
    clock = Clock(plan.total_limit_s)
    contests = [(info, _entries(info, variants, plan, clock)) for info in infos]
    progress = Progress(sum(len(entries) for _, entries in contests) * Contest.EVENTS)
    for info, entries in contests:

        def save(entry: Entry, info: CaseInfo = info) -> None:
            file.put(kernel_row(info, entry, ceilings))

        Contest(plan, bench.pool, progress, save).run(entries)
    progress.close()


def kernel_row(info: CaseInfo, entry: Entry, ceilings: Ceilings) -> KernelRow:
    """The row of what is known of an entry so far."""
    row = KernelRow(info.suite, info.name, entry.variant.name, note=entry.note)
    if entry.loaded is not None:
        row = dataclasses.replace(row, rel_err=entry.loaded.rel_err, tried=entry.loaded.tried)
    if entry.times_s is None:
        return row
    wall_us = entry.times_s.median * 1e6
    device_ms = entry.profiled.total_ms if entry.profiled else None
    us = wall_us if device_ms is None else device_ms * 1e3
    if wall_us > _DISPATCH_BOUND * us:
        note = "; ".join(filter(None, (row.note, f"dispatch-bound: {wall_us:.0f} µs wall")))
        row = dataclasses.replace(row, note=note)
    if info.flops:
        rate, ceiling = info.flops / us * 1e6, ceilings.flops
        row = dataclasses.replace(row, tflops=rate / 1e12)
    else:
        rate, ceiling = info.bytes / us * 1e6, ceilings.bytes
        row = dataclasses.replace(row, gbps=rate / 1e9)
    return dataclasses.replace(row, us=us, fraction_of_ceiling=rate / ceiling)


def _entries(info: CaseInfo, variants: Sequence[str], plan: Plan, clock: Clock) -> list[Entry]:
    chosen = [VARIANTS[name] for name in variants]
    # A peer is another function under jax.jit: the jax variant's runner finds it by its name.
    chosen += [Variant(peer, "xla", VARIANTS["jax"].runner) for peer in info.peers]
    return [Entry(v, _job(info, v, plan), plan, clock) for v in chosen]


def _job(info: CaseInfo, variant: Variant, plan: Plan) -> Job:
    path = f"{info.suite}/{info.name}"
    return Job(
        "case",
        path,
        variant.name,
        plan.options,
        measure_warm=plan.measure_warm,
        configs=plan.configs,
        search_s=plan.search_s,
    )
