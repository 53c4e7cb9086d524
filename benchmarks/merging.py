"""Joining the result files of two runs: what the later one did not reach is kept from the earlier.

A full run of everything can be longer than a machine is at hand. Rows that are kept say in their
note at which commit they were measured.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.results import Header, ResultFile


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What the rows of a file are of.

    Attributes:
      measurement: the fields that one measurement's rows have in common.
      key: the fields that identify a row.
      result: the field that is None where nothing was measured.
    """

    measurement: tuple[str, ...]
    key: tuple[str, ...]
    result: str


_STEPS, _CASES = ("workload", "variant"), ("suite", "case", "variant")
_KINDS = (
    _Kind(_STEPS, _STEPS, "step_ms"),
    _Kind(_CASES, _CASES, "us"),
    _Kind(_STEPS, (*_STEPS, "name"), "ms"),
)


def merge(earlier: Path, later: Path, commit: str | None = None) -> list[dict[str, Any]]:
    """Writes the rows of a later run into the file of an earlier one.

    Args:
      earlier: the file that is rewritten, under the later run's header.
      later: the file of the other run.
      commit: of the later run, where it could not know it.

    Returns:
      All rows.

    Raises:
      ValueError: if the runs were on different devices or with other versions, or if the files hold
        different kinds of rows.
    """
    old, new = (json.loads(path.read_text()) for path in (earlier, later))
    for name in ("device", "versions"):
        if old[name] != new[name]:
            raise ValueError(f"expected equal {name}, got {old[name]} and {new[name]}")
    kind = _kind([*old["rows"], *new["rows"]])
    header = Header(new["device"], new["versions"], commit or new["commit"], new["date"])
    measured = {_of(row, kind.measurement) for row in new["rows"] if row[kind.result] is not None}
    kept = [
        _of_commit(row, old["commit"])
        for row in old["rows"]
        if row[kind.result] is not None and _of(row, kind.measurement) not in measured
    ]
    instead = {_of(row, kind.measurement) for row in kept}
    replaced = [row for row in new["rows"] if _of(row, kind.measurement) not in instead]
    order = {_of(row, kind.key): at for at, row in enumerate([*old["rows"], *new["rows"]])}
    file = ResultFile(earlier, header, kind.key, merge=False)
    file.put(*sorted((*kept, *replaced), key=lambda row: order[_of(row, kind.key)]))
    return file.rows


def _kind(rows: list[dict[str, Any]]) -> _Kind:
    for kind in _KINDS:
        if all({*kind.key, kind.result} <= row.keys() for row in rows):
            return kind
    raise ValueError("expected two files of steps, of kernels or of profiles")


def _of(row: dict[str, Any], key: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(row[name] for name in key)


def _of_commit(row: dict[str, Any], commit: str) -> dict[str, Any]:
    return {**row, "note": _joined(row["note"], f"at commit {commit}")} if "note" in row else row


def _joined(note: str, more: str) -> str:
    if "at commit " in note:  # of an earlier merge
        return note
    return f"{note}; {more}" if note else more
