"""The result files of a folder, by device and kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["steps", "kernels", "profile", "partition"]
JsonRow = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """One result file.

    Attributes:
      slug: the device's short name, as in the file's name.
      kind: which suite wrote it.
      header: its fields beside the rows.
      rows: its rows.
    """

    slug: str
    kind: Kind
    header: JsonRow
    rows: list[JsonRow]

    def step_ms(self, workload: str, variant: str) -> float | None:
        """The median step of a variant, or None if it was not measured."""
        for row in self.rows:
            if (row["workload"], row["variant"]) == (workload, variant):
                return row["step_ms"]
        return None

    def speedup(self, workload: str, over: str, variant: str = "jevt") -> float | None:
        """How many times faster a variant is than another; None unless both were measured."""
        own, other = self.step_ms(workload, variant), self.step_ms(workload, over)
        return other / own if own and other else None


def read_results(folder: Path) -> list[Results]:
    """All result files of a folder, by file name.

    Raises:
      FileNotFoundError: if there is none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: expected result files, got none; run `python -m benchmarks` first"
        )
    return [_read(path) for path in paths]


def select(results: Sequence[Results], kind: Kind) -> list[Results]:
    """Those of a kind that have rows."""
    return [r for r in results if r.kind == kind and r.rows]


def _read(path: Path) -> Results:
    content = json.loads(path.read_text())
    rows = content.pop("rows")
    kind: Kind = "steps"
    slug = path.stem
    for suffix in ("kernels", "profile"):
        if slug.endswith(f"-{suffix}"):
            kind, slug = suffix, slug.removesuffix(f"-{suffix}")
    if slug == "partition":  # of no device
        kind = "partition"
    return Results(slug, kind, content, rows)
