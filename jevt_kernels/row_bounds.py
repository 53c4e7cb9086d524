"""The kernel that finds where rows begin in ascending numbers of rows: a binary search for each."""

from __future__ import annotations

import numpy as np

from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.spec import KernelSpec, TensorType
from jevt_kernels.visitor import Compute, Constant, Iota, Lookup, Node, Store

_INT32, _BOOL = np.dtype("int32"), np.dtype(bool)

#: Where a thread's number is, and a place that does not depend on it.
_OWN, _NOWHERE = IndexMap((1,)), IndexMap((0,))


def row_bounds(edges: int, rows: int, *, name: str = "") -> KernelSpec:
    """``bounds[r]``, how many of the numbers are less than ``r``.

    With a step of each power of two, from the largest on, a thread goes forward if the number that
    it would leave behind is less than its row.

    Args:
      edges: E, number of ascending numbers, from 1 to 2**31 - 1.
      rows: R.
      name: of the kernel.

    Returns:
      A kernel of ``int32[E]``; its result is ``int32[R + 1]``.

    Raises:
      ValueError: if there are no numbers, or too many.
    """
    if not 0 < edges < 1 << 31:
        raise ValueError(f"row_bounds: expected from 1 to 2**31 - 1 numbers, got {edges}")
    tree: list[Node] = []

    def add(node: Node) -> int:
        tree.append(node)
        return len(tree) - 1

    def compute(op: str, *operands: int, dtype: np.dtype = _INT32) -> int:
        return add(Compute(op, operands, dtype))

    row, one, last = (
        add(Iota(_OWN, _INT32)),
        add(Constant(1, _INT32)),
        add(Constant(edges, _INT32)),
    )
    found = add(Iota(_NOWHERE, _INT32))
    for power in reversed(range(edges.bit_length())):
        ahead = compute("add", found, add(Constant(1 << power, _INT32)))
        left = compute("sub", compute("min", ahead, last), one)
        number = add(Lookup(0, left, 1, _NOWHERE))
        less = compute("lt", number, row, dtype=_BOOL)
        inside = compute("le", ahead, last, dtype=_BOOL)
        found = compute("select_n", compute("and", less, inside, dtype=_BOOL), found, ahead)
    add(Store(0, found, _OWN))
    return KernelSpec(
        name=name or "row_bounds",
        mainloop="pointwise",
        space=Space((rows + 1,), (TileAxis("i", (0,)),)),
        tree=tuple(tree),
        inputs=(TensorType((edges,), _INT32),),
        outputs=(TensorType((rows + 1,), _INT32),),
        comment="bounds[r] = how many of ascending numbers are less than r",
    )
