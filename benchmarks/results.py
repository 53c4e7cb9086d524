"""The result files: rows under a header that says where, when and with what they were measured.

A file is rewritten after every row, by renaming a complete new one over it: a run that is ended
early loses nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Header:
    """The device's name, versions by package, commit, and the date (ISO 8601, UTC)."""

    device: str
    versions: dict[str, str]
    commit: str
    date: str

    def comparable(self, other: dict[str, Any]) -> bool:
        """Whether rows under the other header were measured under the same conditions."""
        mine = (self.device, self.versions, self.commit)
        return mine == (other.get("device"), other.get("versions"), other.get("commit"))


@dataclass(frozen=True)
class Row:
    """One variant of one workload. What was not or could not be measured is None.

    Attributes:
      step_ms, step_ms_q1, step_ms_q3: median and quartiles of the pipelined step time.
      kernel_ms, kernels: device time and number of kernels of one step, from the profiler.
      peak_bytes: peak device memory.
      cold_start_s, warm_start_s: seconds to the first result, with empty and with filled caches.
      grad_rel_err: relative error of the gradients against float32.
      note: a failure's reason and anything else to know.
    """

    workload: str
    variant: str
    step_ms: float | None = None
    step_ms_q1: float | None = None
    step_ms_q3: float | None = None
    kernel_ms: float | None = None
    kernels: int | None = None
    peak_bytes: int | None = None
    cold_start_s: float | None = None
    warm_start_s: float | None = None
    grad_rel_err: float | None = None
    note: str = ""


@dataclass(frozen=True)
class KernelRow:
    """One variant of one kernel case.

    Attributes:
      us: microseconds a call.
      tflops, gbps: achieved rate; the one that bounds the case, the other None.
      fraction_of_ceiling: that rate over the measured ceiling.
      rel_err: relative error against float32.
      tried: configurations of the kernel with their microseconds, launch included, the fastest,
        which ran, first.
    """

    suite: str
    case: str
    variant: str
    us: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    fraction_of_ceiling: float | None = None
    rel_err: float | None = None
    note: str = ""
    tried: str = ""


class ResultFile:
    """The rows of a file, each found again by its key fields.

    Args:
      path: the file.
      header: of this run.
      key: the names of the fields that identify a row.
      merge: keep the rows that the file already has, if they were measured under a comparable
        header.
    """

    def __init__(self, path: Path, header: Header, key: tuple[str, ...], *, merge: bool) -> None:
        self.path = path
        self._header = header
        self._key = key
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._lock = threading.Lock()
        if merge and path.exists():
            old = json.loads(path.read_text())
            if header.comparable(old):
                self._rows = {self._key_of(row): row for row in old["rows"]}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they first came."""
        return list(self._rows.values())

    def put(self, *rows: Row | KernelRow | dict[str, Any]) -> None:
        """Adds or replaces rows and writes the file; safe to call from several threads."""
        with self._lock:
            for row in rows:
                fields = row if isinstance(row, dict) else dataclasses.asdict(row)
                self._rows[self._key_of(fields)] = {k: _rounded(v) for k, v in fields.items()}
            self._write()

    def _key_of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[k] for k in self._key)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {**dataclasses.asdict(self._header), "rows": self.rows}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(partial, self.path)


def _rounded(value: Any) -> Any:
    """Floats to five significant digits: more would be noise."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
