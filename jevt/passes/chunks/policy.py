"""Whether logits are computed in chunks of rows, and of how many.

A chunk less costs nothing but memory: the same products run on fewer rows, which cuBLAS does as
fast from a few thousand on, and the sums of chunks, the gradients of weights, are read and written
once more each. With D hidden features, V classes and C rows a chunk that is 8·D·V bytes beside
6·C·D·V operations: 7 % of the products' time with 4096 rows on an H100, whatever D and V.
"""

from __future__ import annotations

import dataclasses
import math

from jevt._context import Device
from jevt._jaxpr import Atom, aval
from jevt.passes._facts import shape_of
from jevt.passes.chunks.region import Head, Region
from jevt.passes.chunks.rows import accumulator

#: Logits and their gradient are left whole where they take less than this part of the memory.
SHARE = 1 / 16

#: They are computed twice, where that is a way, if they take more than this part.
TWICE_SHARE = 4 * SHARE

#: Chunks are as long as lets theirs take this part.
CHUNK_SHARE = SHARE / 4

#: But no shorter than this, or hardly.
MIN_ROWS = 4096

#: Chunks that are equally long are worth this many times as many of them.
_EVEN = 2

#: Chunks, but for the last, have a multiple of this many rows: products are faster so.
ALIGNED = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a region runs.

    Attributes:
      rows: of a chunk; the last may have fewer.
      chunks: their number.
      whole: bytes of the logits and of what products read of their size, without chunks.
      part: the same of one chunk.
      microseconds: predicted, of reading and writing the sums again.
    """

    rows: int
    chunks: int
    whole: int
    part: int
    microseconds: float


def is_candidate(head: Head, device: Device) -> bool:
    """Whether there are rows for two chunks, and logits that could be too large."""
    return head.rows >= 2 * MIN_ROWS and may_be_large(head.logits, device)


def may_be_large(atom: Atom, device: Device) -> bool:
    """Whether logits of this size could be too large with what is computed from them."""
    return 4 * _bytes(atom) > SHARE * device.memory_bytes


def is_worth_twice(head: Head, device: Device) -> bool:
    """Whether logits are so large that they may be computed a second time."""
    return 2 * _bytes(head.logits) > TWICE_SHARE * device.memory_bytes


def choose(region: Region, device: Device) -> Choice | None:
    """The chunks of a region; None where memory does not ask for any."""
    rows = region.head.rows
    whole = sum(map(_bytes, region.stored()))
    if whole <= SHARE * device.memory_bytes:
        return None
    chunk = chunk_rows(rows, round(CHUNK_SHARE * device.memory_bytes * rows / whole))
    chunks = math.ceil(rows / chunk)
    sums = [v for at in region.sums for v in region.program.eqns[at].outvars]
    moved = sum(2 * accumulator(v).itemsize * math.prod(shape_of(v)) for v in sums)
    launches = len(sums) * device.xla_launch_us
    time = chunks * (moved / device.bytes_per_us + launches)
    return Choice(chunk, chunks, whole, whole * chunk // rows, time)


def chunk_rows(rows: int, wanted: int) -> int:
    """The rows of a chunk, of so many rows, for ``wanted`` of them or a few less or more."""
    fewest = max(2, rows // max(MIN_ROWS, wanted))
    for chunks in range(fewest, _EVEN * fewest + 1):
        chunk, left = divmod(rows, chunks)
        if not left and chunk % ALIGNED == 0 and 4 * chunk >= 3 * MIN_ROWS:
            return chunk
    return math.ceil(rows / fewest / ALIGNED) * ALIGNED


def _bytes(atom: Atom) -> int:
    return math.prod(shape_of(atom)) * aval(atom).dtype.itemsize
