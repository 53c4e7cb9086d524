"""The suite of whole steps: workloads × variants into ``<device>.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contest import Contest
from benchmarks.entry import Entry
from benchmarks.messages import Ceilings, Job
from benchmarks.plan import Clock, Plan
from benchmarks.process import WorkerError, WorkerProcess
from benchmarks.progress import Progress
from benchmarks.results import ResultFile, Row
from benchmarks.variants import FLOAT32, FLOOR, VARIANTS, Variant
from benchmarks.workbench import Workbench

_COUNT_LIMIT_S = 120.0


class StepSuite:
    """Runs workloads one after the other and writes a row for each variant.

    Args:
      plan: settings.
      bench: workers and header.
      file: of the rows.
      profile_file: of the kernels by time, or None.
    """

    def __init__(
        self, plan: Plan, bench: Workbench, file: ResultFile, profile_file: ResultFile | None
    ) -> None:
        self._plan = plan
        self._bench = bench
        self._file = file
        self._profile_file = profile_file
        self._clock = Clock(plan.total_limit_s)

    def run(self, workloads: Sequence[str], variants: Sequence[str]) -> None:
        """Runs everything; what fails has a row that says why."""
        pool = self._bench.pool
        contests = [(w, self._entries(w, variants)) for w in workloads]
        progress = Progress(sum(len(entries) for _, entries in contests) * Contest.EVENTS)
        counter = self._start_counter() if FLOOR in variants else None
        for i, (workload, entries) in enumerate(contests):
            # The next workload's imports overlap this one's compilation, not its timing.
            for _, soon in contests[i + 1 : i + 2] if i else contests[:2]:
                pool.prestart([e.variant for e in soon])
            self._file.put(*(_row(e) for e in entries if e.variant is not FLOAT32))
            if counter is not None:
                self._put_floor(counter, workload)
            Contest(self._plan, pool, progress, self._save).run(entries)
        if counter is not None:
            counter.close()
        progress.close()

    def _entries(self, workload: str, variants: Sequence[str]) -> list[Entry]:
        chosen = [VARIANTS[v] for v in variants if v != FLOOR]
        chosen = [v for v in chosen if v.only is None or workload in v.only]
        # References come before what is compared with them, and jax before the rest.
        chosen.sort(key=lambda v: v.name != "jax")
        if self._plan.reference and any(v.lane == "xla" for v in chosen):
            chosen.insert(0, FLOAT32)
        return [Entry(v, self._job(workload, v), self._plan, self._clock) for v in chosen]

    def _job(self, workload: str, variant: Variant) -> Job:
        references = self._bench.pool.scratch / "references" / workload
        return Job(
            "workload",
            workload,
            variant.name,
            self._plan.options,
            references=str(references) if self._plan.reference else None,
            measure_warm=self._plan.measure_warm,
        )

    def _save(self, entry: Entry) -> None:
        if entry.variant is FLOAT32:
            return
        self._file.put(_row(entry))
        if self._profile_file is not None and entry.profiled is not None:
            head = {"workload": entry.job.name, "variant": entry.variant.name}
            kernels = [head | dataclasses.asdict(k) for k in entry.profiled.kernels]
            self._profile_file.put(*kernels)

    def _start_counter(self) -> WorkerProcess:
        """A worker that counts FLOPs on the CPU and leaves the device alone."""
        on_cpu = {"JAX_PLATFORMS": "cpu"}
        variant = dataclasses.replace(VARIANTS["jax"], name="counter", environment=on_cpu)
        return self._bench.pool.take(variant)

    def _put_floor(self, counter: WorkerProcess, workload: str) -> None:
        job = Job("workload", workload, FLOOR, self._plan.options)
        ceilings = self._bench.ceilings
        assert ceilings is not None
        try:
            work = counter.ask("work", _COUNT_LIMIT_S, job=job.to_json())
            self._file.put(floor_row(workload, work["flops"], work["bytes"], ceilings))
        except WorkerError as error:
            self._file.put(Row(workload, FLOOR, note=f"failed: {error}"))


def floor_row(workload: str, flops: float, bytes_: float, ceilings: Ceilings) -> Row:
    """The roofline: the longer of the time of the FLOPs and the time of the bytes."""
    flop_ms, byte_ms = flops / ceilings.flops * 1e3, bytes_ / ceilings.bytes * 1e3
    floor = max(flop_ms, byte_ms)
    note = (
        f"{flops / 1e12:.3g} TFLOP at {ceilings.flops / 1e12:.3g} TFLOP/s: {flop_ms:.3g} ms; "
        f"{bytes_ / 1e9:.3g} GB at {ceilings.bytes / 1e9:.4g} GB/s: {byte_ms:.3g} ms"
    )
    return Row(workload, FLOOR, step_ms=floor, step_ms_q1=floor, step_ms_q3=floor, note=note)


def profile_path(results: Path) -> Path:
    """The file of kernels by time that belongs to a result file."""
    return results.with_name(f"{results.stem}-profile.json")


def _row(entry: Entry) -> Row:
    row = Row(entry.job.name, entry.variant.name, note=entry.note)
    if loaded := entry.loaded:
        row = dataclasses.replace(
            row,
            peak_bytes=loaded.peak_bytes,
            cold_start_s=loaded.cold_start_s,
            warm_start_s=loaded.warm_start_s,
            grad_rel_err=loaded.rel_err,
        )
    if times := entry.times_s:
        row = dataclasses.replace(
            row,
            step_ms=times.median * 1e3,
            step_ms_q1=times.q1 * 1e3,
            step_ms_q3=times.q3 * 1e3,
        )
    if profile := entry.profiled:
        row = dataclasses.replace(row, kernel_ms=profile.total_ms, kernels=profile.launches)
    return row
