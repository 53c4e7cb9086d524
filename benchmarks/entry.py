"""One variant taking part in one contest: its worker, its time limit, its row."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.messages import Job, Loaded, Profile, Verb
from benchmarks.plan import Clock, Plan
from benchmarks.pool import Pool
from benchmarks.process import WorkerError, WorkerGone, WorkerProcess
from benchmarks.stats import Quartiles, quartiles
from benchmarks.variants import Variant

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")


class Entry:
    """A variant and what was measured of it. Failures end up in ``note``; nothing is raised."""

    def __init__(self, variant: Variant, job: Job, plan: Plan, clock: Clock) -> None:
        self.variant = variant
        self.job = job
        self.note = job.options.unusual()
        self.failed = False
        self.loaded: Loaded | None = None
        self.profiled: Profile | None = None
        self.samples_s: list[float] = []
        self._plan = plan
        self._clock = clock
        self._spent_s = 0.0
        self._worker: WorkerProcess | None = None

    @property
    def ready(self) -> bool:
        """Whether it is loaded and can be timed."""
        return self.loaded is not None and not self.failed

    @property
    def out_of_memory(self) -> bool:
        """Whether it failed for want of device memory."""
        return self.failed and any(sign in self.note for sign in _OUT_OF_MEMORY)

    @property
    def times_s(self) -> Quartiles | None:
        """Quartiles of the seconds per step, over blocks."""
        return quartiles(self.samples_s) if self.samples_s else None

    def load(self, pool: Pool) -> None:
        """Starts the worker and loads the job."""
        if not self._clock.left_s:
            self._fail("not started: the time for the whole run was up")
            return
        self._worker = pool.take(self.variant)
        reply = self._ask("load", job=self.job.to_json())
        if reply is not None:
            self.loaded = Loaded(**reply)
            self._add_note(self.loaded.note)

    def time_block(self) -> None:
        """Times one block of steps."""
        assert self.loaded is not None
        steps = self._plan.steps_per_block(self.loaded.step_s)
        reply = self._ask("block", steps=steps)
        if reply is not None:
            self.samples_s.append(reply["seconds"] / steps)

    def profile(self) -> None:
        """Profiles a few steps; a failure costs the profile, not the times."""
        reply = self._ask("profile", steps=self._plan.profile_steps, essential=False)
        if reply is not None:
            self.profiled = Profile.from_json(reply)

    def release(self, pool: Pool) -> None:
        """Gives the worker back."""
        if self._worker is not None:
            pool.give_back(self._worker, broken=self.failed)
            self._worker = None

    def retry(self) -> Entry:
        """A fresh entry for the same job, without what this one met."""
        return Entry(self.variant, self.job, self._plan, self._clock)

    def remark(self, text: str) -> None:
        """Adds to the note."""
        self._add_note(text)

    def _ask(self, verb: Verb, *, essential: bool = True, **fields: Any) -> dict[str, Any] | None:
        assert self._worker is not None
        left = min(self._plan.time_limit_s - self._spent_s, self._clock.left_s)
        start = time.monotonic()
        try:
            return self._worker.ask(verb, max(left, 1.0), **fields)
        except WorkerError as error:
            if essential or isinstance(error, WorkerGone):
                self._fail(str(error))
            else:
                self._add_note(str(error))
            return None
        finally:
            self._spent_s += time.monotonic() - start

    def _fail(self, reason: str) -> None:
        self.failed = True
        self._add_note(f"failed: {reason}")

    def _add_note(self, text: str) -> None:
        self.note = "; ".join(part for part in (self.note, text) if part)
