"""Predicted microseconds of a matrix product: as cuBLAS runs it, and in a kernel of ours.

A kernel of ours takes the product's neighbours along. That saves what they would read and write,
and costs what its mainloop is slower than cuBLAS's and what of the neighbours' time is not hidden
behind the mainloop. XLA is assumed to be at its best: cuBLAS at its sustained rate whatever the
shape, and with what its epilogues take (scaling, the bias, relu) for nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence, Set

from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jevt._context import Device
from jevt._jaxpr import aval
from jevt.lowering.products import PRODUCTS, Term, terms
from jevt.partition import cost
from jevt.partition.epilogues import VIEWS
from jevt.partition.graph import elements, nbytes
from jevt.primitives.product_sum import product_sum_p

#: Rates by operand type and precision, for bfloat16's 1: cuBLAS's and ours.
_RATES = {
    ("bfloat16", "ieee"): (1.0, 1.0),
    ("float16", "ieee"): (1.0, 1.0),
    ("int8", "ieee"): (2.0, 2.0),
    ("float32", "tf32"): (1 / 2, 1 / 2),
    ("float32", "tf32x3"): (1 / 2, 1 / 6),  # XLA does not multiply in parts
    ("float32", "ieee"): (1 / 15, 1 / 30),  # no tensor cores
    ("float64", "ieee"): (1 / 15, 1 / 30),
}

#: Rows and columns of tiles that our kernels have.
_TILES = ((128, 256), (128, 128), (128, 64), (64, 128), (64, 64))

#: A processor reads a tile's operands from the L2 cache: of a tile of m × n, the share of time that
#: is not spent on that is 1 / (1 + _READS · (1/m + 1/n)).
_READS = 40.0

#: XLA divides ``k`` of a small result into so many parts, of at least so many elements, that all
#: together have so many results; a part is so many elements long or a multiple of that. (A lower
#: bound: of programs compiled for an H100 with XLA of jaxlib 0.11.2 it was met or twice as many.)
_SPLIT_RESULTS, _SPLIT_LEAST, _SPLIT_STEP = 1 << 21, 64, 8

#: Least elements of ``k`` in a part of ours.
_PART = 512

#: What XLA folds into cuBLAS's call, if nothing else reads what it is applied to.
_FOLDED = frozenset({"add", "add_jaxvals", "mul", "max", "convert_element_type"})


@dataclasses.dataclass(frozen=True)
class Size:
    """A matrix product's extents and the rates of its types.

    Attributes:
      batch, m, n, k: extents; of a sum of products the sum of their ``k``.
      moved: bytes of the operands and the result.
      rates: cuBLAS's and ours, in parts of bfloat16's.
    """

    batch: int
    m: int
    n: int
    k: int
    moved: int
    rates: tuple[float, float]

    @classmethod
    def of(cls, eqn: JaxprEqn) -> Size:
        """The size of a matrix product, or of a sum of them."""
        first, *others = terms(eqn)
        lhs = aval(first.lhs).shape
        return cls(
            math.prod(lhs[left] for left, _ in first.product.batch),
            _free(first, 0),
            _free(first, 1),
            sum(map(_contracted, (first, *others))),
            sum(nbytes(v.aval) for v in (*eqn.invars, *eqn.outvars)),
            _RATES[aval(first.lhs).dtype.name, first.product.precision],
        )

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def is_padded(self) -> bool:
        """Whether XLA pads ``k`` before it divides it: a copy of both operands."""
        most = min(_SPLIT_RESULTS // max(1, self.m * self.n), self.k // _SPLIT_LEAST)
        parts = 1 << max(0, most.bit_length() - 1)
        return self.batch == 1 and parts > 1 and self.k % (_SPLIT_STEP * parts) > 0


def _free(term: Term, side: int) -> int:
    """Rows of the left operand, or columns of the right one."""
    shape = aval((term.lhs, term.rhs)[side]).shape
    taken = {pair[side] for pair in (*term.product.contracted, *term.product.batch)}
    return math.prod(size for axis, size in enumerate(shape) if axis not in taken)


def _contracted(term: Term) -> int:
    return math.prod(aval(term.lhs).shape[left] for left, _ in term.product.contracted)


def position(jaxpr: Jaxpr) -> int | None:
    """Where the matrix product of a group is, None if there is none."""
    found = (p for p, eqn in enumerate(jaxpr.eqns) if eqn.primitive in PRODUCTS)
    return next(found, None)


def cublas_us(eqn: JaxprEqn, device: Device) -> float:
    """The product alone, left to XLA; of a sum, each product with what is added up so far."""
    if eqn.primitive is product_sum_p:
        *added, last = addends(eqn)
        sums = len(added) * nbytes(last.outvars[0].aval) / device.bytes_per_us
        return sums + sum(cublas_us(each, device) for each in (*added, last))
    size = Size.of(eqn)
    rate = device.cublas_flops_per_us * size.rates[0]
    us = max(size.flops / rate, size.moved / device.bytes_per_us) + device.xla_launch_us
    if size.is_padded:
        operands = sum(nbytes(v.aval) for v in eqn.invars)
        us += 2 * operands / device.bytes_per_us + 2 * device.xla_launch_us
    return us


def kernel_us(jaxpr: Jaxpr, device: Device) -> float:
    """One kernel of ours that runs a group around a product."""
    at = position(jaxpr)
    assert at is not None
    size = Size.of(jaxpr.eqns[at])
    moved = cost.traffic(jaxpr)
    others = [eqn for p, eqn in enumerate(jaxpr.eqns) if p != at]
    if is_alone(jaxpr):
        return _alone_us(size, moved, device)
    epilogue = max(0, moved - size.moved) / device.bytes_per_us
    epilogue += cost.arithmetic_us(others, device)
    busy = _mainloop_us(size, device) + device.exposed_epilogue * epilogue
    return max(busy, moved / device.bytes_per_us) + device.triton_launch_us


def addends(eqn: JaxprEqn) -> list[JaxprEqn]:
    """The products of a sum, each as an equation of its own that has the sum's result."""
    params = dict(eqn.params)
    numbers = params.pop("dimension_numbers")
    operands = zip(eqn.invars[::2], eqn.invars[1::2], numbers, strict=True)
    return [
        eqn.replace(
            primitive=lax.dot_general_p,
            invars=[lhs, rhs],
            params={**params, "dimension_numbers": each, "out_sharding": None},
        )
        for lhs, rhs, each in operands
    ]


