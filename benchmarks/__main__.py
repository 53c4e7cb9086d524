"""``python -m benchmarks``: whole steps (the default), ``kernels``, ``passes``, ``partition``,
``report``, ``merge``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import cli


def main(arguments: list[str]) -> int:
    """Runs the subcommand; the suite of whole steps if none is named."""
    commands = {
        "run": cli.run_steps,
        "kernels": cli.run_kernels,
        "passes": _run_passes,
        "partition": _run_partition,
        "report": cli.run_report,
        "merge": cli.run_merge,
    }
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return cli.run_steps(arguments)


def _run_passes(arguments: Sequence[str]) -> int:
    from benchmarks import passes  # it imports JAX, which the other commands leave to their workers

    return passes.run(arguments)


def _run_partition(arguments: Sequence[str]) -> int:
    from benchmarks import partition

    return partition.run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
