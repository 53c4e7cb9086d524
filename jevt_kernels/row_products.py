"""The kernel of products of rows of two tables: a sampled dense-dense matrix product (SDDMM)."""

from __future__ import annotations

import numpy as np

from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.ops import compute_dtype
from jevt_kernels.spec import KernelSpec, TensorType
from jevt_kernels.visitor import Compute, Load, Lookup, Node, Reduce, Store

_INT32 = np.dtype("int32")


def row_products(
    edges: int,
    tables: tuple[TensorType, TensorType],
    *,
    heads: int = 1,
    dtype: np.dtype,
    fills: tuple[bool, bool] = (False, False),
    name: str = "",
) -> KernelSpec:
    """``out[e, h] = Σ_d a[i[e], h, d] · b[j[e], h, d]``, the gradient of the weights of edges.

    Args:
      edges: E.
      tables: a ``[M, H · D]`` and b ``[N, H · D]``, floating-point.
      heads: H, parts of a row with a sum of their own.
      dtype: of the result.
      fills: whether indices may be no row of a, and of b; such count as a row of 0.
      name: of the kernel.

    Returns:
      A kernel of i and j ``int32[E]``, a and b; its result is ``[E, H]``, summed in float32
      (float64 of float64).
    """
    features = tables[0].shape[1]
    width = features // heads
    space = Space((edges, heads, width), (TileAxis("row", (0, 1)), TileAxis("col", (2,))))
    along_edges, along_columns = IndexMap((1, 0, 0)), IndexMap((0, width, 1))
    wide = compute_dtype(dtype)
    tree: list[Node] = []
    for input_, (table, may_miss) in enumerate(zip(tables, fills, strict=True)):
        tree.append(Load(input_, along_edges))
        rows = table.shape[0] if may_miss else None
        tree.append(Lookup(2 + input_, len(tree) - 1, features, along_columns, rows))
    tree.append(Compute("mul", (1, 3), wide))
    tree.append(Reduce("sum", 4, "col", wide))
    tree.append(Store(0, 5, IndexMap((heads, 1, 0))))
    indices = TensorType((edges,), _INT32)
    return KernelSpec(
        name=name or "row_products",
        mainloop="rowwise",
        space=space,
        tree=tuple(tree),
        inputs=(indices, indices, *tables),
        outputs=(TensorType((edges, heads), dtype),),
        comment="out[e, h] = sum over d of a[i[e], h, d] * b[j[e], h, d]",
    )
