"""Workers that fail in every way, and what their rows then say."""

import os
from pathlib import Path

import pytest

from benchmarks.contest import Contest
from benchmarks.entry import Entry
from benchmarks.messages import Job
from benchmarks.options import Options
from benchmarks.plan import Clock, Plan
from benchmarks.pool import Pool
from benchmarks.progress import Progress
from benchmarks.variants import Variant

BEHAVIOURS = ("fine", "raises", "dies", "dies-later", "hangs", "no-profile", "large")


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contest")
    environment = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.getcwd()]),
        "FAKE_MARK": str(folder / "mark"),
    }
    plan = Plan(steps=10, blocks=3, time_limit_s=5.0)
    clock = Clock(plan.total_limit_s)
    pool = Pool(folder / "scratch", share=False)
    started = [
        Entry(
            Variant(name, "xla", "fake_runner:FakeRunner", environment=environment),
            Job("workload", "fake", name, Options(size="smoke")),
            plan,
            clock,
        )
        for name in BEHAVIOURS
    ]
    saved = {}
    progress = Progress(len(started) * Contest.EVENTS)
    Contest(plan, pool, progress, lambda e: saved.update({e.variant.name: e})).run(started)
    pool.close()
    return saved


def test_fine(entries):
    entry = entries["fine"]
    assert entry.note == ""
    assert entry.times_s.median == pytest.approx(0.002)
    assert len(entry.samples_s) == 3
    assert (entry.profiled.total_ms, entry.profiled.launches) == (1.5, 2)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("raises", "ValueError: the load failed"),
        ("dies", "worker exited with 7: text on standard output"),
        ("dies-later", "block: worker exited with 7"),
        ("hangs", "time limit of 5 s passed"),
    ],
)
def test_failure_is_told_and_stops_nothing(entries, behaviour, reason):
    entry = entries[behaviour]
    assert entry.failed
    assert reason in entry.note
    assert entry.times_s is None


def test_failing_profiler_costs_only_the_profile(entries):
    entry = entries["no-profile"]
    assert not entry.failed
    assert entry.times_s is not None
    assert entry.profiled is None
    assert "no profiler here" in entry.note


def test_what_does_not_fit_is_timed_apart(entries):
    entry = entries["large"]
    assert entry.times_s is not None
    assert entry.note == "timed apart: too large beside the others"


def test_nothing_starts_after_the_total_limit(tmp_path):
    plan = Plan(total_limit_s=0.0)
    job = Job("workload", "fake", "fine", Options(size="smoke"))
    entry = Entry(Variant("fine", "xla", "fake_runner:FakeRunner"), job, plan, Clock(0.0))
    entry.load(Pool(tmp_path, share=False))
    assert entry.failed
    assert "time for the whole run was up" in entry.note
