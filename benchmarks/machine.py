"""Where and with what a run was made: device, versions, commit, date."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-triton",
    "flax",
    "optax",
    "triton",
    "torch",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "numpy",
)


def framework_versions() -> dict[str, str]:
    """The versions of Python, of the packages that are installed, and of the driver."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if driver := _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        versions["driver"] = driver.splitlines()[0]
    return versions


def processor(cores: int) -> str:
    """The processor's model and how many of its cores there are to use."""
    try:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    name = model.group(1).strip() if model else platform.processor() or platform.machine()
    return f"{name}, {cores} core{'s' * (cores > 1)}"


def device_slug(device: str) -> str:
    """The file name for a device: ``NVIDIA H100 80GB HBM3`` gives ``h100``, a CPU ``cpu``."""
    model = re.search(r"\b([A-Z]{1,3}\d{2,4}[A-Z]?)\b", device)
    if model:
        return model.group(1).lower()
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


def commit() -> str:
    """The commit of the working tree, with ``-dirty`` if it is changed; ``unknown`` outside git."""
    git = ("git", "-C", str(ROOT))
    head = _output(*git, "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changes else head


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
