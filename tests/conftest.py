"""Which tests can run in this process, golden files, and the interpreter's mends.

Triton either compiles or interprets, from its import on. So there are two passes (``make test``):
``pytest -m "not interpret"`` and ``TRITON_INTERPRET=1 pytest -m interpret``.
"""

from __future__ import annotations

import atexit
import collections
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
GOLDEN = Path(__file__).parent / "golden"

# Several test processes share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# XLA compiles thousands of programs that run once: most of the time would be LLVM's. GPUs are asked
# for speed in some tests, and get what users get.
if INTERPRETING or not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["XLA_FLAGS"] = (
        f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()
    )
# What was measured on this machine decides no test.
os.environ["JEVT_CACHE_DIR"] = tempfile.mkdtemp(prefix="jevt-tests-")
atexit.register(shutil.rmtree, os.environ["JEVT_CACHE_DIR"], ignore_errors=True)
if INTERPRETING:
    # The interpreter works on host memory, whether or not there is a GPU.
    os.environ["JAX_PLATFORMS"] = "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the files in tests/golden that differ, instead of failing",
    )


def pytest_configure() -> None:
    if INTERPRETING:
        import interpreter_mends

        interpreter_mends.apply()


@functools.cache
def _has_gpu() -> bool:
    from jevt_kernels import compat

    return compat.local_compute_capability() is not None


@functools.cache
def _has_cuda_lowering() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def _obstacle(item: pytest.Item) -> str | None:
    """Why a test cannot run in this process."""
    marks = {mark.name for mark in item.iter_markers()}
    if INTERPRETING and marks & {"aot", "cuda_lowering", "gpu"}:
        return "needs Triton's compiler (TRITON_INTERPRET is set)"
    if not INTERPRETING and "interpret" in marks:
        return "needs TRITON_INTERPRET=1"
    if "gpu" in marks and not _has_gpu():
        return "needs a GPU"
    if "cuda_lowering" in marks and not _has_cuda_lowering():
        return "needs a JAX CUDA plugin package (make installs it)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if obstacle := _obstacle(item):
            item.add_marker(pytest.mark.skip(reason=obstacle))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} tests skipped: {reason}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares ``text`` with ``tests/golden/<name>``."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        text = text.rstrip("\n") + "\n"
        expected = path.read_text() if path.exists() else None
        if text == expected:
            return
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        if expected is None:
            pytest.fail(f"no golden file {path}; create it with pytest --update-golden")
        assert text == expected, f"differs from {path}; accept it with pytest --update-golden"

    return compare
