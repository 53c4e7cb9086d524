"""Columnwise kernels: reductions along ``row``, beside whatever a rowwise or pointwise kernel does.

The gradients of biases and of normalisation parameters, and BatchNorm's statistics, are sums along
all rows of values that are made from a few large tensors. A program walks many blocks of rows,
stores full tiles on the way, and keeps one accumulator tile for each reduction; what it leaves is a
partial result, and ``jevt_kernels.partials`` combines those of all programs in a fixed order. Where
one program walks all rows of its columns, it stores the result itself.

With reductions along ``col`` too (a layer norm's input gradient beside its parameters' gradients),
the tile holds whole rows; otherwise wide rows are cut into blocks of columns.
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops.pipelining import stages
from jevt_kernels.mainloops.pointwise import blocks_along, power_of_two
from jevt_kernels.mainloops.reduction import (
    before_reductions,
    hoist,
    reductions,
    store_partial,
)
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel

SMALLEST_BLOCK = 1

#: Widest row, padded to a power of two, of a tile that holds whole rows and accumulators.
MAX_WHOLE = 8192

#: Programs that walk the rows: a few for each multiprocessor of any present GPU. The number decides
#: the order of summation, so it does not depend on the device.
ROW_PROGRAMS = 1056

#: The same where tiles hold whole rows: fewer leave fewer partial results, and their loads, issued
#: further ahead, keep memory busy. A layer norm's gradients [16384, 1024] in bfloat16 take 38.4 us
#: on an H100, 40.5 with twice as many, and their second stage half the time.
WHOLE_ROW_PROGRAMS = 528

_PER_WARP = 1024

#: Columns of tiles of which fewer programs walk the rows, so that partial results are half as many.
_FEW_PARTS_COLUMNS = 128


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    rows, columns = (spec.space.extent(spec.space.tile_axis(name)) for name in ("row", "col"))
    whole = any(isinstance(n, visitor.Reduce) and n.over == "col" for n in spec.tree)
    width = power_of_two(columns)
    result: dict[Config, None] = {}
    # A row on chip for each warp, its intermediates beside the accumulators; else short blocks of
    # columns, so that the partial results are few.
    shapes = ((1024, width), (2048, width)) if whole else ((4096, 64), (2048, 256), (4096, 128))
    for elements, widest in shapes:
        across = min(width, widest)
        down = min(max(1, elements // across), power_of_two(rows))
        blocks = (("row", down), ("col", across))
        warps = min(16, max(1, down * across // _PER_WARP))
        ahead = stages(spec, "row", dict(blocks), most=4 if whole else 3)
        programs = WHOLE_ROW_PROGRAMS if whole else 0
        result.setdefault(Config(blocks, warps, ahead, programs))
    if not whole and width > _FEW_PARTS_COLUMNS // 2:
        # BatchNorm's backward sums [128, 56, 56, 256] in bfloat16 in 134 us on an H100, 141 with
        # the first; statistics of few rows take longer.
        across = _FEW_PARTS_COLUMNS
        blocks = (("row", min(4096 // across, power_of_two(rows))), ("col", across))
        ahead = stages(spec, "row", dict(blocks), most=3)
        result.setdefault(Config(blocks, 4, ahead, ROW_PROGRAMS // 2))
    return tuple(result)


def emit(printer: Printer) -> int:
    """Prints the body; a program instance for each part of the rows and each block of columns."""
    space, config = printer.spec.space, printer.config
    along_columns = reductions(printer, "col")
    column_blocks = blocks_along(space, config, "col")
    row_blocks = blocks_along(space, config, "row")
    if along_columns and (column_blocks > 1 or config.block("col") > MAX_WHOLE):
        raise UnsupportedKernel(
            f"rows of {space.extent(space.tile_axis('col'))} elements do not fit on chip "
            "beside sums along rows"
        )
    most = config.programs or ROW_PROGRAMS
    programs = min(row_blocks, max(1, most // column_blocks))
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    part = "pid" if column_blocks == 1 else f"pid // {column_blocks}"
    printer.line(f"part = {part}")
    printer.tile_index("col", f"pid % {column_blocks} * BLOCK_COL" if column_blocks > 1 else "")
    along_rows = reductions(printer, "row")
    for reduction in along_rows:
        _reject_readers(printer, reduction.position)
        reduction.start()
    partial_stores = {s for r in along_rows for s in _stores_of(printer, r.position)}
    stores = [s for s in printer.stores() if s not in partial_stores]
    hoist(printer, before_reductions(printer), "row")

    printer.open_loop("block", "part", row_blocks, str(programs))
    printer.tile_index("row", "block * BLOCK_ROW")
    for reduction in along_columns:
        reduction.finish(reduction.masked())
    for reduction in along_rows:
        reduction.accumulate()
    printer.store_all(stores)
    printer.close()

    for reduction in along_rows:
        mine = _stores_of(printer, reduction.position)
        if programs == 1:  # all rows: nothing is left to combine
            reduction.finish(reduction.accumulator)
            printer.store_all(mine)
            continue
        for store in mine:
            value = reduction.along(reduction.accumulator)
            store_partial(printer, reduction, store, value, "part", programs)
    return programs * column_blocks


def _reject_readers(printer: Printer, position: int) -> None:
    """A sum along all rows is only known after the second stage."""
    for node in printer.spec.tree:
        if position in visitor.operands(node) and not isinstance(node, visitor.Store):
            raise UnsupportedKernel(
                "the result of a reduction along rows is used in the same kernel"
            )


def _stores_of(printer: Printer, position: int) -> list[int]:
    tree = printer.spec.tree
    return [s for s in printer.stores() if visitor.operands(tree[s]) == (position,)]
