"""Predicted microseconds of XLA's own way with a group: its fusions, one kernel each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Set
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt._context import Device
from jevt.lowering.products import PRODUCTS
from jevt.partition import cost, products
from jevt.partition import graph as graphs

#: Scalar operations that a primitive counts for under XLA. Measured on an H200, beside matrix
#: products, on 96 Mi elements of a gelu: 326 µs under XLA, 142 in a kernel of ours.
OPERATIONS = cost.OPERATIONS | {"erfc": 120}

#: XLA's sums along rows reach this part of the bandwidth: measured on an H200, bias gradients 80
#: and 98 %, BatchNorm's statistics and gradient sums 40 to 81 % (``benchmarks kernels``, suite
#: columnwise).
_XLA_ALONG_ROWS = 0.75

#: Operands and results of one of XLA's fusions, at most.
_MOST_OPERANDS = 96


def xla_us(
    jaxpr: Jaxpr,
    device: Device,
    reductions: Collection[int],
    apart: Set[Var] = frozenset(),
) -> float:
    """XLA's own fusion of the same equations.

    XLA fuses pointwise producers into their consumers, repeating them where there are several, and
    into reductions as their input; a reduction ends a fusion, and what consumes its result reads
    its other operands again. Roots of one depth that share an operand become one fusion with
    several results, but a sum along rows is a kernel of its own, and a slower one. So a pointwise
    group costs the same bytes there, softmax two passes more, and a bias gradient beside the
    gradient that it sums a second pass. A matrix product is a call of cuBLAS; its operands and its
    result go through memory.

    Args:
      jaxpr: the group.
      device: that runs it.
      reductions: positions of the equations that reduce.
      apart: results of equations that no call takes along, see :mod:`.epilogues`.
    """
    calls = _called(jaxpr, apart)
    total = sum(products.cublas_us(jaxpr.eqns[call[0]], device) for call in calls)
    for kernel in _kernels(jaxpr, reductions, calls):
        traffic = sum(cost.fetched(kernel.eqns, v) for v in kernel.operands)
        traffic += sum(graphs.nbytes(v.aval) for v in kernel.results)
        if kernel.along_rows:
            traffic = round(traffic / _XLA_ALONG_ROWS)
        launches = -(-(len(kernel.operands) + len(kernel.results)) // _MOST_OPERANDS)
        total += cost.roofline_us(traffic, kernel.eqns, device, OPERATIONS)
        total += launches * device.xla_launch_us
    return total


def kernels(jaxpr: Jaxpr, reductions: Collection[int]) -> int:
    """The number of kernels that XLA makes of equations, beside calls of cuBLAS."""
    return len(_kernels(jaxpr, reductions, _called(jaxpr)))


def _called(jaxpr: Jaxpr, apart: Set[Var] = frozenset()) -> list[list[int]]:
    """Positions of the equations that each call of cuBLAS runs, the product's first."""
    return [
        products.folded(jaxpr, p, apart)
        for p, eqn in enumerate(jaxpr.eqns)
        if eqn.primitive in PRODUCTS
    ]


def _kernels(
    jaxpr: Jaxpr, reductions: Collection[int], calls: Collection[list[int]]
) -> list[_Fusion]:
    merged = _merged(_fusions(jaxpr, reductions, calls))
    return [kernel for kernel in merged if not all(relabels(e) for e in kernel.eqns)]


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


def _fusions(
    jaxpr: Jaxpr, reductions: Collection[int], calls: Collection[list[int]]
) -> list[_Fusion]:
    """A fusion for each root: an output of the group, an operand of a call, what a reduction makes.

    ``calls`` are the positions of the equations that each call of cuBLAS runs.
    """
    maker = {v: p for p, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    called = {p for call in calls for p in call}
    ends = called.union(reductions)
    stored = {v for v in jaxpr.outvars if isinstance(v, Var)}
    stored.update(v for call in calls for v in products.operands(jaxpr, call[0]))
    depth: dict[Var, int] = {}
    result: list[_Fusion] = []
    for position, eqn in enumerate(jaxpr.eqns):
        here = max((depth.get(v, 0) for v in eqn.invars if isinstance(v, Var)), default=0)
        for v in eqn.outvars:
            depth[v] = here + (position in ends)
        roots = [v for v in eqn.outvars if v in stored or position in reductions]
        if not roots or position in called:
            continue
        operands: dict[Var, None] = {}
        inside = {position}
        stack = [position]
        while stack:
            for atom in jaxpr.eqns[stack.pop()].invars:
                if not isinstance(atom, Var):
                    continue
                source = maker.get(atom)
                if source is None or source in ends:
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


def relabels(eqn: JaxprEqn) -> bool:
    """Whether an equation only gives the same elements another shape, which costs XLA nothing."""
    return eqn.primitive.name in ("reshape", "squeeze", "broadcast_in_dim") and all(
        graphs.elements(v.aval) == graphs.elements(eqn.outvars[0].aval) for v in eqn.invars
    )
