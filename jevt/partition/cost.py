"""Predicted microseconds: a roofline per device, and a kernel of ours that runs a group by it.

(:mod:`.fusions` has XLA's way with the same equations, :mod:`.products` the matrix products.) The
numbers of :data:`DEVICES` are data-sheet peaks times a derating, and serve until measured ones
replace them: memory bandwidth × 0.88 (what a large copy reaches; 0.85 where HBM is faster than a
copy can follow), dense bfloat16 rate × 0.7 (what a large matrix product sustains under a power
limit). Launch costs are of a small kernel inside a captured graph, measured on an H100 (2 µs for an
XLA fusion, 3 µs for a Triton call) and taken over for the others.

Matrix products: cuBLAS reaches 0.69 of the peak on an H100 (five products of ViT and BERT alone,
599 to 756 TFLOPS) and 0.78 on an H200 (a profile of BERT). Ours reach 0.97 of that on sm_90, where
groups of warps share large tiles (13 products of BERT and ViT alone: 0.92 to 1.16, and 1.34 and 1.4
of batches of small ones), and 0.9 elsewhere. Where groups of warps take turns (sm_90), a third of
an epilogue hides behind the products: alone on an H100, those of ViT and BERT with a gelu take 322
and 260 µs, with a gelu's gradient and column sums 357 and 283 µs. Elsewhere nothing is hidden, and
what passes through shared memory comes on top: without turns they take 359, 286, 418 and 334 µs,
about what cuBLAS and a kernel of ours for the rest take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt._context import Device
from jevt.partition import graph as graphs
from jevt_kernels.mainloops import columnwise, rowwise
from jevt_kernels.mainloops import narrow_columns as narrow
from jevt_kernels.spec import KernelSpec
from jevt_kernels.tuning import Calibration


def _gpu(
    name: str,
    capability: int,
    gigabytes: float,
    teraflops: float,
    l2_mib: int,
    processors: int,
    memory: int,
    derate: float = 0.88,
    cublas: float = 0.7,
    exposed: float = 1.25,
    ours: float = 0.9,
) -> Device:
    return Device(
        name,
        capability,
        bytes_per_us=gigabytes * 1e3 * derate,
        flops_per_us=teraflops * 1e6 * 0.7,
        xla_launch_us=2.0,
        triton_launch_us=3.0,
        l2_bytes=l2_mib << 20,
        processors=processors,
        cublas_flops_per_us=teraflops * 1e6 * cublas,
        kernel_flops_per_us=teraflops * 1e6 * cublas * ours,
        exposed_epilogue=exposed,
        memory_bytes=memory * 10**9 * 3 // 4,  # JAX's default
    )


#: By the words that a device's own name contains, most specific first.
DEVICES: dict[str, Device] = {
    # NVIDIA A100 datasheet (80GB SXM): 2,039 GB/s, 312 TFLOPS bfloat16, 40 MB L2.
    "A100": _gpu("A100", 80, 2039, 312, 40, 108, 80),
    # NVIDIA H200 datasheet: 4.8 TB/s, 989 TFLOPS dense bfloat16; 50 MB L2 as in GH100.
    "H200": _gpu("H200", 90, 4800, 989, 50, 132, 141, cublas=0.78, exposed=0.7, ours=0.97),
    # NVIDIA H100 datasheet (SXM): 3.35 TB/s, 989 TFLOPS dense bfloat16, 50 MB L2.
    "H100": _gpu("H100", 90, 3350, 989, 50, 132, 80, cublas=0.69, exposed=0.7, ours=0.97),
    # NVIDIA DGX B200 datasheet, per GPU: 8 TB/s, 2.25 PFLOPS dense bfloat16; 126 MB L2.
    "B200": _gpu("B200", 100, 8000, 2250, 126, 148, 180, derate=0.85),
    # NVIDIA Ada whitepaper, RTX 4090: 1,008 GB/s, 165 TFLOPS bfloat16 with float32 sums, 72 MB L2.
    "RTX 4090": _gpu("RTX 4090", 89, 1008, 165, 72, 128, 24),
    # NVIDIA L4 datasheet: 300 GB/s, 121 TFLOPS dense bfloat16 (242 with sparsity); 48 MB L2.
    "L4": _gpu("L4", 89, 300, 121, 48, 58, 24),
}

#: Two channels of DDR5 and a few cores; only its proportions matter, since no kernel of ours runs
#: there.
CPU = Device("cpu", 0, 2.0e4, 5.0e5, 1.0, 1.0, 32 << 20, 4, 5.0e5, 5.0e5, 1.0, 64 << 30)

#: Scalar operations that a primitive counts for where it is not 1, from the length of its
#: expansion.
OPERATIONS = {
    "threefry2x32": 100, "erf_inv": 20, "erf": 16, "erfc": 20, "lgamma": 40, "pow": 16, "atan2": 16,
    "tanh": 8, "logistic": 8, "log1p": 8, "expm1": 8, "exp": 4, "log": 4, "sin": 8, "cos": 8,
    "div": 4, "sqrt": 4, "rsqrt": 4, "rem": 8,
}  # fmt: skip

#: By how much longer a kernel of ours is taken to run that takes rows of few columns side by side,
#: whose results take a launch more.
_BESIDE = 4 / 3

#: Scalar float32 operations run at about this part of the matrix units' rate (H100: 67 of 989
#: TFLOPS).
_SCALAR_RATE = 1 / 16


def device_model(platform: str, measured: Calibration | None = None) -> Device:
    """The roofline of the first present device of a platform.

    A GPU that is not there (lowering on another machine) or that the table lacks is taken for the
    table's device of the nearest lower compute capability, H100 if that is unknown too.

    Args:
      platform: "cuda", "cpu", …
      measured: what the present GPU was measured to sustain, in place of the table's values.
    """
    if platform not in ("cuda", "gpu", "rocm"):
        return CPU
    try:
        present = jax.devices(platform)[0]
    except RuntimeError:
        return _calibrated(DEVICES["H100"], measured)
    return _calibrated(_from_table(present), measured)


def _calibrated(device: Device, measured: Calibration | None) -> Device:
    if measured is None:
        return device
    rate = measured.cublas_flops_per_us
    return dataclasses.replace(
        device,
        bytes_per_us=measured.bytes_per_us,
        cublas_flops_per_us=rate,
        # Ours keep their proportion to cuBLAS's.
        kernel_flops_per_us=rate * device.kernel_flops_per_us / device.cublas_flops_per_us,
        xla_launch_us=measured.xla_launch_us,
        triton_launch_us=measured.triton_launch_us,
    )


def _from_table(present: jax.Device) -> Device:
    kind = present.device_kind
    capability = _capability(getattr(present, "compute_capability", "9.0"))
    for words, device in DEVICES.items():
        if words in kind.replace("L40", "Ada"):  # an L40 is no L4
            return _limited(dataclasses.replace(device, compute_capability=capability), present)
    known = sorted(DEVICES.values(), key=lambda d: (d.compute_capability, d.bytes_per_us))
    older = [d for d in known if d.compute_capability <= capability]
    nearest = (older or known)[-1 if older else 0]
    # Its own capability: kernels are compiled for it, and refused where it is too old.
    return _limited(dataclasses.replace(nearest, name=kind, compute_capability=capability), present)


def _limited(device: Device, present: jax.Device) -> Device:
    """The device with the memory that JAX's allocator has, where it tells."""
    stats: dict[str, int] = getattr(present, "memory_stats", dict)() or {}
    return dataclasses.replace(device, memory_bytes=stats.get("bytes_limit", device.memory_bytes))


