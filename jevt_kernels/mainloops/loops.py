"""The loops over a row that is not held on chip: what each makes and reads, and what is alive."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.mainloops.passes import Passes, passes
from jevt_kernels.mainloops.picks import picks
from jevt_kernels.mainloops.sweep import in_groups
from jevt_kernels.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class Loops:
    """The loops over a row.

    Attributes:
      plan: its passes; each has a loop.
      wide: stores that run along the row.
      last: the loop that makes them, one more than there are passes if all have to be over.
      roots: the operands of each loop's reductions and stores.
      sums: the reductions of each loop whose accumulators are full tiles.
      reads: the loads of each loop.
    """

    plan: Passes
    wide: tuple[int, ...]
    last: int
    roots: tuple[tuple[int, ...], ...]
    sums: tuple[tuple[int, ...], ...]
    reads: tuple[frozenset[visitor.Load], ...]

    @property
    def tiles(self) -> int:
        """Full tiles of a loop, most of them: what it loads, and accumulators."""
        return max((len(r) + len(s) for r, s in zip(self.reads, self.sums, strict=True)), default=0)


@functools.lru_cache(maxsize=1024)
def loops(spec: KernelSpec) -> Loops:
    """The loops that a rowwise kernel needs if it does not hold its rows."""
    plan, col = passes(spec, free=picks(spec)), spec.space.tile_axis("col")
    wide = tuple(
        position
        for position, node in enumerate(spec.tree)
        if isinstance(node, visitor.Store) and node.index.depends_on(col)
    )
    stored = [o for position in wide for o in visitor.operands(spec.tree[position])]
    last = len(plan.of) - 1
    if any(plan.known[o] > last for o in stored):
        last = len(plan.of)
    roots = [[visitor.operands(spec.tree[p])[0] for p in one] for one in plan.of]
    sums = [
        tuple(p for p in one if p not in in_groups(spec, plan, number))
        for number, one in enumerate(plan.of)
    ]
    if wide and last == len(plan.of):
        roots.append([])
        sums.append(())
    if wide:
        roots[last] = [*roots[last], *stored]
    reads = tuple(_read(spec, each) for each in roots)
    return Loops(plan, wide, last, tuple(map(tuple, roots)), tuple(sums), reads)


def _read(spec: KernelSpec, roots: list[int]) -> frozenset[visitor.Load]:
    """The loads of full tiles that values are made of, given all reductions."""
    col, read = spec.space.tile_axis("col"), set[visitor.Load]()
    for position in visitor.ancestors(spec.tree, *roots, known=(visitor.Reduce,)):
        node = spec.tree[position]
        if isinstance(node, visitor.Load) and node.index.depends_on(col):
            read.add(node)
    return frozenset(read)


@functools.lru_cache(maxsize=1024)
def alive(spec: KernelSpec) -> int:
    """32-bit values for each element of a tile that are alive at one time in a loop, the most.

    What is loaded counts as it is stored. What is made of positions and of a row's numbers alone is
    made where it is used.
    """
    found = loops(spec)
    return max((_alive(spec, found, number) for number in range(len(found.roots))), default=0)


def _alive(spec: KernelSpec, found: Loops, number: int) -> int:
    order = visitor.as_printed(spec.tree, *found.roots[number], known=(visitor.Reduce,))
    rank = {position: at for at, position in enumerate(order)}
    last = dict(rank)
    for position in order:
        if not isinstance(spec.tree[position], visitor.Reduce):
            for operand in visitor.operands(spec.tree[position]):
                last[operand] = max(last[operand], rank[position])
    # A result takes its last operand's place, but not that of what is added to an accumulator.
    added = {visitor.operands(spec.tree[position])[0] for position in found.sums[number]}
    change = [0] * (len(order) + 2)
    for position in order:
        size = _bytes(spec, position)
        change[rank[position]] += size
        change[last[position] + (position in added)] -= size
    now = most = 0
    for step in change:
        now += step
        most = max(most, now)
    return len(found.sums[number]) + math.ceil(most / 4)


def _bytes(spec: KernelSpec, position: int) -> int:
    """Bytes of a value for each element, inside a loop."""
    node, col = spec.tree[position], spec.space.tile_axis("col")
    if isinstance(node, visitor.Load):
        return spec.inputs[node.input].dtype.itemsize if node.index.depends_on(col) else 0
    if not isinstance(node, visitor.Compute) or node.dtype == np.dtype(bool):
        return 0
    return max(4, node.dtype.itemsize) if _read(spec, [position]) else 0
