"""The kernels of a weighted sum of a table's rows by segments: a CSR matrix times a dense one."""

from __future__ import annotations

import dataclasses

import numpy as np

from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.ops import compute_dtype
from jevt_kernels.spec import KernelSpec, TensorType
from jevt_kernels.visitor import Compute, Load, Lookup, Node, Segment, Store

_INT32 = np.dtype("int32")

#: Positions of a block: what one program adds up of a long row.
BLOCK = 512


def segment_sum(
    rows: int,
    edges: int,
    table: TensorType,
    *,
    weight: TensorType | None = None,
    dtype: np.dtype | None = None,
    fills: bool = False,
    blocks: bool = False,
    name: str = "",
) -> KernelSpec:
    """``out[r] = Σ weights[e] · table[columns[e]]`` over ``bounds[r] <= e < bounds[r + 1]``.

    Args:
      rows: R, rows of the result.
      edges: E, positions.
      table: ``[M, F]``, floating-point.
      weight: ``[E]``, or ``[E, H]``, one for each of H equal parts of a row ("heads"); None for a
        sum without.
      dtype: of the result, the table's by default.
      fills: a column that is no row of the table's counts as a row of 0; every one is, otherwise.
      blocks: sums of blocks of :data:`BLOCK` positions that lie within one row are given.
      name: of the kernel.

    Returns:
      A kernel of bounds ``int32[R + 1]``, columns ``int32[E]``, the table and, if there are any,
      weights, and sums of blocks ``[E // BLOCK, F]``; its result is ``[R, F]``, summed in float32
      (float64 of float64).
    """
    features = table.shape[1]
    heads = weight.shape[1] if weight is not None and len(weight.shape) == 2 else 1
    width = features // heads
    space = Space(
        (rows, heads, width, edges),
        (TileAxis("row", (0,)), TileAxis("col", (1, 2)), TileAxis("edge", (3,))),
    )
    along_edges, along_columns = IndexMap((0, 0, 0, 1)), IndexMap((0, width, 1, 0))
    wide = compute_dtype(dtype or table.dtype)
    tree: list[Node] = [
        Load(1, along_edges),
        Lookup(2, 0, features, along_columns, table.shape[0] if fills else None),
    ]
    inputs = [TensorType((rows + 1,), _INT32), TensorType((edges,), _INT32), table]
    if weight is not None:
        inputs.append(weight)
        tree.append(Load(3, IndexMap((0, 1 if heads > 1 else 0, 0, heads))))
        tree.append(Compute("mul", (1, 2), wide))
    if blocks:
        inputs.append(TensorType((edges // BLOCK, features), wide))
    given = (len(inputs) - 1, BLOCK) if blocks else (None, 0)
    tree.append(Segment(len(tree) - 1, 0, "edge", wide, *given))
    tree.append(Store(0, len(tree) - 1, IndexMap((features, width, 1, 0))))
    return KernelSpec(
        name=name or "segment_sum",
        mainloop="segments",
        space=space,
        tree=tuple(tree),
        inputs=tuple(inputs),
        outputs=(TensorType((rows, features), dtype or table.dtype),),
        comment="out[r] = sum of weights[e] * table[columns[e]], bounds[r] <= e < bounds[r + 1]",
    )


def block_sums(spec: KernelSpec) -> KernelSpec:
    """The kernel that makes the sums of blocks which a :func:`segment_sum` is given.

    Returns:
      A kernel of ``int32[2, E // BLOCK]``, where each block begins and ends (at the same position
      if it is not needed), and the operands of ``spec`` from the columns on, without sums of
      blocks.
    """
    edges, features = spec.space.sizes[3], spec.outputs[0].shape[1]
    (segment,) = (node for node in spec.tree if isinstance(node, Segment))
    rows = edges // BLOCK
    _, heads, width, _ = spec.space.sizes
    contribution = spec.tree[: spec.tree.index(segment)]
    count = len(contribution)
    return dataclasses.replace(
        spec,
        name=f"{spec.name}_blocks",
        space=dataclasses.replace(spec.space, sizes=(rows, heads, width, edges)),
        tree=(
            *contribution,
            dataclasses.replace(segment, blocks=None, length=0),
            Store(0, count, IndexMap((features, width, 1, 0))),
        ),
        inputs=(TensorType((2, rows), _INT32), *spec.inputs[1 : segment.blocks]),
        outputs=(TensorType((rows, features), segment.dtype),),
        comment="the sums of blocks of positions that lie within one row",
    )
