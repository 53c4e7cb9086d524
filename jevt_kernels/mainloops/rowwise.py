"""Rowwise kernels: reductions along ``col``, with pointwise work before, between and after.

Two forms. *Whole*: a program instance holds whole rows on chip, so each element is read and written
once. *Looped*, for rows that do not fit: one loop over the row for each level of reductions (a
reduction that needs an earlier reduction's result is one level up) and one for the stores;
pointwise work is repeated rather than stored.
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer, power_of_two
from jevt_kernels.mainloops.pointwise import blocks_along
from jevt_kernels.mainloops.reduction import hoist, reductions
from jevt_kernels.spec import Config, KernelSpec

#: Widest row, padded to a power of two, that is held on chip.
MAX_WHOLE = 32768

#: Elements of a tile that one warp takes.
_PER_WARP = 1024


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    rows, columns = (spec.space.extent(spec.space.tile_axis(name)) for name in ("row", "col"))
    width = power_of_two(columns)
    if width > MAX_WHOLE:
        return tuple(
            Config((("row", 1), ("col", block)), warps)
            for block, warps in ((4096, 8), (2048, 8), (8192, 16))
        )
    result: dict[Config, None] = {}
    for elements in (4096, 2048, 1024):
        height = min(max(1, elements // width), power_of_two(rows))
        warps = min(32, max(1, power_of_two(height * width // _PER_WARP)))
        result.setdefault(Config((("row", height), ("col", width)), warps))
    return tuple(result)


def emit(printer: Printer) -> int:
    """Prints the body; one program instance a block of rows."""
    space, config = printer.spec.space, printer.config
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    printer.tile_index("row", "pid * BLOCK_ROW")
    if blocks_along(space, config, "col") <= 1:
        _emit_whole(printer)
    else:
        _emit_looped(printer)
    return blocks_along(space, config, "row")


def _emit_whole(printer: Printer) -> None:
    printer.tile_index("col", "")
    for reduction in reductions(printer, "col"):
        reduction.finish(reduction.masked())
    printer.store_all(printer.stores())


def _emit_looped(printer: Printer) -> None:
    columns = printer.spec.space.extent(printer.spec.space.tile_axis("col"))
    all_reductions = reductions(printer, "col")
    for level in sorted({printer.levels[r.position] for r in all_reductions}):
        here = [r for r in all_reductions if printer.levels[r.position] == level]
        for reduction in here:
            reduction.start()
            hoist(printer, [reduction.node.operand], "col")
        printer.open(f"for start in range(0, {columns}, BLOCK_COL):")
        printer.tile_index("col", "start")
        for reduction in here:
            reduction.accumulate()
        printer.close()
        for reduction in here:
            reduction.finish(reduction.accumulator)
    stores = printer.stores()
    operands = [o for position in stores for o in visitor.operands(printer.spec.tree[position])]
    hoist(printer, operands, "col")
    narrow = [s for s in stores if not _store_follows_columns(printer, s)]
    printer.store_all(narrow)
    wide = [s for s in stores if s not in narrow]
    if wide:
        printer.open(f"for start in range(0, {columns}, BLOCK_COL):")
        printer.tile_index("col", "start")
        printer.store_all(wide)
        printer.close()


def _store_follows_columns(printer: Printer, position: int) -> bool:
    node = printer.spec.tree[position]
    assert isinstance(node, visitor.Store)
    return node.index.depends_on(printer.spec.space.tile_axis("col"))
