"""One workload, all its variants: load them, time them in turns, profile them.

Variants that are resident together are timed in turns, a block each, so that a drift of the
device's clocks meets all alike. A variant that does not fit in memory beside the others is timed
after them, alone, and its note says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from benchmarks.entry import Entry
from benchmarks.plan import Plan
from benchmarks.pool import Pool
from benchmarks.progress import Progress
from benchmarks.variants import FLOAT32

Save = Callable[[Entry], None]


class Contest:
    """Runs entries of one workload.

    Args:
      plan: settings.
      pool: of workers.
      progress: told of every load and round; ``EVENTS`` per entry in all.
      save: called with an entry whenever there is more to write about it.
    """

    EVENTS = 2

    def __init__(self, plan: Plan, pool: Pool, progress: Progress, save: Save) -> None:
        self._plan = plan
        self._pool = pool
        self._progress = progress
        self._save = save

    def run(self, entries: Sequence[Entry]) -> None:
        """Runs the entries. One of the variant ``float32`` only writes references; it is first."""
        try:
            self._load(entries)
            self._time([e for e in entries if e.ready and e.variant is not FLOAT32])
        finally:
            for entry in entries:
                entry.release(self._pool)
        for entry in [e for e in entries if e.out_of_memory and not self._pool.share]:
            self._run_apart(entry.retry())

    def _run_apart(self, entry: Entry) -> None:
        try:
            self._load_one(entry)
            entry.remark("timed apart: too large beside the others")
            if entry.ready:
                self._time([entry])
        finally:
            entry.release(self._pool)
            self._save(entry)

    def _load(self, entries: Sequence[Entry]) -> None:
        lanes: dict[str, list[Entry]] = {}
        for entry in entries:
            lanes.setdefault("" if self._plan.serial else entry.variant.lane, []).append(entry)
        bugs: list[BaseException] = []

        def load(lane: Sequence[Entry]) -> None:
            try:
                self._load_lane(lane)
            except BaseException as bug:
                bugs.append(bug)
                raise

        threads = [threading.Thread(target=load, args=(x,), daemon=True) for x in lanes.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if bugs:
            raise RuntimeError("a lane of the benchmark itself failed") from bugs[0]

    def _load_lane(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._load_one(entry)
            if entry.variant is FLOAT32 or entry.failed:
                entry.release(self._pool)
            if entry.variant is FLOAT32 and entry.failed:
                for other in entries:
                    other.remark(f"no float32 reference ({entry.note})")

    def _load_one(self, entry: Entry) -> None:
        label = f"{entry.job.name} {entry.variant.name}"
        self._progress.tell(f"{label}: loading")
        entry.load(self._pool)
        if entry.loaded is not None:
            done = f"ready after {entry.loaded.cold_start_s:.1f} s"
        else:
            done = entry.note
        self._progress.tell(f"{label}: {done}", events=1)
        self._save(entry)

    def _time(self, entries: Sequence[Entry]) -> None:
        for turn in range(self._plan.blocks):
            for entry in [e for e in entries if e.ready]:
                if turn == 0 or turn == self._plan.blocks - 1:
                    self._progress.tell(f"{entry.job.name} {entry.variant.name}: timing")
                entry.time_block()
                self._save(entry)
        for entry in [e for e in entries if e.ready]:
            if self._plan.profile_steps:
                entry.profile()
            self._progress.tell(f"{entry.job.name} {entry.variant.name}: timed", events=1)
            self._save(entry)
