"""Rowwise kernels: reductions along ``col``, with pointwise work before, between and after.

Three forms. *Whole*: a program instance holds whole rows on chip, so each element is read and
written once. *Looped*, for rows that do not fit: one loop over the row for each pass
(``mainloops.passes``: a reduction that needs an earlier reduction's result comes one pass later,
but for a softmax's sum) and one for the stores, unless these do not need what the last pass makes:
then it stores as well. Pointwise work is repeated rather than stored.
*Split*, for rows that are few and long: several kernels (``mainloops.long_rows``).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer, power_of_two
from jevt_kernels.mainloops import long_rows, parts, pipelining
from jevt_kernels.mainloops.passes import passes
from jevt_kernels.mainloops.pointwise import blocks_along
from jevt_kernels.mainloops.reduction import before_reductions, hoist, reductions
from jevt_kernels.mainloops.sweep import Sweep
from jevt_kernels.spec import Config, KernelSpec, Stages

SMALLEST_BLOCK = 1

#: Widest row, padded to a power of two, that is held on chip.
MAX_WHOLE = 32768

#: Elements of a row, padded, that one warp takes: a row that a single warp holds is reduced without
#: shared memory, and small blocks come and go without waiting for each other.
_PER_WARP = 1024

#: From this many 32-bit values of loaded tensors a thread on, so few blocks fit on a multiprocessor
#: that loads have to be issued ahead; with 16-bit tensors only, wider ones keep memory busy anyway.
_MANY_REGISTERS = 96

#: Blocks that walk the rows then, eight on each of 132 multiprocessors.
_PROGRAMS = 1056

#: Blocks that walk the widest rows: about a multiple of the multiprocessors of an A100 (108) and of
#: an H100 (132), each of which holds one.
_WALKERS = 528

#: Fewer rows than this, each too long for one block, leave most of a GPU idle: they are split.
FEW_ROWS = 128


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    rows, columns = (spec.space.extent(spec.space.tile_axis(name)) for name in ("row", "col"))
    width = power_of_two(columns)
    looped = [Config((("row", 1), ("col", block)), warps) for block, warps in parts.TILES]
    if width > MAX_WHOLE:
        split = [dataclasses.replace(c, splits=_splits(rows, columns, c)) for c in looped]
        return tuple(dict.fromkeys([*split, *looped] if rows < FEW_ROWS else looped))
    if width == MAX_WHOLE:
        return (*_widest(spec, rows), *looped) if held(spec) <= 1 else (*looped, _whole_row())
    warps = max(1, width // _PER_WARP)
    height = min(max(1, _PER_WARP // width), power_of_two(rows))
    blocks = (("row", height), ("col", width))
    result = [Config(blocks, warps), Config(blocks, 2 * warps)]
    tiles, registers = _loads(spec, width // (32 * warps))
    if tiles and height * width <= _PER_WARP and rows > 4 * _PROGRAMS:
        ahead = (("row", 2 if tiles == 1 and width == _PER_WARP else height), ("col", width))
        walking = Config(ahead, warps, pipelining.stages(spec, "row", dict(ahead)), _PROGRAMS)
        result.insert(0 if registers >= _MANY_REGISTERS else 1, walking)
    return tuple(dict.fromkeys(result))


def _widest(spec: KernelSpec, rows: int) -> tuple[Config, ...]:
    """Configurations for a row that takes a multiprocessor by itself, 64 registers of a thread.

    A thread block a row alternates between memory and arithmetic: 51 % of an H200's bandwidth in
    BERT's cross entropy. Blocks that walk the rows load the next one meanwhile.
    """
    tiles, registers = _loads(spec, _PER_WARP // 32)
    whole = _whole_row()
    if tiles == 1 and registers == _PER_WARP // 32 and rows > 2 * _WALKERS:
        return dataclasses.replace(whole, num_stages=2, programs=_WALKERS), whole
    return (whole,)


def _whole_row() -> Config:
    return Config((("row", 1), ("col", MAX_WHOLE)), MAX_WHOLE // _PER_WARP)


def _splits(rows: int, columns: int, config: Config) -> int:
    """Parts of a row, of equal numbers of blocks, such that all rows have ``_PROGRAMS`` of them."""
    blocks = -(-columns // config.block("col"))
    each = -(-blocks * rows // _PROGRAMS)
    return -(-blocks // each)


def stages(spec: KernelSpec, config: Config) -> Stages | None:
    """The kernels that a configuration with ``splits`` asks for; None if one is enough."""
    if config.splits == 1 or not any(isinstance(n, visitor.Reduce) for n in spec.tree):
        return None
    return long_rows.stages(spec, config.splits)


def traffic(spec: KernelSpec) -> tuple[int, int]:
    """Bytes that a kernel moves in its preferred configuration, and how many launches do so.

    The launches that combine parts of rows are not among them: they move next to nothing.
    """
    preferred = configs(spec)[0]
    columns = spec.space.extent(spec.space.tile_axis("col"))
    if columns <= MAX_WHOLE or stages(spec, dataclasses.replace(preferred, splits=2)) is None:
        return sum(operand.nbytes for operand in (*spec.inputs, *spec.outputs)), 1
    # A loop makes the same passes; nothing but partial results is written between its own.
    steps = long_rows.stages(spec, preferred.splits).steps
    moved = sum(operand.nbytes for s in steps for operand in (*s.spec.inputs, *s.spec.outputs))
    over_rows = [s for s in steps if s.spec.mainloop != "rowwise"]
    return moved, len(over_rows) if preferred.splits > 1 else 1


def _loads(spec: KernelSpec, per_thread: int) -> tuple[int, int]:
    """Full tiles that are loaded, and the registers that they and the vectors along columns take.

    Both are 0 where a full tile's elements are wider than 16 bits.
    """
    loads = {node for node in spec.tree if isinstance(node, visitor.Load)}
    row, col = (spec.space.tile_axis(name) for name in ("row", "col"))
    along = [load for load in loads if load.index.depends_on(col)]
    tiles = [load for load in along if load.index.depends_on(row)]
    if any(spec.inputs[tile.input].dtype.itemsize > 2 for tile in tiles):
        return 0, 0
    return len(tiles), len(along) * per_thread


def _in_turn(spec: KernelSpec) -> list[int]:
    """The reductions of a whole row in the order in which they are made.

    What needs fewer of the others comes first, and then what no full tile needs, as the loss beside
    its gradient, so that few values wait for a later one.
    """
    levels, varies = visitor.levels(spec.tree), visitor.dependencies(spec.tree, spec.space)
    again: set[int] = set()
    for position in reversed(range(len(spec.tree))):
        if position in again or "col" in varies[position]:
            again.update(visitor.operands(spec.tree[position]))
    found = (
        p for p, n in enumerate(spec.tree) if isinstance(n, visitor.Reduce) and n.over == "col"
    )
    return sorted(found, key=lambda p: (levels[p], p in again, p))


def held(spec: KernelSpec) -> int:
    """Full tiles, most of them at a time, that a whole row's program keeps through a reduction."""
    turn = {position: number for number, position in enumerate(_in_turn(spec))}
    col, varies = len(turn), visitor.dependencies(spec.tree, spec.space)
    first = [col] * len(spec.tree)
    last = [0] * len(spec.tree)
    for position in reversed(range(len(spec.tree))):
        at = turn.get(position, first[position])
        for operand in visitor.operands(spec.tree[position]):
            first[operand] = min(first[operand], at)
            last[operand] = max(last[operand], at)
    kept = [
        range(first[position], last[position])
        for position, node in enumerate(spec.tree)
        if "col" in varies[position] and _takes_registers(spec, position, node)
    ]
    return max((sum(number in one for one in kept) for number in range(col)), default=0)


