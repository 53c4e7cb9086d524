"""Rowwise kernels: reductions along ``col``, with pointwise work before, between and after.

Three forms. *Whole*: a program instance holds whole rows on chip, so each element is read and
written once. *Looped*, for rows that do not fit: one loop over the row for each pass
(``mainloops.passes``: a reduction that needs an earlier reduction's result comes one pass later,
but for a softmax's sum) and one for the stores, unless these do not need what the last pass makes:
then it stores as well. Pointwise work is repeated rather than stored. Each loop begins where the
one before it has ended, and tells the L2 cache which tensors a later one reads again.
*Split*, for rows that are few and long: several kernels (``mainloops.long_rows``). In the others,
a sum in which one element counts loads it (``mainloops.picks``).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer, power_of_two
from jevt_kernels.mainloops import long_rows, parts, pipelining
from jevt_kernels.mainloops.again import print_stores
from jevt_kernels.mainloops.loops import Loops, alive, loops
from jevt_kernels.mainloops.picks import Pick, picks, print_pick
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

#: Tiles of loops that read a row more than once, from the L2 cache: columns and warps.
_AGAIN = ((8192, 16), (8192, 32), (4096, 16), (4096, 8))

#: What the L2 cache keeps of rows under way: 36 MB of an H100's 50.
_KEPT_BYTES = 36 << 20
_MULTIPROCESSORS = 132

#: Threads and registers of a multiprocessor, and rows under way beyond which nothing is gained.
_THREADS = 2048
_REGISTERS = 1 << 16
_MOST_ROWS = 4

#: Registers of a thread beside its elements', and how many compilers make do with.
_OTHER_REGISTERS = 12
_MOST_REGISTERS = 64

#: Elements under way on a multiprocessor with which loops are as fast as whole rows.
_AS_WHOLE = 20480

#: Tiles of longer rows, of which each multiprocessor has one under way: columns, warps, and blocks
#: that walk the rows. 1024 threads have 64 registers: room for three tiles or sums of 16 elements a
#: thread, 8 if they are wide. Walking blocks have other registers, for addresses.
_AGAIN_LONG = (16384, 32, 132)
_AGAIN_LONG_AND_WIDE = (8192, 32, 132)
_MOST_TILES = 3

#: Parts of the multiprocessors on which longer rows may be under way: fewer than all, so that the
#: L2 cache keeps them, with loads issued ahead to keep memory busy.
_SHARES = (1, 3 / 4, 1 / 2)

#: Operations of which one takes as long as loading dozens of elements.
_HEAVY = frozenset({"threefry2x32"})

#: Fewer rows than this, each too long for one block, leave most of a GPU idle: they are split.
FEW_ROWS = 128


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    rows, columns = (spec.space.extent(spec.space.tile_axis(name)) for name in ("row", "col"))
    width = power_of_two(columns)
    tiles = [Config((("row", 1), ("col", block)), warps) for block, warps in parts.TILES]
    again = _again(spec, rows)
    looped = [*again, *tiles]
    if width > MAX_WHOLE:
        split = [dataclasses.replace(c, splits=_splits(rows, columns, c)) for c in tiles]
        return tuple(dict.fromkeys([*split, *looped] if rows < FEW_ROWS else looped))
    if width == MAX_WHOLE:
        whole = _widest(spec, rows) if held(spec) <= 1 else ()
        as_whole = _AS_WHOLE * _worth(columns, MAX_WHOLE)
        if whole and (not again or _under_way(spec, rows, again[0])[0] <= as_whole):
            return tuple(dict.fromkeys((*whole, *looped)))
        return tuple(dict.fromkeys((*looped, *whole, _whole_row())))
    warps = max(1, width // _PER_WARP)
    height = min(max(1, _PER_WARP // width), power_of_two(rows))
    blocks = (("row", height), ("col", width))
    result = [Config(blocks, warps), Config(blocks, 2 * warps)]
    if any(isinstance(n, visitor.Compute) and n.op in _HEAVY for n in spec.tree):
        # Arithmetic hides the loads if enough warps do it: of dropout, a residual sum and a layer
        # norm [16384, 1024] in 61 us, 78 where a block a row loads the next one ahead.
        return tuple(result[::-1])
    full, registers = _loads(spec, width // (32 * warps))
    if full and height * width <= _PER_WARP and rows > 4 * _PROGRAMS:
        ahead = (("row", 2 if full == 1 and width == _PER_WARP else height), ("col", width))
        walking = Config(ahead, warps, pipelining.stages(spec, "row", dict(ahead)), _PROGRAMS)
        result.insert(0 if registers >= _MANY_REGISTERS else 1, walking)
    return tuple(dict.fromkeys(result))


def _widest(spec: KernelSpec, rows: int) -> tuple[Config, ...]:
    """Configurations for a row that takes a multiprocessor by itself, 64 registers of a thread.

    A thread block a row alternates between memory and arithmetic: 51 % of an H200's bandwidth in
    BERT's cross entropy. Blocks that walk the rows load the next two meanwhile, as a row's
    arithmetic takes about as long as its loads. On an H100, [16384, 30528] in bfloat16: a cross
    entropy of labels as numbers and its gradient in 721 us with two rows under way, 763 in loops;
    logsumexp in 335, 394 without a row under way.
    """
    tiles, registers = _loads(spec, _PER_WARP // 32)
    whole = _whole_row()
    if tiles == 1 and registers == _PER_WARP // 32 and rows > 2 * _WALKERS:
        walking = dataclasses.replace(whole, programs=_WALKERS)
        return (*(dataclasses.replace(walking, num_stages=n) for n in (3, 2)), walking, whole)
    return (whole,)


def _again(spec: KernelSpec, rows: int) -> tuple[Config, ...]:
    """Configurations for rows that loops read more than once, from the L2 cache if it keeps them.

    Most elements under way are fastest; of as many, most rows, which do not wait for each other;
    then most threads. Cross entropies and their gradients [16384, 30528] in bfloat16 on an H100,
    in blocks of 8192 columns and 16 warps, 4096 and 16, 4096 and 8: 681 us, 734 and 809 where three
    of the first fit on a multiprocessor, as one value of an element is alive at a time; 825, 760
    and 808 with two values; 975, 1123 and 815 with four.
    """
    found = loops(spec)
    if len(found.reads) < 2 or found.tiles > _MOST_TILES:
        return ()
    if 2 * _MULTIPROCESSORS * _row_bytes(spec) <= _KEPT_BYTES:
        tiles = [_looped(columns, warps, 0) for columns, warps in _AGAIN]
        return tuple(sorted(tiles, key=lambda c: _under_way(spec, rows, c), reverse=True))
    loads = frozenset[visitor.Load]().union(*found.reads)
    wide = any(spec.inputs[load.input].dtype.itemsize > 2 for load in loads)
    columns, warps, programs = _AGAIN_LONG_AND_WIDE if wide else _AGAIN_LONG
    result = [_looped(columns, warps, programs)]
    for share in _SHARES if rows >= FEW_ROWS else ():
        walkers = _evenly(rows, round(share * _MULTIPROCESSORS))
        result += [_looped(columns, warps, walkers, stages) for stages in (1, 2)]
        result += [_looped(8192, warps, walkers, 3)]
    return tuple(dict.fromkeys(result))


def _under_way(spec: KernelSpec, rows: int, config: Config) -> tuple[float, int, int]:
    """What of a looped kernel is on a multiprocessor at a time: elements, rows, warps of a row.

    Nothing counts if it is more than the L2 cache keeps.
    """
    columns, blocks = config.block("col"), _blocks(spec, config)
    if blocks * _MULTIPROCESSORS * _row_bytes(spec) > _KEPT_BYTES:
        return 0, 0, 0
    blocks = min(blocks, _MOST_ROWS, -(-rows // _MULTIPROCESSORS))
    worth = _worth(spec.space.extent(spec.space.tile_axis("col")), columns)
    return blocks * columns * worth, blocks, config.num_warps


def _blocks(spec: KernelSpec, config: Config) -> int:
    """Thread blocks of a looped kernel that are on a multiprocessor at a time.

    A thread has registers for the values that are alive, and half as many for those on their way.
    """
    threads = 32 * config.num_warps
    each = config.block("col") // threads
    registers = _OTHER_REGISTERS + each // 2 + each * alive(spec)
    registers = min(_MOST_REGISTERS, -(-registers // 8) * 8)
    return min(_THREADS // threads, _REGISTERS // (registers * threads))


def _worth(columns: int, block: int) -> float:
    """What an element under way counts of a row whose last block ends beyond it.

    The idle lanes of that block weigh more than their number: cross entropies of [16384, 17000] and
    [16384, 20480] take 451 and 479 us in blocks of 8192 columns, 414 and 447 in blocks of 4096.
    """
    return (columns / (-(-columns // block) * block)) ** 3


def _looped(columns: int, warps: int, programs: int, stages: int = 1) -> Config:
    return Config((("row", 1), ("col", columns)), warps, stages, programs)


def _evenly(rows: int, most: int) -> int:
    """Programs, at most so many, of which none walks fewer rows than it has to."""
    return -(-rows // -(-rows // most))


def _row_bytes(spec: KernelSpec) -> int:
    """Bytes of a row of all full tensors that are read."""
    row, col = (spec.space.tile_axis(name) for name in ("row", "col"))
    read = {n for n in spec.tree if isinstance(n, visitor.Load)}
    full = [n for n in read if n.index.depends_on(col) and n.index.depends_on(row)]
    return sum(spec.inputs[n.input].dtype.itemsize for n in full) * spec.space.extent(col)


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

    A loop that reads a row again finds in the L2 cache what that keeps of the rows under way. The
    launches that combine parts of rows are not among them: they move next to nothing.
    """
    preferred = configs(spec)[0]
    rows, columns = (spec.space.extent(spec.space.tile_axis(name)) for name in ("row", "col"))
    once = sum(operand.nbytes for operand in (*spec.inputs, *spec.outputs))
    if columns <= MAX_WHOLE or not any(isinstance(n, visitor.Reduce) for n in spec.tree):
        return once, 1
    if preferred.splits > 1:
        steps = long_rows.stages(spec, preferred.splits).steps
        moved = sum(operand.nbytes for s in steps for operand in (*s.spec.inputs, *s.spec.outputs))
        return moved, sum(s.spec.mainloop != "rowwise" for s in steps)
    blocks = preferred.programs or _MULTIPROCESSORS * _blocks(spec, preferred)
    kept = min(1.0, _KEPT_BYTES / (min(rows, blocks) * max(1, _row_bytes(spec))))
    reads = collections.Counter(load.input for each in loops(spec).reads for load in each)
    again = sum((count - 1) * spec.inputs[input_].nbytes for input_, count in reads.items())
    return once + round((1 - kept) * again), 1


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
    picked = picks(spec)
    made = [position for position in _in_turn(spec) if position not in picked]
    turn = {position: number for number, position in enumerate(made)}
    col, varies = len(turn), visitor.dependencies(spec.tree, spec.space)
    first = [col] * len(spec.tree)
    last = [0] * len(spec.tree)
    stores = (p for p, node in enumerate(spec.tree) if isinstance(node, visitor.Store))
    read = {*made, *stores}
    for position in reversed(range(len(spec.tree))):
        if position in picked or position not in read:
            continue
        at = turn.get(position, first[position])
        for operand in visitor.operands(spec.tree[position]):
            read.add(operand)
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
    looped = blocks_along(space, config, "col") > 1
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    if not looped:
        printer.tile_index("col", "")
    if not config.programs or row_blocks <= config.programs:
        printer.tile_index("row", "pid * BLOCK_ROW")
        _emit_rows(printer, looped)
        return row_blocks
    if not looped:
        hoist(printer, before_reductions(printer), "row")
    printer.open_loop("block", "pid", row_blocks, str(config.programs))
    printer.tile_index("row", "block * BLOCK_ROW")
    _emit_rows(printer, looped)
    printer.close()
    return config.programs


