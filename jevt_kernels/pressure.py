"""How many registers a kernel's tile wants: the values that are alive at one time.

A tile's values are in registers. What a thread cannot hold goes to local memory and back, which for
a kernel with dozens of operands costs more than its fusion saves. Values are counted as the printer
orders them: reductions first, then stores, each with what it needs and was not there yet. The
compiler may order loads better, so this is an upper bound, and the limit on it is a loose one.
"""

from __future__ import annotations

import math

from jevt_kernels import visitor
from jevt_kernels.mainloops import MAINLOOPS
from jevt_kernels.spec import Config, KernelSpec

#: Registers that a kernel may want, twice what a thread has. Groups of the five workloads want 240
#: at most; what wants 1000 spills 14 KB a thread (sm_90, 60 operands and a sum along their rows).
MOST = 512

#: Mainloops whose tiles are values of the visitor tree alone. The tiles of matrix products are
#: chosen by what their accumulators leave (``mainloops/gemm_configs.py``), and their epilogue is
#: computed value by value.
_COUNTED = frozenset({"pointwise", "rowwise", "columnwise"})


def least(spec: KernelSpec) -> int:
    """What the configuration wants that wants the fewest; 0 for a mainloop that sees to it itself.

    A row too long to be on chip is loaded again for each loop over it, so nothing of it stays.
    """
    if spec.mainloop not in _COUNTED:
        return 0
    configs = MAINLOOPS[spec.mainloop].configs(spec)
    return min(0 if _looped(spec, config) else registers(spec, config) for config in configs)


def _looped(spec: KernelSpec, config: Config) -> bool:
    if spec.mainloop != "rowwise":
        return False
    return config.block("col") < spec.space.extent(spec.space.tile_axis("col"))


def registers(spec: KernelSpec, config: Config) -> int:
    """32-bit registers that a thread wants for full tiles that are alive at one time.

    Args:
      spec: a pointwise, rowwise or columnwise kernel.
      config: its tile and warps.
    """
    order = _printed(spec.tree)
    rank = {position: number for number, position in enumerate(order)}
    last = dict(rank)
    for position in order:
        for operand in visitor.operands(spec.tree[position]):
            last[operand] = max(last[operand], rank[position])
    full = frozenset(axis.name for axis in spec.space.tile)
    varies = visitor.dependencies(spec.tree, spec.space)
    change = [0] * (len(order) + 1)
    for position in order:
        node = spec.tree[position]
        accumulates = isinstance(node, visitor.Reduce) and node.over == "row"
        if isinstance(node, visitor.Store) or not (varies[position] == full or accumulates):
            continue
        size = 4
        if isinstance(node, visitor.Load):
            size = spec.inputs[node.input].dtype.itemsize
        elif isinstance(node, visitor.Compute):
            size = node.dtype.itemsize
        # A sum along rows is kept as a tile from the first block of rows to the last.
        change[0 if accumulates else rank[position]] += size
        change[len(order) if accumulates else last[position]] -= size
    alive = most = 0
    for step in change:
        alive += step
        most = max(most, alive)
    elements = math.prod(size for _, size in config.blocks)
    return math.ceil(most * elements / (32 * config.num_warps) / 4)


def _printed(tree: visitor.Tree) -> tuple[int, ...]:
    """Positions in the order in which the printer comes to them."""
    roots = [p for p, node in enumerate(tree) if isinstance(node, visitor.Reduce)]
    roots += [p for p, node in enumerate(tree) if isinstance(node, visitor.Store)]
    return visitor.as_printed(tree, *roots)
