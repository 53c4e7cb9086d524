"""The kernel of a weighted sum of a table's rows by segments: a CSR matrix times a dense one."""

from __future__ import annotations

import numpy as np

from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.ops import compute_dtype
from jevt_kernels.spec import KernelSpec, TensorType
from jevt_kernels.visitor import Compute, Load, Lookup, Node, Segment, Store


def segment_sum(
    rows: int, edges: int, table: TensorType, *, weight: np.dtype | None = None, name: str = ""
) -> KernelSpec:
    """``out[r] = Σ weights[e] · table[columns[e]]`` over ``bounds[r] <= e < bounds[r + 1]``.

    Args:
      rows: R, rows of the result.
      edges: E, positions.
      table: ``[M, F]``, floating-point.
      weight: dtype of the weights, None for a sum without.
      name: of the kernel.

    Returns:
      A kernel of bounds ``int32[R + 1]``, columns ``int32[E]``, the table and, if there are any,
      weights ``[E]``; its result is ``[R, F]`` of the table's dtype, summed in float32 (float64 of
      float64).
    """
    features = table.shape[1]
    index = np.dtype("int32")
    space = Space(
        (rows, features, edges),
        (TileAxis("row", (0,)), TileAxis("col", (1,)), TileAxis("edge", (2,))),
    )
    along_edges, along_columns = IndexMap((0, 0, 1)), IndexMap((0, 1, 0))
    wide = compute_dtype(table.dtype)
    tree: list[Node] = [Load(1, along_edges), Lookup(2, 0, features, along_columns)]
    inputs = [TensorType((rows + 1,), index), TensorType((edges,), index), table]
    if weight is not None:
        inputs.append(TensorType((edges,), weight))
        tree.append(Load(3, along_edges))
        tree.append(Compute("mul", (1, 2), wide))
    tree.append(Segment(len(tree) - 1, 0, "edge", wide))
    tree.append(Store(0, len(tree) - 1, IndexMap((features, 1, 0))))
    return KernelSpec(
        name=name or "segment_sum",
        mainloop="segments",
        space=space,
        tree=tuple(tree),
        inputs=tuple(inputs),
        outputs=(TensorType((rows, features), table.dtype),),
        comment="out[r] = sum of weights[e] * table[columns[e]], bounds[r] <= e < bounds[r + 1]",
    )