def _emit_rows(printer: Printer, looped: bool) -> None:
    """Prints what is done to a block of rows."""
    if looped:
        _emit_looped(printer)
    else:
        _emit_whole(printer)


def _emit_whole(printer: Printer) -> None:
    found = {reduction.position: reduction for reduction in reductions(printer, "col")}
    picked = picks(printer.spec)
    for position in sorted(_in_turn(printer.spec), key=lambda p: (printer.levels[p], p in picked)):
        if position in picked:
            print_pick(printer, picked[position])
        else:
            found[position].finish(found[position].masked())
    if printer.config.block("col") == MAX_WHOLE:
        print_stores(printer, picked)
    else:
        printer.store_all(printer.stores())


def _emit_looped(printer: Printer) -> None:
    reductions(printer, "col")  # raises for what none knows
    found = loops(printer.spec)
    plan, wide, last = found.plan, list(found.wide), found.last
    narrow = [s for s in printer.stores() if s not in wide]
    picked = picks(printer.spec).values()
    for number in range(len(plan.of)):
        _print_picks(printer, [p for p in picked if plan.known[p.position] == number])
        sweep = Sweep(printer, plan, number)
        sweep.start()
        if number == last:
            hoist(printer, _stored(printer, wide), "col")
        _open_loop(printer, found, number)
        sweep.accumulate()
        if number == last:
            printer.store_all(wide)
        printer.close()
        sweep.finish()
    _print_picks(printer, [p for p in picked if plan.known[p.position] == len(plan.of)])
    after = narrow if last < len(plan.of) else printer.stores()
    hoist(printer, _stored(printer, after), "col")
    printer.store_all(narrow)
    if wide and last == len(plan.of):
        _open_loop(printer, found, last)
        printer.store_all(wide)
        printer.close()


def _print_picks(printer: Printer, picked: Sequence[Pick]) -> None:
    for pick in picked:
        print_pick(printer, pick)


def _open_loop(printer: Printer, found: Loops, number: int) -> None:
    """Starts a loop over a row: every other one backwards, from what was read last."""
    spec, count = printer.spec, len(found.reads)
    columns = spec.space.extent(spec.space.tile_axis("col"))
    last = (blocks_along(spec.space, printer.config, "col") - 1) * printer.config.block("col")
    if count > 1:
        later = frozenset[visitor.Load]().union(*found.reads[number + 1 :])
        printer.evictions = {spec.tree[position]: "evict_first" for position in found.wide}
        for load in found.reads[number]:
            printer.evictions[load] = "evict_last" if load in later else "evict_first"
    printer.open_loop("start", "0", columns, "BLOCK_COL")
    printer.tile_index("col", f"{last} - start" if number % 2 else "start")


def _stored(printer: Printer, stores: list[int]) -> list[int]:
    return [o for position in stores for o in visitor.operands(printer.spec.tree[position])]