def _takes_registers(spec: KernelSpec, position: int, node: visitor.Node) -> bool:
    """Whether a value is not a position, which is made again, nor a boolean, which is a bit."""
    if isinstance(node, visitor.Compute | visitor.Constant) and node.dtype == np.dtype(bool):
        return False
    below = visitor.ancestors(spec.tree, position)
    return any(isinstance(spec.tree[p], visitor.Load) for p in below)


def emit(printer: Printer) -> int:
    """Prints the body; a program instance walks one block of rows, or several."""
    space, config = printer.spec.space, printer.config
    row_blocks = blocks_along(space, config, "row")
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    if blocks_along(space, config, "col") > 1:
        printer.tile_index("row", "pid * BLOCK_ROW")
        _emit_looped(printer)
        return row_blocks
    printer.tile_index("col", "")
    if not config.programs or row_blocks <= config.programs:
        printer.tile_index("row", "pid * BLOCK_ROW")
        _emit_whole(printer)
        return row_blocks
    hoist(printer, before_reductions(printer), "row")
    printer.open_loop("block", "pid", row_blocks, str(config.programs))
    printer.tile_index("row", "block * BLOCK_ROW")
    _emit_whole(printer)
    printer.close()
    return config.programs


def _emit_whole(printer: Printer) -> None:
    found = {reduction.position: reduction for reduction in reductions(printer, "col")}
    for position in _in_turn(printer.spec):
        found[position].finish(found[position].masked())
    printer.store_all(printer.stores())


def _emit_looped(printer: Printer) -> None:
    columns = printer.spec.space.extent(printer.spec.space.tile_axis("col"))
    reductions(printer, "col")  # raises for what none knows
    plan = passes(printer.spec)
    stores = printer.stores()
    narrow = [s for s in stores if not _store_follows_columns(printer, s)]
    wide = [s for s in stores if s not in narrow]
    last = len(plan.of) - 1
    if any(plan.known[o] > last for o in _stored(printer, wide)):
        last = len(plan.of)
    for number in range(len(plan.of)):
        sweep = Sweep(printer, plan, number)
        sweep.start()
        if number == last:
            hoist(printer, _stored(printer, wide), "col")
        printer.open_loop("start", "0", columns, "BLOCK_COL")
        printer.tile_index("col", "start")
        sweep.accumulate()
        if number == last:
            printer.store_all(wide)
        printer.close()
        sweep.finish()
    hoist(printer, _stored(printer, narrow if last < len(plan.of) else stores), "col")
    printer.store_all(narrow)
    if wide and last == len(plan.of):
        printer.open_loop("start", "0", columns, "BLOCK_COL")
        printer.tile_index("col", "start")
        printer.store_all(wide)
        printer.close()


def _stored(printer: Printer, stores: list[int]) -> list[int]:
    return [o for position in stores for o in visitor.operands(printer.spec.tree[position])]


def _store_follows_columns(printer: Printer, position: int) -> bool:
    node = printer.spec.tree[position]
    assert isinstance(node, visitor.Store)
    return node.index.depends_on(printer.spec.space.tile_axis("col"))