def is_alone(jaxpr: Jaxpr) -> bool:
    """Whether a group is one product, with views at most."""
    names = [eqn.primitive.name for eqn in jaxpr.eqns if eqn.primitive.name not in VIEWS]
    return names == ["dot_general"]


def is_sum(jaxpr: Jaxpr) -> bool:
    """Whether a group is around a sum of products."""
    at = position(jaxpr)
    return at is not None and jaxpr.eqns[at].primitive is product_sum_p


def is_padded(jaxpr: Jaxpr) -> bool:
    """Whether XLA pads the operands of a group's product."""
    at = position(jaxpr)
    return at is not None and Size.of(jaxpr.eqns[at]).is_padded


def _alone_us(size: Size, moved: int, device: Device) -> float:
    """A kernel of ours that only multiplies, ``k`` in parts where tiles are few."""
    whole = max(_mainloop_us(size, device), moved / device.bytes_per_us)
    tiles = size.batch * math.ceil(size.m / 64) * math.ceil(size.n / 64)
    parts = min(device.processors // tiles, size.k // _PART)
    if parts < 2:
        return whole + device.triton_launch_us
    written = 2 * 4 * parts * size.batch * size.m * size.n
    divided = max(_mainloop_us(size, device) / parts, moved / device.bytes_per_us)
    divided += written / device.bytes_per_us + device.xla_launch_us
    return min(whole, divided) + device.triton_launch_us


def second_stage_us(reductions: Collection[JaxprEqn], device: Device) -> float:
    """Combining the partial results that a kernel leaves of reductions beside a product."""
    if not reductions:
        return 0.0
    return sum(map(parts_bytes, reductions)) / device.bytes_per_us + device.xla_launch_us


def parts_bytes(reduction: JaxprEqn) -> int:
    """Bytes of the partial results of a reduction, one a tile, written and read."""
    operand, result = elements(reduction.invars[0].aval), elements(reduction.outvars[0].aval)
    return 2 * 4 * result * math.ceil(operand / result / 128)


def mainloop_us(eqn: JaxprEqn, device: Device) -> float:
    """What the tiles of a product take in a kernel of ours, without an epilogue."""
    return _mainloop_us(Size.of(eqn), device)


def _mainloop_us(size: Size, device: Device) -> float:
    """The products of all tiles, in rounds of one tile a processor."""
    rate = device.kernel_flops_per_us * size.rates[1] / device.processors

    def time(m: int, n: int) -> float:
        tiles = size.batch * math.ceil(size.m / m) * math.ceil(size.n / n)
        slower = (1 + _READS * (1 / m + 1 / n)) / (1 + _READS * (1 / 128 + 1 / 256))
        return math.ceil(tiles / device.processors) * 2 * m * n * size.k * slower / rate

    return min(time(m, n) for m, n in _TILES)


def folded(jaxpr: Jaxpr, at: int, apart: Set[Var] = frozenset()) -> list[int]:
    """Positions of the equations that XLA's call of cuBLAS takes along, the product's first.

    ``apart`` are results of equations that it leaves out.
    """
    readers: dict[Var, list[int]] = {}
    for p, eqn in enumerate(jaxpr.eqns):
        for v in dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)):
            readers.setdefault(v, []).append(p)
    outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    result = [at]
    while True:
        (var,) = jaxpr.eqns[result[-1]].outvars
        if var in outputs or len(readers.get(var, ())) != 1:
            return result
        (reader,) = readers[var]
        eqn = jaxpr.eqns[reader]
        others = [v for v in eqn.invars if v is not var]
        if eqn.primitive.name not in _FOLDED or not all(_short(v, maker) for v in others):
            return result
        if not apart.isdisjoint(eqn.outvars):
            return result
        result.append(reader)


def _short(atom: Var | Literal, maker: dict[Var, JaxprEqn]) -> bool:
    """Whether an operand is a scalar or a vector, or a broadcast one."""
    while isinstance(atom, Var) and atom in maker and maker[atom].primitive.name in VIEWS:
        atom = maker[atom].invars[0]
    return elements(atom.aval) == max(aval(atom).shape, default=1)


def operands(jaxpr: Jaxpr, at: int) -> Sequence[Var]:
    """What of the group XLA has in memory before it calls cuBLAS for a product."""
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    result: list[Var] = []
    for atom in jaxpr.eqns[at].invars:
        while isinstance(atom, Var) and atom in maker and maker[atom].primitive.name in VIEWS:
            atom = maker[atom].invars[0]
        if isinstance(atom, Var):
            result.append(atom)
    return result
