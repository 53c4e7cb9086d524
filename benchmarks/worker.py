"""The worker process: one framework, one job at a time, told what to do over a pipe.

Requests come as JSON lines on standard input; replies go to the descriptor given, so that what
libraries print cannot garble them. ``process.py`` is the other end.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import sys
import traceback
from typing import Any

from benchmarks.machine import framework_versions
from benchmarks.messages import Block, Hello, Job, WorkCount
from benchmarks.runners.base import Runner, runner_class


class Worker:
    """Serves requests with one runner class."""

    def __init__(self, runner: str) -> None:
        self.path = runner
        self.cls = runner_class(runner)
        self.runner: Runner | None = None

    def serve(self, request: dict[str, Any]) -> Any:
        """The reply's dataclass for a request."""
        verb = request["verb"]
        if verb == "hello":
            return self._hello()
        if verb == "ceilings":
            return importlib.import_module("benchmarks.ceilings").measure(request["size"])
        if verb == "work":
            return _count(Job.from_json(request["job"]))
        if verb == "load":
            self.runner = None
            gc.collect()
            self.runner = self.cls(Job.from_json(request["job"]))
            return self.runner.load()
        if self.runner is None:
            raise RuntimeError(f"{verb}: expected a loaded job, got none")
        if verb == "block":
            return Block(self.runner.block(request["steps"]))
        if verb == "profile":
            return self.runner.profile(request["steps"])
        raise ValueError(f"verb: expected one of messages.Verb, got {verb!r}")

    def _hello(self) -> Hello:
        module = importlib.import_module(self.path.partition(":")[0])
        return Hello(module.device_name(), framework_versions())


def _count(job: Job) -> WorkCount:
    work = importlib.import_module("benchmarks.registry").make(job.name, job.options).work()
    return WorkCount(work.flops, work.bytes)


def _try_start(runner: str) -> tuple[Worker | None, str]:
    """A worker, or None and why not (PyTorch is missing, say)."""
    try:
        return Worker(runner), ""
    except ImportError as error:
        return None, _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Serves until told to quit or until the main process is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reply-fd", type=int, required=True)
    parser.add_argument("--runner", required=True)
    args = parser.parse_args()
    with os.fdopen(args.reply_fd, "w") as replies:
        # Import at once, so that a worker started ahead of its turn is ready when asked.
        worker, broken = _try_start(args.runner)
        for line in sys.stdin:
            request = json.loads(line)
            if request["verb"] == "quit":
                return
            if worker is None:
                print(json.dumps({"error": broken}), file=replies, flush=True)
                continue
            try:
                reply = dataclasses.asdict(worker.serve(request))
            # The border of the process: whatever failed becomes the note of a row.
            except Exception as error:  # noqa: BLE001
                traceback.print_exc()
                reply = {"error": _one_line(error)}
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
