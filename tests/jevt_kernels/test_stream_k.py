"""How stream-K divides the steps of tiles: what is printed, carried out in Python."""

from __future__ import annotations

import collections
import types

import pytest

from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops import stream_k

SHAPES = [
    (72, 512, 132),
    (1, 300, 132),
    (5, 7, 35),
    (18, 512, 132),
    (3, 11, 4),
    (131, 64, 132),
    (6, 6, 1),
]


class _Text:
    """A printer of lines alone."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def open(self, text: str) -> None:
        self.line(text)
        self.depth += 1

    def close(self) -> None:
        self.depth -= 1


def walked(tiles: int, steps: int, programs: int) -> list[tuple[int, int, int, list[int]]]:
    """(program, tile, part, its steps) of what is stored, as the text goes."""
    text = _Text()
    printer: Printer = text  # type: ignore[assignment] - it prints lines only
    most = stream_k.parts(tiles, steps, programs)
    stream_k.open_tiles(printer, tiles, steps, programs)
    text.line("mine = []")
    stream_k.open_steps(printer, steps)
    text.line("mine.append(step)")
    text.close()
    stream_k.open_parts(printer, tiles, steps, programs, most)
    text.line("found.append((program, pid, part_pid, mine if part_pid == part else []))")
    found: list[tuple[int, int, int, list[int]]] = []
    for program in range(programs):
        tl = types.SimpleNamespace(
            program_id=lambda axis, program=program: program,
            minimum=min,
            maximum=max,
            where=lambda condition, yes, no: yes if condition else no,
        )
        exec("\n".join(text.lines), {"tl": tl, "found": found})
    return found


@pytest.mark.parametrize(("tiles", "steps", "programs"), SHAPES)
def test_every_step_is_in_one_part(tiles: int, steps: int, programs: int) -> None:
    done: dict[tuple[int, int], int] = {}
    work: collections.Counter[int] = collections.Counter()
    written: list[tuple[int, int]] = []
    for program, tile, part, mine in walked(tiles, steps, programs):
        written.append((tile, part))
        work[program] += len(mine)
        for step in mine:
            assert (tile, step) not in done
            done[tile, step] = part
    assert len(done) == tiles * steps
    assert max(work.values()) - min(work.values()) <= 1, "programs have as much to do"
    most = stream_k.parts(tiles, steps, programs)
    assert sorted(written) == [(tile, part) for tile in range(tiles) for part in range(most)]
    for tile in range(tiles):  # in the order of k
        order = [done[tile, step] for step in range(steps)]
        assert order == sorted(order)


def test_programs_at_the_same_step_have_neighbouring_tiles() -> None:
    every = stream_k.group(72, 132)
    assert every == 6
    firsts: dict[int, list[int]] = {tile: [] for tile in range(72)}
    for _, tile, _, mine in walked(72, 512, 132):
        if mine:
            firsts[tile].append(mine[0])
    assert all(firsts[tile] == firsts[tile % every] for tile in firsts)
