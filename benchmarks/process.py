"""Worker processes, seen from the main process: start, ask with a time limit, end."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.messages import Verb


class WorkerError(Exception):
    """A request failed; the message is fit for the note of a row."""


class WorkerGone(WorkerError):
    """The worker died or was ended for its time limit; it answers no more."""


class WorkerProcess:
    """One worker in a process group of its own, so that ending it ends what it started.

    Args:
      runner: ``module:Class`` of its runner.
      environment: all of its environment.
      log: file for what it prints.
      python: the interpreter.
    """

    def __init__(
        self, runner: str, environment: Mapping[str, str], log: Path, python: str | None = None
    ) -> None:
        read, write = os.pipe()
        command = [python or sys.executable, "-m", "benchmarks.worker"]
        command += ["--reply-fd", str(write), "--runner", runner]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                env=dict(environment),
                cwd=ROOT,
                start_new_session=True,
            )
        os.close(write)
        self._replies = read
        self._buffer = b""
        self._ended = False
        self.log = log

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self._ended and self._process.poll() is None

    def ask(self, verb: Verb, timeout: float, **fields: Any) -> dict[str, Any]:
        """The reply to a request.

        Args:
          verb: see ``messages``.
          timeout: seconds; the worker is ended when they pass.
          fields: the rest of the request.

        Raises:
          WorkerError: if the worker says that the request failed.
          WorkerGone: if it dies or runs out of time.
        """
        if self._ended:
            raise WorkerGone(f"{verb}: the worker was ended before")
        line = json.dumps({"verb": verb, **fields}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerGone(self._obituary(verb)) from None
        reply = json.loads(self._read_line(verb, timeout))
        if "error" in reply:
            raise WorkerError(_shorten(reply["error"]))
        return reply

    def close(self, patience: float = 10.0) -> None:
        """Asks it to quit and waits; ends it if it does not."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(b'{"verb": "quit"}\n')
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.kill()

    def kill(self) -> None:
        """Ends it and everything it started; only the first call does anything."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._replies)

    def _read_line(self, verb: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.kill()
                    raise WorkerGone(f"{verb}: time limit of {timeout:.0f} s passed")
                chunk = os.read(self._replies, 1 << 16)
                if not chunk:
                    message = self._obituary(verb)
                    self.kill()
                    raise WorkerGone(message)
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _obituary(self, verb: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        return _shorten(f"{verb}: worker exited with {self._process.returncode}: {last}")


def _shorten(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
