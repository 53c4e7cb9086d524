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
from jevt_kernels.mainloops import narrow_columns
from jevt_kernels.mainloops.pipelining import stages as stages_ahead
from jevt_kernels.mainloops.pointwise import blocks_along, power_of_two
from jevt_kernels.mainloops.reduction import (
    before_reductions,
    hoist,
    reductions,
    store_partial,
)
from jevt_kernels.spec import Config, KernelSpec, Stages, UnsupportedKernel

SMALLEST_BLOCK = 1

#: Widest row, padded to a power of two, of a tile that holds whole rows and accumulators.
MAX_WHOLE = 8192

#: Programs that walk the rows: four for each of an H100's multiprocessors. The number decides the
#: order of summation, so it does not depend on the device.
_PROGRAMS = 528

#: Elements and columns of the tile that is walked. Of many columns few programs have the same, so
#: that partial results are few. BatchNorm's backward sums [128, 56, 56, 256] in bfloat16 take 135
#: us on an H100, its statistics 69 and those of [6272, 2048] 12; 141, 72 and 15 in tiles of 64 rows
#: and 64 columns of twice as many programs.
_TILE, _ACROSS = 2048, 128

#: Columns of the tile where more would end far beyond the last one.
_FEWER = 64

#: Elements of a tile that holds whole rows: a row on chip for each warp, its intermediates beside
#: the accumulators.
_WHOLE_TILE = 1024

_PER_WARP = 1024

#: Blocks of rows under way at most.
_AHEAD = 4

#: Further tiles: elements, columns, programs.
_OTHERS = ((2048, 64, 528), (1024, 64, 1056), (4096, 64, 1056), (4096, 128, 528))


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    spec = narrow_columns.wide(spec) or spec
    rows, columns = (spec.space.extent(spec.space.tile_axis(name)) for name in ("row", "col"))
    width = power_of_two(columns)
    if any(isinstance(n, visitor.Reduce) and n.over == "col" for n in spec.tree):
        tiles = [(elements, width, _PROGRAMS) for elements in (_WHOLE_TILE, 2 * _WHOLE_TILE)]
    else:
        tiles = [(_TILE, _across(columns), _PROGRAMS), *_OTHERS]
    found = []
    for elements, most, programs in tiles:
        across = min(width, most)
        down = _down(rows, across, elements)
        blocks = (("row", down), ("col", across))
        warps = min(16, max(1, down * across // _PER_WARP))
        found.append(
            Config(blocks, warps, stages_ahead(spec, "row", dict(blocks), most=_AHEAD), programs)
        )
    return tuple(dict.fromkeys(found))


def _across(columns: int) -> int:
    """Columns of the tile that is walked."""
    width = power_of_two(columns)
    few, many = (-(-columns // block) * block for block in (_FEWER, _ACROSS))
    return min(width, _ACROSS if many <= 9 / 8 * few else _FEWER)


def _down(rows: int, across: int, elements: int) -> int:
    """Rows of a tile of so many elements."""
    return min(max(1, elements // across), power_of_two(rows))


def parts(rows: int, columns: int, whole: bool = False) -> int:
    """Partial results of each reduction that a kernel leaves in its preferred configuration.

    Args:
      rows: that it reduces along.
      columns: of a row.
      whole: it reduces along columns too, so that its tiles hold whole rows.
    """
    across = power_of_two(columns) if whole else _across(columns)
    down = _down(rows, across, _WHOLE_TILE if whole else _TILE)
    return _walkers(-(-rows // down), -(-columns // across), _PROGRAMS, whole)


def _walkers(row_blocks: int, column_blocks: int, programs: int, whole: bool) -> int:
    """Programs that share the rows of a block of columns, of about so many programs in all.

    Short blocks of rows are all under way at once, as many as a loop loads ahead: one program takes
    them sooner than several leave partial results that have to be combined.
    """
    most = row_blocks if whole else -(-row_blocks // _AHEAD)
    return min(most, max(1, round(programs / column_blocks)))


def stages(spec: KernelSpec, config: Config) -> Stages | None:
    """The kernels of a tensor of few columns; None where one is enough."""
    del config
    return narrow_columns.stages(spec)


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
    most = config.programs or _PROGRAMS
    programs = _walkers(row_blocks, column_blocks, most, bool(along_columns))
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
