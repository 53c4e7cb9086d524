"""``python -m jevt_kernels.tuning``: what the store holds, and the device's calibration."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import jax

from jevt_kernels.tuning.bench import Bench, DeviceBench
from jevt_kernels.tuning.calibrate import calibrate
from jevt_kernels.tuning.identity import Identity, local
from jevt_kernels.tuning.record import Record
from jevt_kernels.tuning.space import describe
from jevt_kernels.tuning.store import Store, default_folder, opened

#: L2 cache of the largest GPUs; a smaller one is exceeded all the more.
_L2_BYTES = 128 << 20


def main(arguments: Sequence[str], identity: Identity | None, bench: Bench | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
      arguments: of the command line.
      identity: of the device, None if there is none.
      bench: on it; made when needed by default.
    """
    parser = argparse.ArgumentParser(prog="python -m jevt_kernels.tuning", description=__doc__)
    parser.add_argument(
        "command",
        choices=("calibrate", "show"),
        help="calibrate: measure copies, matrix products and launches, and keep the result; "
        "show: list what is known of this device",
    )
    command = parser.parse_args(arguments).command
    if identity is None:
        sys.stderr.write("JAX sees no CUDA GPU, for which alone there are measured times.\n")
        return 1
    store = opened(default_folder(), identity)
    if command == "calibrate":
        device = None if bench else jax.local_devices(backend="cuda")[0]
        measured = calibrate(bench or DeviceBench(_L2_BYTES, device), identity.capability)
        store.add({}, measured)
    _show(store)
    return 0


def _show(store: Store) -> None:
    known = store.load()
    lines = [f"{store.identity.device}, {store.path or 'no folder'}"]
    if known.calibration is not None:
        for name, value in dataclasses.asdict(known.calibration).items():
            lines.append(f"  {name} {value if isinstance(value, str) else format(value, '.4g')}")
    lines += [_line(key, record) for key, record in sorted(known.kernels.items())]
    sys.stdout.write("\n".join(lines) + "\n")


def _line(key: str, record: Record) -> str:
    ours = f"{record.kernel_us:.1f} µs" if record.kernel_us else record.error
    config = f" ({describe(record.config)})" if record.config else ""
    xla = f"{record.xla_us:.1f} µs" if record.xla_us else "unknown"
    return f"  {key[:8]} {record.about}: {ours}{config}, XLA {xla}, {record.when}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], local()))
