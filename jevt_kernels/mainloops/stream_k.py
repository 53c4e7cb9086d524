"""Stream-K: the steps of all tiles divided evenly among programs, wherever a tile ends.

Where a product has few large tiles, some multiprocessors have none; parts of k of one length fill
them only if their number happens to. Here program p computes the steps from p·S/P to (p + 1)·S/P of
all S (Osama et al., Stream-K, PPoPP 2023). It leaves the sum of each piece of a tile as one of that
tile's parts, in the order of programs, so that results are the same bits from run to run. Tiles of
fewer parts than others have zeros for the rest.

    72 tiles of 512 steps, 132 programs of 279 or 280:
    program 0  tile 0, steps 0 to 279          program 1  tile 0, from 279 on; tile 1, up to 46
    program 2  tile 1, steps 46 to 326         …
"""

from __future__ import annotations

import math

from jevt_kernels.codegen import Printer


def parts(tiles: int, steps: int, programs: int) -> int:
    """Parts of a tile, most of them."""
    return max(
        _program_of((tile + 1) * steps - 1, tiles * steps, programs)
        - _program_of(tile * steps, tiles * steps, programs)
        + 1
        for tile in range(tiles)
    )


def group(tiles: int, programs: int) -> int:
    """From one tile to the next that programs are at the same step of: they share operands."""
    return tiles // math.gcd(tiles, programs)


def largest(tiles: int, steps: int, programs: int) -> int:
    """The largest number that occurs in the index arithmetic."""
    return (tiles * steps + 1) * programs


def open_tiles(printer: Printer, tiles: int, steps: int, programs: int) -> None:
    """Prints the start of the loop over a program's tiles ``pid``."""
    line = printer.line
    line("program = tl.program_id(0)")
    line(f"first_step = program * {tiles * steps} // {programs}")
    line(f"end_step = (program + 1) * {tiles * steps} // {programs}")
    printer.open(f"for pid in range(first_step // {steps}, (end_step + {steps - 1}) // {steps}):")


def open_steps(printer: Printer, steps: int) -> None:
    """Prints the start of the loop over a program's steps of tile ``pid``, from ``start`` on."""
    printer.line(f"start = tl.maximum(first_step - pid * {steps}, 0)")
    printer.line(f"stop = tl.minimum(end_step - pid * {steps}, {steps})")
    printer.open("for step in range(start, stop):")


def open_parts(printer: Printer, tiles: int, steps: int, programs: int, most: int) -> None:
    """Prints the start of the loop over parts ``part_pid``: the own one, then those of zeros.

    They are left to the program that has the last piece of the tile.
    """
    total = tiles * steps
    printer.line(f"part = program - ((pid * {steps} + 1) * {programs} - 1) // {total}")
    printer.line(f"past = tl.where(stop == {steps}, {most}, part + 1)")
    printer.open("for part_pid in range(part, past):")


def _program_of(step: int, total: int, programs: int) -> int:
    """The program that a step, of all tiles' steps, belongs to."""
    return ((step + 1) * programs - 1) // total
