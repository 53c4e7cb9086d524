"""Matrix products whose warps have different tasks, written in Gluon for GPUs of sm_90.

One warp does nothing but ask for tiles of the operands, which the tensor memory accelerator copies
into a ring of buffers; it runs ahead of the others, from one tile of the result to the next. The
others multiply, compute the epilogue and store it, in one of three ways (the first two names are
CUTLASS's):

* cooperative: all of them compute one tile, in groups of four that share its rows. Operands of the
  next one arrive during the epilogue. Groups do not wait for each other, so one can multiply while
  the other is in its epilogue, but no longer than the ring of buffers lasts: for short epilogues.
* pingpong: two groups of warps compute tiles in turn. While one group multiplies, the other is in
  its epilogue: for long ones. A group has half of the registers.
* overlapped: as cooperative, but a group holds its part of a tile, rounded, while it multiplies the
  next one, and computes and stores pieces of it between the steps along k: large tiles, and an
  epilogue of few instructions that hides behind the products. It takes registers for both.

The terms of a sum of products follow one another through the same ring, as if they were one long
product; a loop of their own multiplies those that lie in it in another way (:mod:`.ring`).

A program all of whose tiles have the same rows keeps those of the left operand, if they fit, and
only the right one's tiles go through the ring: small tiles read less often what would otherwise
fill the L2 cache's bandwidth.

Barriers: ``filled`` and ``free`` of each buffer, each group's ``turn`` to multiply, and ``kept`` of
the left operand's rows.
"""

from __future__ import annotations

import numpy as np

from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops import gemm_epilogue, gemm_tiles
from jevt_kernels.mainloops.descriptors import Described
from jevt_kernels.mainloops.gemm_epilogue import RESULT
from jevt_kernels.mainloops.gemm_tiles import VECTOR
from jevt_kernels.mainloops.product import Product
from jevt_kernels.mainloops.ring import OPERANDS, Ring, Stretch, Tiles, lay_out, multiplied
from jevt_kernels.ops import TRITON_TYPES
from jevt_kernels.spec import Config, UnsupportedKernel

#: How many groups of warps take turns.
GROUPS = {"cooperative": 1, "pingpong": 2, "overlapped": 1}

#: Warps that an instruction of sm_90 multiplies with, and by which registers are allotted.
_WARPS = 4

#: Registers of a multiprocessor, those of a thread of the loading warp (and of three idle ones that
#: fill up its four), and the steps in which they are allotted.
_REGISTERS = 65536
_LOADING_REGISTERS = 24
_REGISTER_STEP = 8

#: Registers that a thread is given at most, and those that may hold a tile beside the next one's.
_MOST_REGISTERS = 240
_MOST_HELD = 64

_BARRIERS = ("filled", "free", "turn", "kept")

#: Bytes of the left operand's rows that are kept at most.
_KEPT_BYTES = 128 * 1024


def emit(printer: Printer, found: Product, described: dict[str, Described]) -> int:
    """Prints the functions of the two kinds of warps, and the kernel that starts them."""
    _check(printer, found, described)
    spec, config = printer.spec, printer.config
    tiles = gemm_tiles.number(found, config)
    programs = min(config.programs or tiles, tiles)
    inputs, outputs = printer.pointers
    ring = lay_out(found, described, config)
    buffers = [tiles.buffers for tiles in ring.buffers]
    loading = [*described, *buffers, "filled", "free", "kept"]
    computing = [*inputs, *outputs, *buffers, *_BARRIERS]
    with printer.function(f"{spec.name}_load", loading):
        _load(printer, found, ring, tiles, programs)
    with printer.function(f"{spec.name}_compute", ["group: tl.constexpr", *computing]):
        _compute(printer, found, ring, tiles, programs)
    _start(printer, found, ring, loading, computing)
    return programs


def _check(printer: Printer, found: Product, described: dict[str, Described]) -> None:
    config = printer.config
    if config.specialized not in GROUPS:
        raise UnsupportedKernel(
            f"expected specialized to be one of {', '.join(GROUPS)}, got {config.specialized!r}"
        )
    if found.dtype.itemsize != 2 or found.node.dtype != np.dtype("float32"):
        raise UnsupportedKernel("warps have different tasks only for operands of 16 bits")
    if len(described) < len(OPERANDS) * len(multiplied(found)):
        raise UnsupportedKernel(
            "warps have different tasks only where both operands have a descriptor"
        )
    if config.ahead:
        raise UnsupportedKernel("warps with different tasks load nothing ahead")
    steps = found.steps(config.block("k"))
    # Groups that take turns count on each other's number of steps.
    if config.splits > steps or (config.specialized == "pingpong" and steps % config.splits):
        raise UnsupportedKernel(f"{steps} steps along k cannot be split into {config.splits} parts")
    if config.specialized == "overlapped":
        _check_overlap(printer, found)
    rows = config.block("m") // config.num_warps
    if config.num_warps % _WARPS or rows % 16 or config.block("k") * found.dtype.itemsize != 128:
        raise UnsupportedKernel(
            f"tiles {config.blocks} cannot be multiplied by {config.num_warps} warps of sm_90"
        )


