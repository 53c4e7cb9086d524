"""Reductions along the rows of few columns: of rows side by side, which are wide together.

What a thread loads at once is no wider than a row, unless the tile's rows are several of the
tensor's. Results of these are left to a second kernel, a small one:

    sums of [n, c]  =  sums of [q, c], which are the sums of [n / q, q·c]

On an H100, sums of [33554432, 3] in bfloat16 take 324 µs as they are, of [524288, 192] 71.
"""

from __future__ import annotations

import dataclasses
import math

from jevt_kernels import partials, visitor
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.mainloops.reduction import partial_dtype
from jevt_kernels.spec import KernelSpec, Partial, Stages, Step, TensorType

#: Columns from which on a load is as wide as of many.
FULL = 16

#: Rows side by side at most, a power of two: so many columns are whole blocks of 64.
_MOST = 64

#: Elements from which on a further launch is worth it.
_LEAST = 1 << 20


def beside(columns: int, innermost: int, rows: int) -> int:
    """How many rows are taken as one; 1 where that gains nothing.

    Args:
      columns: of the tensor.
      innermost: size of the last axis of those that are its rows.
      rows: how many there are.
    """
    if not 1 < columns < FULL or rows * columns < _LEAST:
        return 1
    return math.gcd(innermost, _MOST)


def stages(spec: KernelSpec) -> Stages | None:
    """The kernels that compute a columnwise ``spec`` of few columns; None for any other."""
    first = wide(spec)
    if first is None:
        return None
    reduced = _reduced(spec)
    count = first.space.sizes[first.space.tile_axis("col").axes[0]]
    left = [Partial(o, count, node.op, partial_dtype(node)) for o, node in reduced.items()]
    columns = spec.space.extent(spec.space.tile_axis("col"))
    second = partials.combination(spec, left, count, columns).spec
    at, end = len(spec.inputs), len(spec.inputs) + len(spec.outputs)
    results = {output: end + number for number, output in enumerate(reduced)}
    return Stages(
        (
            Step(first, tuple(range(at))),
            Step(second, tuple(at + output for output in reduced)),
        ),
        tuple(results.get(output, at + output) for output in range(len(spec.outputs))),
    )


def wide(spec: KernelSpec) -> KernelSpec | None:
    """The kernel whose rows are several; its reductions have results for each of them."""
    row, col = (spec.space.tile_axis(name) for name in ("row", "col"))
    rows, columns = spec.space.extent(row), spec.space.extent(col)
    count = beside(columns, spec.space.sizes[row.axes[-1]], rows)
    reduced, axis = _reduced(spec), row.axes[-1]
    alike = all(spec.outputs[output].size == columns for output in reduced)
    if count == 1 or not alike or not all(_is_known(spec, node) for node in spec.tree):
        return None

    def cut(index: IndexMap, outer: int, inner: int) -> IndexMap:
        """With one axis as two: positions among the rows taken as one, and these."""
        strides = (*index.strides[:axis], outer, inner, *index.strides[axis + 1 :])
        return dataclasses.replace(index, strides=strides)

    tree: list[visitor.Node] = []
    for node in spec.tree:
        if isinstance(node, visitor.Store) and node.output in reduced:
            size = spec.outputs[node.output].size
            node = dataclasses.replace(node, index=cut(node.index, 0, size))
        elif isinstance(node, visitor.Load | visitor.Iota | visitor.Store):
            stride = node.index.strides[axis]
            node = dataclasses.replace(node, index=cut(node.index, stride * count, stride))
        elif isinstance(node, visitor.Reduce):
            node = dataclasses.replace(node, dtype=partial_dtype(node))
        tree.append(node)
    outputs = list(spec.outputs)
    for output, node in reduced.items():
        shape = (count, *spec.outputs[output].shape)
        outputs[output] = TensorType(shape, partial_dtype(node))
    return dataclasses.replace(
        spec,
        space=_cut(spec.space, axis, count),
        tree=tuple(tree),
        outputs=tuple(outputs),
        aliases=tuple(pair for pair in spec.aliases if pair[1] not in reduced),
    )


def _cut(space: Space, axis: int, count: int) -> Space:
    """The space with an axis of rows as two, the second of which belongs to the columns."""
    sizes = (*space.sizes[:axis], space.sizes[axis] // count, count, *space.sizes[axis + 1 :])
    axes = {tile.name: tuple(a + (a > axis) for a in tile.axes) for tile in space.tile}
    axes["col"] = (axis + 1, *axes["col"])
    return Space(sizes, tuple(TileAxis(tile.name, axes[tile.name]) for tile in space.tile))


def _reduced(spec: KernelSpec) -> dict[int, visitor.Reduce]:
    """The outputs that are reductions."""
    found: dict[int, visitor.Reduce] = {}
    for node in spec.tree:
        if isinstance(node, visitor.Store):
            value = spec.tree[node.operand]
            if isinstance(value, visitor.Reduce):
                found[node.output] = value
    return found


def _is_known(spec: KernelSpec, node: visitor.Node) -> bool:
    """Whether a node has one meaning with one row and with several."""
    match node:
        case visitor.Store():
            # What a row's columns are made of alone is stored once, not once for each row.
            rows = spec.space.tile_axis("row")
            return isinstance(spec.tree[node.operand], visitor.Reduce) or node.index.depends_on(
                rows
            )
        case visitor.Reduce():
            return node.over == "row"
        case visitor.Load() | visitor.Iota() | visitor.Compute() | visitor.Constant():
            return True
        case _:
            return False
