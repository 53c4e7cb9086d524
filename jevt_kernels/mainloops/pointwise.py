"""Pointwise kernels: every point of the space is visited once, nothing is reduced.

The tile has one axis ``i``, or two, ``i`` and ``j``, where operands disagree on which axis is
contiguous: then loads are coalesced along one tile axis and stores along the other, and Triton
exchanges the tile through shared memory.
"""

from __future__ import annotations

from jevt_kernels.codegen import Printer, power_of_two
from jevt_kernels.index_map import Space
from jevt_kernels.spec import Config, KernelSpec

SMALLEST_BLOCK = 1


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    names = [t.name for t in spec.space.tile]
    extents = [spec.space.extent(t) for t in spec.space.tile]
    candidates: list[tuple[tuple[int, ...], int]]
    if len(names) == 1:
        candidates = [((1024,), 4), ((2048,), 8), ((512,), 4), ((4096,), 8)]
    else:
        candidates = [((32, 64), 4), ((64, 64), 8), ((32, 32), 4)]
    result: dict[Config, None] = {}
    for blocks, num_warps in candidates:
        sizes = [
            min(block, power_of_two(extent)) for block, extent in zip(blocks, extents, strict=True)
        ]
        if len(sizes) == 2:  # a short axis leaves its share of the tile to the other
            spare = blocks[0] * blocks[1] // (sizes[0] * sizes[1])
            grow = 0 if sizes[1] < blocks[1] else 1
            sizes[grow] = min(sizes[grow] * spare, power_of_two(extents[grow]))
        result.setdefault(Config(tuple(zip(names, sizes, strict=True)), num_warps))
    return tuple(result)


def blocks_along(space: Space, config: Config, name: str) -> int:
    """Number of tiles along a tile axis."""
    return -(-space.extent(space.tile_axis(name)) // config.block(name))


def emit(printer: Printer) -> int:
    """Prints the body; one program instance a tile."""
    space, config = printer.spec.space, printer.config
    printer.constants()
    if len(space.tile) == 1:
        printer.line(f"pid = {printer.program_id()}")
        printer.tile_index("i", "pid * BLOCK_I")
        grid = blocks_along(space, config, "i")
    else:
        columns = blocks_along(space, config, "j")
        printer.line(f"pid = {printer.program_id()}")
        printer.tile_index("i", f"pid // {columns} * BLOCK_I" if columns > 1 else "pid * BLOCK_I")
        printer.tile_index("j", f"pid % {columns} * BLOCK_J" if columns > 1 else "")
        grid = blocks_along(space, config, "i") * columns
    printer.store_all(printer.stores())
    return grid
