"""Sums along ``col`` in which one element counts: it is loaded again rather than looked for.

A cross entropy's loss is Σ where(col == label, x, 0). Comparing and adding takes five instructions
for each element, and the registers of a thread's comparisons where the gradient compares again:
log_softmax and ``take_along_axis`` at [16384, 30528] in bfloat16 take 688 instructions rather than
912 (sm_90, Triton 3.6), and spill 0 bytes rather than 88. The element is in the L2 cache.
"""

from __future__ import annotations

import dataclasses
import math

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.index_map import IndexMap
from jevt_kernels.ops import compute_dtype, is_float
from jevt_kernels.spec import KernelSpec
from jevt_kernels.view import Dimension, View, dimension
from jevt_kernels.visitor import Compute, Constant, Iota, Load, Reduce

#: Shorter rows are compared with: a load whose address waits for another takes as long.
SHORTEST = 4096


@dataclasses.dataclass(frozen=True)
class Pick:
    """A sum of one element.

    Attributes:
      position: of the sum.
      column: position of the number of its column, which no column has if it is out of range.
      value: position of what is added up where the column has that number.
    """

    position: int
    column: int
    value: int


def picks(spec: KernelSpec) -> dict[int, Pick]:
    """The sums along ``col`` in which one element counts, by position; none of short rows."""
    if spec.space.extent(spec.space.tile_axis("col")) < SHORTEST:
        return {}
    found = (_pick(spec, position) for position in range(len(spec.tree)))
    return {pick.position: pick for pick in found if pick is not None}


def _pick(spec: KernelSpec, position: int) -> Pick | None:
    node = spec.tree[position]
    if not isinstance(node, Reduce) or (node.op, node.over) != ("sum", "col"):
        return None
    chosen = spec.tree[node.operand]
    while isinstance(chosen, Compute) and chosen.op == "convert" and _is_same(chosen, node):
        chosen = spec.tree[chosen.operands[0]]
    if not isinstance(chosen, Compute) or chosen.op != "select_n" or not _is_same(chosen, node):
        return None
    which, otherwise, value = chosen.operands
    if not _is_zero(spec.tree[otherwise]):
        return None
    column = compared_column(spec, which)
    return None if column is None else Pick(position, column, value)


def _is_same(value: Compute, total: Reduce) -> bool:
    """Whether both are numbers of one type inside a kernel, and no integers."""
    return is_float(value.dtype) and compute_dtype(value.dtype) == compute_dtype(total.dtype)


def _is_zero(node: visitor.Node) -> bool:
    """Whether it is 0.0, not -0.0: a sum of nothing is 0.0."""
    number = node.value if isinstance(node, Constant) else 1
    return number == 0 and math.copysign(1, number) == 1


def compared_column(spec: KernelSpec, position: int) -> int | None:
    """The node with which a comparison compares columns' numbers; None for any other node."""
    node = spec.tree[position]
    if not isinstance(node, Compute) or node.op != "eq":
        return None
    varies = visitor.dependencies(spec.tree, spec.space)
    for one, other in (node.operands, node.operands[::-1]):
        numbers = spec.tree[one]
        if isinstance(numbers, Iota) and numbers.index == _columns(spec):
            return other if "col" not in varies[other] else None
    return None


def _columns(spec: KernelSpec) -> IndexMap:
    """The number of each column."""
    sizes, strides, size = spec.space.sizes, [0] * len(spec.space.sizes), 1
    for axis in reversed(spec.space.tile_axis("col").axes):
        strides[axis] = size if sizes[axis] > 1 else 0
        size *= sizes[axis]
    return IndexMap(tuple(strides))


def print_pick(printer: Printer, pick: Pick) -> None:
    """Prints the value of a sum; what its element needs beside loads along ``col`` is known."""
    tree, variable = printer.spec.tree, f"col{pick.position}"
    column = printer.value(pick.column)
    columns = printer.spec.space.extent(printer.spec.space.tile_axis("col"))
    printer.line(f"{variable} = {column}{'.to(tl.int64)' if printer.wide else ''}")
    printer.line(f"{variable}_ok = ({column} >= 0) & ({column} < {columns})")
    known = {
        position: printer.value(position)
        for position in visitor.ancestors(tree, pick.value, known=(Reduce,))
        if "col" not in printer.dependencies[position] and not printer.is_constant(position)
    }
    view = View((dimension("row"), Dimension("col", variable, "1")), prefix=f"p{pick.position}_")
    outer, printer.ragged = printer.ragged, printer.ragged | {"col"}
    with printer.viewing(view):
        for position, name in known.items():
            printer.set_value(position, name)
        value = printer.value(pick.value)
    printer.ragged = outer
    name, alone = f"v{pick.position}", isinstance(tree[pick.value], Load)
    # What is loaded from beyond a row is 0 already. A sum of zeros and -0.0 is 0.0.
    chosen = value if alone else f"tl.where({variable}_ok, {value}, 0.0)"
    printer.line(f"{name} = {chosen} + 0.0")
    printer.set_value(pick.position, name)
