"""A progress bar on standard error: a bar on a terminal, one line an event elsewhere."""

from __future__ import annotations

import sys
import threading
import time

_WIDTH = 24


class Progress:
    """Counts events out of a known total; safe to use from several threads."""

    def __init__(self, total: int) -> None:
        self._total = max(total, 1)
        self._done = 0
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()

    def tell(self, text: str, events: int = 0) -> None:
        """Shows what is going on, after counting ``events`` more as done."""
        with self._lock:
            self._done = min(self._done + events, self._total)
            filled = _WIDTH * self._done // self._total
            bar = "█" * filled + "·" * (_WIDTH - filled)
            seconds = time.monotonic() - self._start
            line = f"{bar} {self._done}/{self._total} {seconds:5.0f} s  {text}"
            end = "\r" if self._terminal else "\n"
            print(f"{line:<100.160}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar's line."""
        if self._terminal:
            print(file=sys.stderr)