def predict_us(jaxpr: Jaxpr, device: Device) -> float:
    """One kernel of ours that runs a group: every operand read once, every result written once."""
    return roofline_us(traffic(jaxpr), jaxpr.eqns, device) + device.triton_launch_us


def traffic(jaxpr: Jaxpr) -> int:
    """Bytes that one kernel reads and writes for these equations."""
    read = sum(fetched(jaxpr.eqns, v) for v in jaxpr.invars)
    results = dict.fromkeys(v for v in jaxpr.outvars if isinstance(v, Var))
    return read + sum(graphs.nbytes(v.aval) for v in results)


def long_rows_us(spec: KernelSpec, device: Device) -> float:
    """What rows that do not fit on chip cost beside moving everything once.

    Every further pass over them moves something again, and of few rows it is a launch. That the
    parts of few rows have to be combined is true of XLA's kernels, too, and counted for neither.
    """
    if spec.mainloop != "rowwise":
        return 0.0
    moved, launches = rowwise.traffic(spec)
    once = sum(operand.nbytes for operand in (*spec.inputs, *spec.outputs))
    again = max(0, moved - once) / device.bytes_per_us
    return again + (launches - 1) * device.triton_launch_us


def second_stage_us(reductions: Collection[JaxprEqn], device: Device, whole: bool = False) -> float:
    """Combining the partial results that a kernel leaves of its reductions along rows."""
    moved = sum(parts_bytes(eqn, whole) for eqn in reductions)
    return moved / device.bytes_per_us + device.xla_launch_us if moved else 0.0


