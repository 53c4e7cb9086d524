"""``JEVT_CHECK=1``: each kernel beside its own equations.

The first group that differs is named, and a stand-alone reproduction is written to a file.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr

from jevt_kernels import launch, visitor
from jevt_kernels.ops import is_float
from jevt_kernels.spec import Config, KernelSpec

#: Largest relative norm of the difference, by the size of the result's dtype in bytes.
TOLERANCES = {2: 1e-2, 4: 1e-5, 8: 1e-10}

#: The same of a float32 product in tf32: both sides round the operands, each in its own way.
TF32_TOLERANCE = 2e-3


class KernelMismatch(AssertionError):
    """A kernel and its own equations disagree."""


def compare(
    results: Sequence[Any],
    expected: Sequence[Any],
    inputs: Sequence[Any],
    spec: KernelSpec,
    config: Config | None,
    jaxpr: Jaxpr,
    group: str,
) -> None:
    """Checks, when the program runs, that ``results`` are what XLA computes for the same inputs."""
    jax.debug.callback(
        functools.partial(_compare, spec, config, str(jaxpr), group),
        list(results),
        list(expected),
        list(inputs),
    )


def relative_error(result: np.ndarray, expected: np.ndarray) -> float:
    """Relative norm of the difference; infinite where NaNs, infinities or integers differ."""
    if not is_float(result.dtype):
        return 0.0 if np.array_equal(result, expected) else float("inf")
    got, want = result.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return float("inf")
    norm = float(np.linalg.norm(want[finite]))
    difference = float(np.linalg.norm(got[finite] - want[finite]))
    return difference if norm == 0 else difference / norm


def _compare(
    spec: KernelSpec,
    config: Config | None,
    jaxpr: str,
    group: str,
    results: list[Any],
    expected: list[Any],
    inputs: list[Any],
) -> None:
    for position, (result, want) in enumerate(
        zip(map(np.asarray, results), map(np.asarray, expected), strict=True)
    ):
        error = relative_error(result, want)
        tolerance = _tolerance(spec, result.dtype)
        if not error <= tolerance:
            folder = write_reproduction(spec, [np.asarray(i) for i in inputs], config)
            raise KernelMismatch(
                f"group {group}: output {position} of kernel {spec.name} differs from its own "
                f"equations by {error:.2e} (relative norm), expected at most {tolerance:.0e}.\n"
                f"{jaxpr}\n"
                f"To reproduce: python {folder / 'reproduce.py'}"
            )


def _tolerance(spec: KernelSpec, dtype: np.dtype) -> float:
    if not is_float(dtype):
        return 0.0
    tolerance = TOLERANCES.get(dtype.itemsize, 0.0)
    tf32 = any(isinstance(n, visitor.Contract) and n.precision == "tf32" for n in spec.tree)
    return max(tolerance, TF32_TOLERANCE) if tf32 else tolerance


def write_reproduction(
    spec: KernelSpec, inputs: Sequence[np.ndarray], config: Config | None = None
) -> Path:
    """Writes ``reproduce.py``, the inputs and the Triton source to a new folder, and returns it."""
    parent = os.environ.get("JEVT_DUMP_DIR") or None
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"jevt_{spec.name}_", dir=parent))
    # numpy's file format does not know bfloat16, so arrays travel as bytes; the spec has their
    # types.
    np.savez(folder / "inputs.npz", *[np.frombuffer(i.tobytes(), np.uint8) for i in inputs])
    (folder / "kernel.py.txt").write_text(launch.source_for(spec, config).text)
    (folder / "reproduce.py").write_text(_SCRIPT.format(spec=repr(spec), config=repr(config)))
    return folder


_SCRIPT = '''"""Runs one generated kernel on saved inputs and compares it with its reference."""

import pathlib

import jax.numpy as jnp
import numpy as np
from ml_dtypes import bfloat16
from numpy import dtype

from jevt.lowering.checking import relative_error
from jevt_kernels import launch
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.reference import reference
from jevt_kernels.spec import Config, KernelSpec, Member, TensorType
from jevt_kernels.visitor import Compute, Constant, Contract, Iota, Load, Reduce, Store

nan, inf = float("nan"), float("inf")
spec = {spec}
config = {config}

saved = np.load(pathlib.Path(__file__).parent / "inputs.npz")
inputs = [
    jnp.asarray(np.frombuffer(saved[f"arr_{{i}}"].tobytes(), t.dtype).reshape(t.shape))
    for i, t in enumerate(spec.inputs)
]
results = launch.run(spec, *inputs, config=config)
for position, (got, want) in enumerate(zip(results, reference(spec, *inputs))):
    error = relative_error(np.asarray(got), np.asarray(want))
    print(f"output {{position}}: relative error {{error:.3e}}")
'''
