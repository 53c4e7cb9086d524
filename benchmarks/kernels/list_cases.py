"""Prints the cases of the suites as JSON, for the main process, which imports no framework."""

from __future__ import annotations

import dataclasses
import json
import sys

from benchmarks.kernels.case import cases, suite_names
from benchmarks.kernels.suite import CaseInfo


def main(size: str, *wanted: str) -> None:
    """Prints a list of ``CaseInfo`` of the wanted suites, all if none is named."""
    infos = [
        CaseInfo(suite, case.name, case.flops, case.bytes, tuple(case.peers))
        for suite in wanted or suite_names()
        for case in cases(suite, size)  # type: ignore[arg-type]
    ]
    print(json.dumps([dataclasses.asdict(info) for info in infos]))


if __name__ == "__main__":
    main(*sys.argv[1:])