def parts_bytes(reduction: JaxprEqn, whole: bool = False) -> int:
    """Bytes of the partial results of a reduction along rows, written and read; often 0.

    The programs of a kernel share the columns before they share the rows: of few rows, or of very
    many columns, each program sees all the rows of its columns and leaves nothing to combine.

    Args:
      reduction: the equation.
      whole: the kernel reduces rows, too, so that each program holds whole ones.
    """
    rows, columns, beside = _walked(reduction)
    beside = 1 if whole else beside
    programs = columnwise.parts(rows // beside, columns * beside, whole)
    return 2 * 4 * programs * columns * beside if programs > 1 else 0


def narrow_columns(reductions: Collection[JaxprEqn]) -> float:
    """How many times longer a kernel takes of ours that reduces along rows, for its few columns.

    A load of 16 columns and more is as wide as one of many. On an H100, sums of 3 columns ran at
    21 % of the bandwidth, ours of 64 rows side by side and XLA's at 92 %. Both are taken to run at
    three quarters, as XLA's do of many columns. (A sum of everything has no columns.)
    """
    factors = [1.0]
    for _, columns, beside in map(_walked, reductions):
        if beside > 1:
            factors.append(_BESIDE)
        if columns > 1:
            factors.append(narrow.FULL / (columns * beside))
    return max(factors)


def _walked(reduction: JaxprEqn) -> tuple[int, int, int]:
    """Rows and columns of a reduction along rows, and how many rows its kernel takes as one."""
    operand: Any = reduction.invars[0].aval
    columns = max(1, graphs.elements(reduction.outvars[0].aval))
    rows = graphs.elements(operand) // columns
    axes = reduction.params.get("axes", ())
    innermost = operand.shape[max(axes)] if axes else 1
    return rows, columns, narrow.beside(columns, innermost, rows)


def roofline_us(
    moved: int,
    eqns: Collection[JaxprEqn],
    device: Device,
    counts: Mapping[str, int] = OPERATIONS,
) -> float:
    """The longer of moving so many bytes and the equations' arithmetic."""
    return max(moved / device.bytes_per_us, arithmetic_us(eqns, device, counts))


def arithmetic_us(
    eqns: Collection[JaxprEqn], device: Device, counts: Mapping[str, int] = OPERATIONS
) -> float:
    """The scalar operations of equations, at the rate of a kernel that does nothing else."""
    operations = sum(
        counts.get(e.primitive.name, 1)
        * max((graphs.elements(v.aval) for v in (*e.invars, *e.outvars)), default=0)
        for e in eqns
        if e.primitive.name
        not in ("broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "rev")
    )
    return operations / (device.flops_per_us * _SCALAR_RATE)


def fetched(eqns: Collection[JaxprEqn], var: Var) -> int:
    """Bytes that one kernel reads of an operand: all, unless only slices of it are used."""
    whole = graphs.nbytes(var.aval)
    users = [e for e in eqns if var in e.invars]
    if users and all(graphs.shrinks(e, var) for e in users):
        return min(whole, sum(graphs.nbytes(e.outvars[0].aval) for e in users))
    return whole


def _capability(text: str) -> int:
    major, _, minor = str(text).partition(".")
    return int(major) * 10 + int(minor or 0)
