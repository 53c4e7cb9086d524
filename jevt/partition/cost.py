"""Predicted microseconds: a roofline per device, for a kernel of ours and for XLA's way with the
same equations.

The numbers of :data:`DEVICES` are data-sheet peaks times a derating, and serve until measured ones
replace
them: memory bandwidth × 0.88 (what a large copy reaches; 0.85 where HBM is faster than a copy can
follow), dense bfloat16 rate × 0.7 (what a large matrix product sustains under a power limit).
Launch costs are of a small kernel inside a captured graph, measured on an H100 (2 µs for an XLA
fusion, 3 µs for a Triton call) and taken over for the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt._context import Device
from jevt.partition import graph as graphs


def _gpu(
    name: str,
    capability: int,
    gigabytes: float,
    teraflops: float,
    l2_mib: int,
    derate: float = 0.88,
) -> Device:
    return Device(
        name, capability, gigabytes * 1e3 * derate, teraflops * 1e6 * 0.7, 2.0, 3.0, l2_mib << 20
    )


#: By the words that a device's own name contains, most specific first.
DEVICES: dict[str, Device] = {
    # NVIDIA A100 datasheet (80GB SXM): 2,039 GB/s, 312 TFLOPS bfloat16, 40 MB L2.
    "A100": _gpu("A100", 80, 2039, 312, 40),
    # NVIDIA H200 datasheet: 4.8 TB/s, 989 TFLOPS dense bfloat16; 50 MB L2 as in GH100.
    "H200": _gpu("H200", 90, 4800, 989, 50),
    # NVIDIA H100 datasheet (SXM): 3.35 TB/s, 989 TFLOPS dense bfloat16, 50 MB L2.
    "H100": _gpu("H100", 90, 3350, 989, 50),
    # NVIDIA DGX B200 datasheet, per GPU: 8 TB/s, 2.25 PFLOPS dense bfloat16; 126 MB L2.
    "B200": _gpu("B200", 100, 8000, 2250, 126, derate=0.85),
    # NVIDIA Ada whitepaper, RTX 4090: 1,008 GB/s, 165 TFLOPS bfloat16 with float32 sums, 72 MB L2.
    "RTX 4090": _gpu("RTX 4090", 89, 1008, 165, 72),
    # NVIDIA L4 datasheet: 300 GB/s, 121 TFLOPS dense bfloat16 (242 with sparsity); 48 MB L2.
    "L4": _gpu("L4", 89, 300, 121, 48),
}

#: Two channels of DDR5 and a few cores; only its proportions matter, since no kernel of ours runs
#: there.
CPU = Device("cpu", 0, 2.0e4, 5.0e5, 1.0, 1.0, 32 << 20)

#: Scalar operations that a primitive counts for where it is not 1, from the length of its
#: expansion.
_OPERATIONS = {
    "threefry2x32": 100, "erf_inv": 20, "erf": 16, "erfc": 40, "lgamma": 40, "pow": 16, "atan2": 16,
    "tanh": 8, "logistic": 8, "log1p": 8, "expm1": 8, "exp": 4, "log": 4, "sin": 8, "cos": 8,
    "div": 4, "sqrt": 4, "rsqrt": 4, "rem": 8,
}  # fmt: skip

#: The same under XLA, where that is another number. Measured on an H200, beside matrix products, on
#: 96 Mi elements of a gelu: 326 µs under XLA, 142 in a kernel of ours.
_XLA_OPERATIONS = _OPERATIONS | {"erfc": 120}

#: XLA's sums along rows reach this part of the bandwidth: measured on an H200, bias gradients 80
#: and 98 %, BatchNorm's statistics and gradient sums 40 to 81 % (``benchmarks kernels``, suite
#: columnwise).
_XLA_ALONG_ROWS = 0.75

#: Partial results that a reduction along rows leaves at most.
_PROGRAMS = 1056

#: Scalar float32 operations run at about this part of the matrix units' rate (H100: 67 of 989
#: TFLOPS).
_SCALAR_RATE = 1 / 16


def device_model(platform: str) -> Device:
    """The roofline of the first present device of a platform.

    A GPU that is not there (lowering on another machine) or that the table lacks is taken for the
    table's device of the nearest lower compute capability, H100 if that is unknown too.
    """
    if platform not in ("cuda", "gpu", "rocm"):
        return CPU
    try:
        present = jax.devices(platform)[0]
    except RuntimeError:
        return DEVICES["H100"]
    kind = present.device_kind
    capability = _capability(getattr(present, "compute_capability", "9.0"))
    for words, device in DEVICES.items():
        if words in kind.replace("L40", "Ada"):  # an L40 is no L4
            return dataclasses.replace(device, compute_capability=capability)
    known = sorted(DEVICES.values(), key=lambda d: (d.compute_capability, d.bytes_per_us))
    older = [d for d in known if d.compute_capability <= capability]
    nearest = (older or known)[-1 if older else 0]
    # Its own capability: kernels are compiled for it, and refused where it is too old.
    return dataclasses.replace(nearest, name=kind, compute_capability=capability)


def predict_us(jaxpr: Jaxpr, device: Device) -> float:
    """One kernel of ours that runs a group: every operand read once, every result written once."""
    traffic = sum(_fetched(jaxpr, v) for v in jaxpr.invars)
    traffic += sum(
        graphs.nbytes(v.aval) for v in dict.fromkeys(jaxpr.outvars) if isinstance(v, Var)
    )
    return _time(traffic, jaxpr.eqns, device) + device.triton_launch_us


def second_stage_us(reductions: Collection[JaxprEqn], device: Device) -> float:
    """Combining the partial results that a kernel leaves of its reductions along rows."""
    if not reductions:
        return 0.0
    traffic = 0
    for eqn in reductions:
        results = graphs.elements(eqn.outvars[0].aval)
        programs = min(_PROGRAMS, graphs.elements(eqn.invars[0].aval) // max(1, results))
        traffic += 2 * 4 * programs * results
    return traffic / device.bytes_per_us + device.xla_launch_us


def xla_us(jaxpr: Jaxpr, device: Device, reductions: Collection[int]) -> float:
    """XLA's own fusion of the same equations.

    XLA fuses pointwise producers into their consumers, repeating them where there are several, and
    into reductions as their input; a reduction ends a fusion, and what consumes its result reads
    its other operands again. Roots of one depth that share an operand become one fusion with
    several results, but a sum along rows is a kernel of its own, and a slower one. So a pointwise
    group costs the same bytes there, softmax two passes more, and a bias gradient beside the
    gradient that it sums a second pass.

    ``reductions`` are the positions of the equations that reduce.
    """
    kernels = _merged(_fusions(jaxpr, reductions))
    total = 0.0
    for kernel in kernels:
        if all(_relabels(e) for e in kernel.eqns):
            continue
        traffic = sum(graphs.nbytes(v.aval) for v in (*kernel.operands, *kernel.results))
        if kernel.along_rows:
            traffic = round(traffic / _XLA_ALONG_ROWS)
        total += _time(traffic, kernel.eqns, device, _XLA_OPERATIONS) + device.xla_launch_us
    return total


@dataclasses.dataclass
class _Fusion:
    """One kernel of XLA's: how many reductions lie before it, what it reads, runs and writes.

    ``reduced`` is the shape and the axes of its reductions, empty if it has none; ``along_rows``
    says that these do not hold the contiguous axis.
    """

    depth: int
    reduced: tuple[object, ...]
    along_rows: bool
    operands: dict[Var, None]
    eqns: list[JaxprEqn]
    results: dict[Var, None]


def _fusions(jaxpr: Jaxpr, reductions: Collection[int]) -> list[_Fusion]:
    """A fusion for each root: an output of the group or the result of a reduction."""
    maker = {v: p for p, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
    depth: dict[Var, int] = {}
    result: list[_Fusion] = []
    for position, eqn in enumerate(jaxpr.eqns):
        here = max((depth.get(v, 0) for v in eqn.invars if isinstance(v, Var)), default=0)
        for v in eqn.outvars:
            depth[v] = here + (position in reductions)
        roots = [v for v in eqn.outvars if v in outputs or position in reductions]
        if not roots:
            continue
        operands: dict[Var, None] = {}
        inside = {position}
        stack = [position]
        while stack:
            for atom in jaxpr.eqns[stack.pop()].invars:
                if not isinstance(atom, Var):
                    continue
                source = maker.get(atom)
                if source is None or source in reductions:
                    operands[atom] = None
                elif source not in inside:
                    inside.add(source)
                    stack.append(source)
        reduced, along_rows = _reduced(eqn) if position in reductions else ((), False)
        eqns = [jaxpr.eqns[p] for p in sorted(inside)]
        results = dict.fromkeys(roots)
        result.append(_Fusion(here, reduced, along_rows, operands, eqns, results))
    return result


def _reduced(eqn: JaxprEqn) -> tuple[tuple[object, ...], bool]:
    operand: Any = eqn.invars[0].aval
    axes = tuple(eqn.params.get("axes", ()))
    inner = max((a for a, extent in enumerate(operand.shape) if extent > 1), default=-1)
    return (operand.shape, axes), inner not in axes


def _merged(fusions: list[_Fusion]) -> list[_Fusion]:
    """Fusions of one depth that share an operand and reduce alike, joined."""
    result: list[_Fusion] = []
    for fusion in fusions:
        large = {v for v in fusion.operands if graphs.nbytes(v.aval) > 8}
        for other in result:
            alike = other.reduced == fusion.reduced
            if not (other.along_rows or fusion.along_rows):
                alike = alike or not other.reduced or not fusion.reduced
            if other.depth == fusion.depth and alike and not large.isdisjoint(other.operands):
                other.reduced = other.reduced or fusion.reduced
                other.operands |= fusion.operands
                other.results |= fusion.results
                known = {id(e) for e in other.eqns}
                other.eqns += [e for e in fusion.eqns if id(e) not in known]
                break
        else:
            result.append(fusion)
    return result


def _time(
    traffic: int,
    eqns: Collection[JaxprEqn],
    device: Device,
    counts: Mapping[str, int] = _OPERATIONS,
) -> float:
    return max(traffic / device.bytes_per_us, arithmetic_us(eqns, device, counts))


def arithmetic_us(
    eqns: Collection[JaxprEqn], device: Device, counts: Mapping[str, int] = _OPERATIONS
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


def _fetched(jaxpr: Jaxpr, var: Var) -> int:
    """Bytes read of an operand: all of it, unless only slices of it are used."""
    whole = graphs.nbytes(var.aval)
    users = [e for e in jaxpr.eqns if var in e.invars]
    if users and all(graphs.shrinks(e, var) for e in users):
        return min(whole, sum(graphs.nbytes(e.outvars[0].aval) for e in users))
    return whole


def _relabels(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in ("reshape", "squeeze", "broadcast_in_dim") and all(
        graphs.elements(v.aval) == graphs.elements(eqn.outvars[0].aval) for v in eqn.invars
    )


def _capability(text: str) -> int:
    major, _, minor = str(text).partition(".")
    return int(major) * 10 + int(minor or 0)
