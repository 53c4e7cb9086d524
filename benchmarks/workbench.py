"""What every suite needs around its contests: scratch folder, workers, device, ceilings."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks import machine
from benchmarks.messages import Ceilings, Hello
from benchmarks.options import Size
from benchmarks.pool import Pool
from benchmarks.process import WorkerError
from benchmarks.results import Header
from benchmarks.variants import VARIANTS, Variant

RESULTS = Path(__file__).resolve().parent / "results"

# Smoke runs compile on a CPU and their times mean nothing: let LLVM be quick.
_SMOKE_XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# Starting a framework and measuring the ceilings; generous, since nothing runs beside it.
_START_LIMIT_S = 180.0


@dataclass(frozen=True)
class Workbench:
    """A pool of workers, the header of the result files, and the ceilings if measured."""

    pool: Pool
    header: Header
    ceilings: Ceilings | None


@contextlib.contextmanager
def open_workbench(
    size: Size,
    *,
    share: bool,
    with_ceilings: bool,
    with_torch: bool,
    torch_python: str | None = None,
    torch_path: str | None = None,
    commit: str | None = None,
) -> Iterator[Workbench]:
    """Starts and ends all workers afterwards, whatever happens."""
    scratch = Path(tempfile.mkdtemp(prefix="benchmarks-"))
    flags = _SMOKE_XLA_FLAGS if size == "smoke" else ""
    pool = Pool(
        scratch, share=share, torch_python=torch_python, torch_path=torch_path, xla_flags=flags
    )
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        torch = [VARIANTS["torch"]] if with_torch else []
        pool.prestart(torch)
        hello, ceilings = _ask_device(pool, size, with_ceilings=with_ceilings)
        versions = dict(hello.versions)
        apart = torch_python is not None or torch_path is not None
        for variant in torch:
            versions |= _torch_versions(pool, variant, elsewhere=apart)
        header = Header(hello.device, versions, commit or machine.commit(), machine.now())
        yield Workbench(pool, header, ceilings)
    finally:
        pool.close()
        shutil.rmtree(scratch, ignore_errors=True)


def result_path(given: str | None, device: str, suffix: str = "") -> Path:
    """The file to write: as given, or ``<device>.json`` in the given or the default folder."""
    name = f"{machine.device_slug(device)}{suffix}.json"
    if given is None:
        return RESULTS / name
    path = Path(given)
    return path / name if path.is_dir() or given.endswith(os.sep) else path


def _ask_device(pool: Pool, size: Size, *, with_ceilings: bool) -> tuple[Hello, Ceilings | None]:
    """Asks in a worker of its own, so that this process and the timed ones hold no memory."""
    worker = pool.take(dataclasses.replace(VARIANTS["jax"], name="device"))
    hello = Hello(**worker.ask("hello", _START_LIMIT_S))
    ceilings = None
    if with_ceilings:
        ceilings = Ceilings(**worker.ask("ceilings", _START_LIMIT_S, size=size))
    worker.close()
    return hello, ceilings


def _torch_versions(pool: Pool, variant: Variant, *, elsewhere: bool) -> dict[str, str]:
    """Versions seen by the PyTorch workers; none if PyTorch is missing (each row will say so)."""
    worker = pool.take(variant)
    try:
        versions = worker.ask("hello", _START_LIMIT_S)["versions"]
    except WorkerError:
        return {}
    finally:
        pool.give_back(worker)
    return {f"torch-env {k}": v for k, v in versions.items()} if elsewhere else versions


def _exit_on_signal(signum: int, frame: object) -> NoReturn:
    del frame
    raise SystemExit(128 + signum)
