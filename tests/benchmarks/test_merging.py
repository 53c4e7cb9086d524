"""Joining the files of two runs."""

import dataclasses
import json

import pytest

from benchmarks import __main__ as command
from benchmarks.merging import merge
from benchmarks.results import Header, KernelRow, ResultFile, Row

OLD = Header("NVIDIA H100", {"jax": "1"}, "abc", "2026-01-01T00:00:00+00:00")
NEW = dataclasses.replace(OLD, commit="def", date="2026-01-02T00:00:00+00:00")
STEPS, KERNELS = ("workload", "variant"), ("suite", "case", "variant")


def written(path, header, key, *rows):
    ResultFile(path, header, key, merge=False).put(*rows)
    return path


def test_what_the_later_run_did_not_reach_is_kept(tmp_path):
    earlier = written(
        tmp_path / "h100.json",
        OLD,
        STEPS,
        Row("bert", "jax", 2.0),
        Row("gcn", "jax", 3.0, note="slow"),
        Row("vit", "jax", note="failed"),
    )
    later = written(
        tmp_path / "new.json",
        NEW,
        STEPS,
        Row("bert", "jax", 1.5),
        Row("gcn", "jax", note="failed: not started"),
        Row("vit", "jevt", 7.0),
    )
    merge(earlier, later)
    content = json.loads(earlier.read_text())
    assert (content["commit"], content["date"]) == (NEW.commit, NEW.date)
    found = {(r["workload"], r["variant"]): (r["step_ms"], r["note"]) for r in content["rows"]}
    assert found == {
        ("bert", "jax"): (1.5, ""),
        ("gcn", "jax"): (3.0, "slow; at commit abc"),
        ("vit", "jevt"): (7.0, ""),
    }


def test_the_commit_of_a_kept_row_stays_its_own(tmp_path):
    earlier = written(tmp_path / "a.json", OLD, KERNELS, KernelRow("s", "c", "jax", 1.0))
    for commit, case in (("def", "d"), ("ghi", "e")):
        header = dataclasses.replace(NEW, commit="unknown")
        later = written(tmp_path / "b.json", header, KERNELS, KernelRow("s", case, "jax", 2.0))
        assert command.main(["merge", str(earlier), str(later), "--commit", commit]) == 0
    rows = json.loads(earlier.read_text())["rows"]
    notes = {r["case"]: r["note"] for r in rows}
    assert notes == {"c": "at commit abc", "d": "at commit def", "e": ""}


def test_profiles_are_replaced_as_a_whole(tmp_path):
    def kernel(workload, name, ms):
        return {"workload": workload, "variant": "jevt", "name": name, "ms": ms}

    key = (*STEPS, "name")
    earlier = written(
        tmp_path / "a.json", OLD, key, kernel("bert", "x", 1.0), kernel("gcn", "x", 2.0)
    )
    later = written(tmp_path / "b.json", NEW, key, kernel("bert", "y", 3.0))
    assert merge(earlier, later) == [kernel("gcn", "x", 2.0), kernel("bert", "y", 3.0)]


@pytest.mark.parametrize(
    ("header", "row", "key", "message"),
    [
        (dataclasses.replace(NEW, device="NVIDIA A100"), Row("a", "jax"), STEPS, "equal device"),
        (dataclasses.replace(NEW, versions={"jax": "2"}), Row("a", "jax"), STEPS, "equal versions"),
        (NEW, KernelRow("s", "c", "jax"), KERNELS, "two files of steps, of kernels or"),
    ],
)
def test_what_does_not_belong_together(tmp_path, header, row, key, message):
    earlier = written(tmp_path / "a.json", OLD, STEPS, Row("bert", "jax", 2.0))
    before = earlier.read_text()
    with pytest.raises(ValueError, match=message):
        merge(earlier, written(tmp_path / "b.json", header, key, row))
    assert earlier.read_text() == before
