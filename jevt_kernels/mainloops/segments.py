"""Sums of segments: each row of the result adds up its own part of a long axis.

A sparse matrix times a dense one in CSR form is the usual case: row r of the result is the sum,
over the positions ("edges") from ``bounds[r]`` to ``bounds[r + 1]``, of a weight times the row of a
table that the position names. The gradient of a lookup is another: no weight, and the table is the
cotangent. What a position contributes is any tree over ``edge`` × ``col``; what follows the sum is
any tree over ``row`` × ``col``.

A program instance computes one row, or a block of its columns, and walks the row's positions in
their order, so results are the same bits from run to run. One program would walk a very long row
long after all others are done. So the positions are cut into blocks of fixed length, another kernel
of this family has added up those that lie within one row, one program each, and a row adds those
sums to the positions before and after them: the order still depends on nothing but the bounds.
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer, power_of_two
from jevt_kernels.mainloops.pointwise import blocks_along
from jevt_kernels.mainloops.reduction import hoist
from jevt_kernels.ops import triton_type
from jevt_kernels.spec import Config, KernelSpec, TensorType, UnsupportedKernel
from jevt_kernels.view import View, dimension

SMALLEST_BLOCK = 1

_AXES = ("row", "col", "edge")
_CONTRIBUTION = View((dimension("edge"), dimension("col")), prefix="e")
_RESULT = View((dimension("row"), dimension("col")))

#: Widest block of columns.
_WIDEST = 1024


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    width = min(_WIDEST, power_of_two(spec.space.extent(spec.space.tile_axis("col"))))
    result = []
    for elements, warps in ((1024, 1), (512, 1), (2048, 2), (2048, 1)):
        # A row has few positions as a rule: beyond 32 most lanes would be idle.
        edges = min(32, max(1, elements // width))
        blocks = (("row", 1), ("col", width), ("edge", edges))
        result.append(Config(blocks, max(warps, width // 512)))
    return tuple(dict.fromkeys(result))


def emit(printer: Printer) -> int:
    """Prints the body; one program instance a row and block of columns."""
    position, node = _find(printer.spec)
    space, config = printer.spec.space, printer.config
    blocks = blocks_along(space, config, "col")
    rows = space.extent(space.tile_axis("row"))
    dtype = triton_type(node.dtype)
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    printer.line("row_pid = pid" if blocks == 1 else f"row_pid = pid // {blocks}")
    with printer.viewing(_RESULT):
        printer.tile_index("row", "row_pid")
        printer.tile_index("col", f"pid % {blocks} * BLOCK_COL" if blocks > 1 else "")
    after = 1 if len(printer.spec.inputs[node.bounds].shape) == 1 else rows
    printer.line(f"first = tl.load(x{node.bounds} + row_pid)")
    printer.line(f"last = tl.load(x{node.bounds} + row_pid + {after})")
    printer.line(f"acc = tl.zeros((BLOCK_EDGE, BLOCK_COL), {dtype})")
    printer.ragged.add(node.over)
    stop = "last" if node.blocks is None else _skip_blocks(printer, node)
    with printer.viewing(_CONTRIBUTION):
        hoist(printer, [node.operand], node.over)
        printer.open(f"for start in range(first, {stop}, BLOCK_EDGE):")
        printer.line(f"edge = start + {printer.lanes('edge')}")
        printer.line(f"edge_ok = edge < {stop}")
        if node.blocks is not None:
            printer.line("edge = tl.where(edge < low, edge, edge + skipped)")
        value = printer.value(node.operand)
        printer.line(f"acc = acc + tl.where(edge_ok, {value}, 0).to({dtype})")
        printer.close()
        if node.blocks is not None:
            _add_blocks(printer, node)
    printer.line(f"v{position} = tl.sum(acc, axis=0, keep_dims=True)")
    with printer.viewing(_RESULT):
        printer.set_value(position, f"v{position}")
        printer.store_all(printer.stores())
    return rows * blocks


def _skip_blocks(printer: Printer, node: visitor.Segment) -> str:
    """Prints which blocks lie within the row; where the positions end when these are skipped."""
    length = node.length
    printer.line(f"low = (first + {length - 1}) // {length} * {length}")
    printer.line(f"high = last // {length} * {length}")
    printer.line("skipped = tl.maximum(high - low, 0)")
    printer.line("stop = last - skipped")
    return "stop"


def _add_blocks(printer: Printer, node: visitor.Segment) -> None:
    """Prints the loop over the sums of the blocks that have been skipped."""
    columns = printer.spec.space.extent(printer.spec.space.tile_axis("col"))
    length = node.length
    printer.open(f"for start in range(low // {length}, high // {length}, BLOCK_EDGE):")
    printer.line(f"block = start + {printer.lanes('edge')}")
    mask = f"block < high // {length}"
    if ok := printer.mask(frozenset({"col"})):
        mask = f"({mask}) & {ok}"
    wide = ".to(tl.int64)" if printer.wide else ""
    address = f"x{node.blocks} + block{wide} * {columns} + {printer.view.variable('col')}"
    printer.line(f"acc = acc + tl.load({address}, mask={mask}, other=0)")
    printer.close()


def _find(spec: KernelSpec) -> tuple[int, visitor.Segment]:
    names = tuple(t.name for t in spec.space.tile)
    if names != _AXES or any(len(spec.space.tile_axis(n).axes) != 1 for n in ("row", "edge")):
        raise UnsupportedKernel(f"expected the tile axes {_AXES}, one axis a row, got {names}")
    if spec.space.extent(spec.space.tile_axis("edge")) < 2:
        raise UnsupportedKernel("expected at least two positions to sum over")
    found = [(i, n) for i, n in enumerate(spec.tree) if isinstance(n, visitor.Segment)]
    if len(found) != 1:
        raise UnsupportedKernel(f"expected one sum of segments, got {len(found)}")
    ((position, node),) = found
    dependencies = visitor.dependencies(spec.tree, spec.space)
    if "row" in dependencies[node.operand]:
        raise UnsupportedKernel("what a position contributes varies along rows")
    rows, columns = (spec.space.extent(spec.space.tile_axis(name)) for name in ("row", "col"))
    if spec.inputs[node.bounds].shape not in ((rows + 1,), (2, rows)):
        raise UnsupportedKernel("expected one bound more than rows, or two a row")
    if node.blocks is not None:
        edges = spec.space.extent(spec.space.tile_axis("edge"))
        want, got = (
            TensorType((edges // node.length, columns), node.dtype),
            spec.inputs[node.blocks],
        )
        if got != want:
            raise UnsupportedKernel(f"expected sums of blocks {want}, got {got}")
    for at, other in enumerate(spec.tree):
        if isinstance(other, visitor.Store) and node.over in dependencies[at]:
            raise UnsupportedKernel("what a position contributes is stored by the same kernel")
    return position, node
