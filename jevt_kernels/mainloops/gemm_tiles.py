"""How the tiles of a matrix product are numbered."""

from __future__ import annotations

from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops.pointwise import blocks_along
from jevt_kernels.mainloops.product import Product
from jevt_kernels.spec import Config

#: Rows of the result that a warp holds of an instruction of sm_90.
_ROWS = 16

#: Specialised kernels all of whose groups of warps share a tile.
SHARING = ("cooperative", "overlapped")

#: Elements of a row that a thread of a specialised kernel computes together: 16 bytes of a 16-bit
#: type.
VECTOR = 8


def number(found: Product, config: Config) -> int:
    """The number of tiles, those of each split and batch counted."""
    rows, columns = -(-found.m // config.block("m")), -(-found.n // config.block("n"))
    return found.batch * config.splits * rows * columns


def members(config: Config) -> int:
    """Groups of warps that share the rows of a tile, each with its own part of the product.

    Warps of an instruction hold 16 rows each, so that a cooperative kernel has as many groups as
    the tile has rows for.
    """
    if config.specialized not in SHARING:
        return 1
    return max(1, config.block("m") // (_ROWS * config.num_warps))


def held(config: Config) -> int:
    """Elements of the result in the registers of a thread."""
    threads = 32 * config.num_warps * members(config)
    return config.block("m") * config.block("n") // threads


def coordinates(printer: Printer, found: Product) -> None:
    """Prints where tile ``pid`` lies."""
    config, line = printer.config, printer.line
    rows, columns = (blocks_along(printer.spec.space, config, name) for name in ("m", "n"))
    tiles = rows * columns
    if found.batch > 1:
        line(f"batch = pid // {tiles * config.splits}")
    if config.splits > 1:
        line(f"part_pid = pid // {tiles} % {config.splits}")
    if found.batch > 1 or config.splits > 1:
        line(f"tile_pid = pid % {tiles}")
    else:
        line("tile_pid = pid")
    group = min(config.group, rows)
    if columns == 1 or group == 1:
        line(f"pid_m = tile_pid // {columns}")
        line(f"pid_n = tile_pid % {columns}")
    elif rows % group == 0:
        line(f"pid_m = tile_pid // {group * columns} * {group} + tile_pid % {group}")
        line(f"pid_n = tile_pid % {group * columns} // {group}")
    else:
        line(f"first = tile_pid // {group * columns} * {group}")
        line(f"height = min({rows} - first, {group})")
        line(f"pid_m = first + tile_pid % {group * columns} % height")
        line(f"pid_n = tile_pid % {group * columns} // height")