def _check_overlap(printer: Printer, found: Product) -> None:
    config = printer.config
    if config.splits > 1:
        raise UnsupportedKernel("overlapped tiles are whole, they have no parts of k")
    held = gemm_tiles.held(config)
    if gemm_epilogue.rounded(printer.spec, found) is not None:
        held //= 2
    if held > _MOST_HELD:
        raise UnsupportedKernel(
            f"{held} registers of a thread for a tile {config.blocks} leave none for the next one"
        )


def keeps_lhs(found: Product, config: Config) -> bool:
    """Whether each program keeps the left operand's rows."""
    rows = -(-found.m // config.block("m"))
    steps = found.steps(config.block("k"))
    size = steps * config.block("m") * config.block("k") * found.dtype.itemsize
    alone = found.batch == 1 and config.splits == 1 and steps > 1 and config.programs > 0
    alone = alone and not found.is_sum
    return alone and rows <= config.group and config.programs % rows == 0 and size <= _KEPT_BYTES


def ring_bytes(found: Product, config: Config) -> int:
    """Bytes of shared memory that the operands take."""
    m, n, k = (config.block(name) for name in ("m", "n", "k"))
    lhs = found.steps(k) if keeps_lhs(found, config) else config.num_stages
    return (m * lhs + n * config.num_stages) * k * found.dtype.itemsize


def _open_steps(printer: Printer, steps: int) -> None:
    """Prints the start of a loop along ``k``, from step ``start`` on.

    Args:
      printer: of the kernel.
      steps: of the loop; of a product that is split, of all its parts.
    """
    splits = printer.config.splits
    if splits == 1:
        printer.line("start = 0")
        printer.open(f"for step in range({steps}):")
        return
    printer.line(f"start = part_pid * {steps} // {splits}")
    printer.open(f"for step in range(start, (part_pid + 1) * {steps} // {splits}):")


def _advance(printer: Printer) -> None:
    """Prints the step to the next buffer of the ring."""
    printer.line("slot += 1")
    printer.line(f"phase = tl.where(slot == {printer.config.num_stages}, phase ^ 1, phase)")
    printer.line(f"slot = tl.where(slot == {printer.config.num_stages}, 0, slot)")


def _load(printer: Printer, found: Product, ring: Ring, tiles: int, programs: int) -> None:
    """Prints the loading warp."""
    config, line = printer.config, printer.line
    starts = {
        "m": f"pid_m * {config.block('m')}",
        "n": f"pid_n * {config.block('n')}",
        "k": f"step * {config.block('k')}",
    }

    def copy(tiles: Tiles, slot: str) -> None:
        coordinates = tiles.described.coordinates(starts)
        line(
            f"hopper.tma.async_copy_global_to_shared({tiles.descriptor}, {coordinates}, barrier, "
            f"{tiles.buffers}.index({slot}))"
        )

    sizes = {
        name: config.block(rows) * config.block("k") * found.dtype.itemsize
        for name, rows in zip(OPERANDS, ("m", "n"), strict=True)
    }
    circulating = list(OPERANDS)
    if keeps_lhs(found, config):
        circulating.remove("lhs")
        line("pid = tl.program_id(0)")
        gemm_tiles.coordinates(printer, found)
        line("barrier = kept.index(0)")
        line(f"hopper.mbarrier.expect(barrier, {sizes['lhs'] * ring.steps})")
        printer.open(f"for step in range({ring.steps}):")
        ((_, (lhs, _)),) = ring.terms
        copy(lhs, "step")
        printer.close()
    line("slot = 0")
    line("phase = 1")
    printer.open(f"for pid in range(tl.program_id(0), {tiles}, {programs}):")
    gemm_tiles.coordinates(printer, found)
    for steps, operands in ring.terms:
        _open_steps(printer, steps)
        line("hopper.mbarrier.wait(free.index(slot), phase)")
        line("barrier = filled.index(slot)")
        line(f"hopper.mbarrier.expect(barrier, {sum(sizes[name] for name in circulating)})")
        for operand in operands:
            if operand.operand in circulating:
                copy(operand, "slot")
        _advance(printer)
        printer.close()
    printer.close()


def _compute(printer: Printer, found: Product, ring: Ring, tiles: int, programs: int) -> None:
    """Prints a group of warps that multiply."""
    config, line = printer.config, printer.line
    groups, stages = GROUPS[config.specialized], config.num_stages
    # Where groups take turns, each part of ``k`` has as many.
    steps = ring.steps // config.splits
    members = gemm_tiles.members(config)
    printer.constants(m=config.block("m") // members)
    columns = config.block("n") // config.subtiles
    lanes = min(32, columns // VECTOR)
    warps = f"[{config.num_warps}, 1]"
    instruction = f"[16, {config.block('n')}, 16]"
    line(
        f"product_layout: tl.constexpr = gl.NVMMADistributedLayout([3, 0], {warps}, {instruction})"
    )
    shape = f"[1, {VECTOR}], [{32 // lanes}, {lanes}]"
    line(f"layout: tl.constexpr = gl.BlockedLayout({shape}, {warps}, [1, 0])")
    if groups == 1:
        line("slot = 0")
        line("phase = 0")
    else:
        line(f"slot = group * {steps} % {stages}")
        line(f"phase = group * {steps} // {stages} % 2")
        line("turns = 0")
    if keeps_lhs(found, config):
        line("hopper.mbarrier.wait(kept.index(0), 0)")
    if config.specialized == "overlapped":
        _overlap(printer, found, ring, tiles, programs)
    else:
        _in_turn(printer, found, ring, tiles, programs)


def _in_turn(printer: Printer, found: Product, ring: Ring, tiles: int, programs: int) -> None:
    """Prints a group's tiles, each followed by its epilogue."""
    config, line = printer.config, printer.line
    groups, stages = GROUPS[config.specialized], config.num_stages
    steps = ring.steps // config.splits
    first = "tl.program_id(0)" if groups == 1 else f"tl.program_id(0) + group * {programs}"
    printer.open(f"for pid in range({first}, {tiles}, {groups * programs}):")
    gemm_tiles.coordinates(printer, found)
    if groups > 1:
        line("hopper.mbarrier.wait(turn.index(group), turns ^ (1 - group))")
        line("turns ^= 1")
    _start_product(printer)
    for stretch in ring.stretches:
        if stretch.first:
            printer.open(f"for step in range({stretch.first}, {stretch.end}):")
        else:
            _open_steps(printer, stretch.end)
        _step(printer, found, stretch, "start")
        printer.close()
    if groups > 1:
        line("hopper.mbarrier.arrive(turn.index(1 - group))")
    _finish_product(printer)
    if groups > 1:  # the other group's buffers
        line(f"slot += {steps}")
        line(f"phase ^= slot // {stages} % 2")
        line(f"slot = slot % {stages}")
    # A part of k is stored as it is, in whole sectors.
    layout = "layout" if config.splits == 1 else "product_layout"
    _place(printer, layout)
    gemm_epilogue.emit(printer, found, layout)
    printer.close()


def _overlap(printer: Printer, found: Product, ring: Ring, tiles: int, programs: int) -> None:
    """Prints a group's tiles, the epilogue of each in parts between the steps of the next."""
    config, line = printer.config, printer.line

    def multiply(part: int, parts: int) -> None:
        bounds = [ring.steps * at // parts for at in (part, part + 1)]
        for stretch in ring.stretches:
            first, end = max(bounds[0], stretch.first), min(bounds[1], stretch.end)
            if first < end:
                printer.open(f"for step in range({first}, {end}):")
                _step(printer, found, stretch, "0")
                printer.close()

    def place() -> None:
        gemm_tiles.coordinates(printer, found)
        _place(printer, "layout")

    _start_product(printer)
    multiply(0, 1)
    _finish_product(printer)
    parts = gemm_epilogue.hold(printer, found)
    printer.open(f"for pid in range(tl.program_id(0), {tiles - programs}, {programs}):")
    place()
    _start_product(printer)
    gemm_epilogue.emit_parts(
        printer, found, parts, "layout", lambda part: multiply(part, config.subtiles)
    )
    _finish_product(printer)
    gemm_epilogue.hold(printer, found)
    printer.close()
    first = "tl.program_id(0)"
    line(f"pid = {first} + ({tiles - 1} - {first}) // {programs} * {programs}")
    place()
    gemm_epilogue.emit_parts(printer, found, parts, "layout")


def _place(printer: Printer, layout: str) -> None:
    """Prints where a group's part of tile ``pid`` lies."""
    if (members := gemm_tiles.members(printer.config)) > 1:
        printer.line(f"pid_m = pid_m * {members} + group")
    with printer.viewing(RESULT.in_layout(layout)):
        printer.tile_index("m", "pid_m * BLOCK_M")
        printer.tile_index("n", "pid_n * BLOCK_N")


def _start_product(printer: Printer) -> None:
    """Prints what is there before the first step along ``k``."""
    line = printer.line
    line("zeros = gl.zeros((BLOCK_M, BLOCK_N), tl.float32, product_layout)")
    line("acc = hopper.warpgroup_mma_init(zeros)")
    # Not slot: Triton would take last for a name that the loop leaves as it is.
    line("last = 0")


def _step(printer: Printer, found: Product, stretch: Stretch, first: str) -> None:
    """Prints step ``step`` along ``k``; its product is under way at the end, out of ``last``."""
    line = printer.line
    tiles = []
    share = "lhs" if gemm_tiles.members(printer.config) > 1 else ""
    kept = "lhs" if keeps_lhs(found, printer.config) else ""
    for own, rows in zip(stretch.tiles, ("m", "k"), strict=True):
        name, operand = own.operand, own.described
        text = f"{own.buffers}.index({'step' if name == kept else 'slot'})"
        if operand.batch:
            block = [printer.config.block(axis) for axis in (operand.outer, operand.inner)]
            text += f".reshape({block})"
        text = text if operand.outer == rows else f"{text}.permute((1, 0))"
        tiles.append(f"{text}.slice(group * BLOCK_M, BLOCK_M, 0)" if name == share else text)
    line("hopper.mbarrier.wait(filled.index(slot), phase)")
    arguments = f"{', '.join(tiles)}, acc, use_acc=step > {first}, is_async=True"
    line(f"acc = hopper.warpgroup_mma({arguments})")
    line("done = hopper.warpgroup_mma_wait(num_outstanding=1, deps=(acc,))")
    line("acc = hopper.warpgroup_mma_init(done)")
    line(f"hopper.mbarrier.arrive(free.index(last), pred=step > {first})")
    line("last = slot")
    _advance(printer)


def _finish_product(printer: Printer) -> None:
    """Prints the wait for the last product."""
    printer.line("acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(acc,))")
    printer.line("hopper.mbarrier.arrive(free.index(last))")


def _start(
    printer: Printer,
    found: Product,
    ring: Ring,
    loading: list[str],
    computing: list[str],
) -> None:
    """Prints the kernel: buffers, barriers, and which warps run which function."""
    config, line, name = printer.config, printer.line, printer.spec.name
    groups, stages = GROUPS[config.specialized], config.num_stages
    members = gemm_tiles.members(config)
    memory: dict[str, str] = {}
    for tiles in ring.buffers:
        kept = tiles.operand == "lhs" and keeps_lhs(found, config)
        shape = ", ".join(map(str, (ring.steps if kept else stages, *tiles.block)))
        # The first name of the ring is that of its memory.
        known = memory.setdefault(tiles.operand, tiles.buffers)
        make = "gl.allocate_shared_memory" if known == tiles.buffers else f"{known}._reinterpret"
        line(
            f"{tiles.buffers} = {make}({TRITON_TYPES[found.dtype]}, [{shape}], "
            f"{tiles.descriptor}.layout)"
        )
    layout = "hopper.mbarrier.MBarrierLayout()"
    counts = ((stages, 1), (stages, members), (groups, 1), (1, 1))
    for barrier, (number, count) in zip(_BARRIERS, counts, strict=True):
        line(f"{barrier} = gl.allocate_shared_memory(tl.int64, [{number}, 1], {layout})")
        printer.open(f"for i in gl.static_range({number}):")
        line(f"hopper.mbarrier.init({barrier}.index(i), count={count})")
        printer.close()
    printer.open("gl.warp_specialize([")
    multiplying = groups * members
    for group in range(multiplying):
        line(f"({name}_compute, ({', '.join([str(group), *computing])})),")
    line(f"({name}_load, ({', '.join(loading)})),")
    printer.close()
    warps = [str(config.num_warps)] * (multiplying - 1) + ["1"]
    registers = [str(_registers(config))] * (multiplying - 1) + [str(_LOADING_REGISTERS)]
    line(f"], [{', '.join(warps)}], [{', '.join(registers)}])")


def _registers(config: Config) -> int:
    """Registers of a multiplying thread.

    A program starts with as many for all of its threads; the loading warps give theirs away.
    """
    multiplying = GROUPS[config.specialized] * gemm_tiles.members(config) * config.num_warps
    every = _rounded_down(_REGISTERS // 32 // (multiplying + _WARPS))
    left = every * (multiplying + _WARPS) - _LOADING_REGISTERS * _WARPS
    return _rounded_down(left // multiplying)


def _rounded_down(registers: int) -> int:
    return min(registers // _REGISTER_STEP * _REGISTER_STEP, _MOST_REGISTERS)
