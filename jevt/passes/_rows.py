"""Gathers and scatters along one axis, in one form.

An array indexed along one axis is a table of rows, whatever the order of its axes: the axis comes
first, the others are a row. Axes that the indices go along with (as ``vmap`` makes them of a graph
for each example) come before it, and all tables are stacked to one, whose row ``i`` of table ``b``
has the number ``b · rows + i``.

    array    [batch …, rows, others …]  -> [B · M, W]
    indices  [batch …, others …, 1]     -> int32[B · E]
    updates  [batch …, others …, W …]   -> [B · E, W]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p
from jax.lax import GatherScatterMode as Mode

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph

_INT32 = np.dtype("int32")
MODES = (Mode.PROMISE_IN_BOUNDS, Mode.CLIP, Mode.FILL_OR_DROP)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where rows are in an array that holds one for each index.

    Attributes:
      positions: axes of the indices, in the order in which rows are counted.
      window: axes of a row, in order.
      count: number of rows.
      width: elements of a row.
    """

    positions: tuple[int, ...]
    window: tuple[int, ...]
    count: int
    width: int


@dataclasses.dataclass(frozen=True)
class Access:
    """How indices name parts of an array along one axis.

    Attributes:
      shape: of the array.
      axis: of the array, which the indices name.
      batch: axes of the array that go along with axes of the indices.
      indices: shape of the indices, without the last axis.
      leading: axes of the indices that ``batch`` goes along with, in its order.
      window: axes of the selected parts (a gather's result, a scatter's updates) that are the
        array's other axes, in order.
      single: axes of the selected parts that are the named one, of one element.
      column: which number of each index names the row; None where it is the only one.
    """

    shape: tuple[int, ...]
    axis: int
    batch: tuple[int, ...]
    indices: tuple[int, ...]
    leading: tuple[int, ...]
    window: tuple[int, ...]
    single: tuple[int, ...] = ()
    column: int | None = None

    @property
    def rank(self) -> int:
        """Number of axes of the selected parts."""
        return len(self.indices) + len(self.window) + len(self.single)

    @property
    def tables(self) -> int:
        """B."""
        return math.prod(self.shape[a] for a in self.batch)

    @property
    def rows(self) -> int:
        """M, rows of one table."""
        return self.shape[self.axis]

    @property
    def count(self) -> int:
        """B · E, all indices."""
        return math.prod(self.indices)

    @property
    def width(self) -> int:
        """W, elements of a row."""
        return math.prod(self.shape[a] for a in self.others)

    @property
    def others(self) -> tuple[int, ...]:
        """The axes of the array that make a row."""
        return tuple(a for a in range(len(self.shape)) if a != self.axis and a not in self.batch)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the indices, those of the tables first."""
        rest = (a for a in range(len(self.indices)) if a not in self.leading)
        return (*self.leading, *rest)

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes of the selected parts that are those of the indices, in ``order``."""
        free = [a for a in range(self.rank) if a not in (*self.window, *self.single)]
        return tuple(free[a] for a in self.order)

    def layout(self, places: Sequence[int] | None = None) -> Layout:
        """Where rows are in the selected parts.

        Args:
          places: the axes, of an array that the parts are part of, that theirs are; none other.
        """
        at = places or range(self.rank)
        positions, window = (tuple(at[a] for a in axes) for axes in (self.positions, self.window))
        return Layout(positions, window, self.count, self.width)

    def table(self, array: Atom, graph: Graph) -> Atom:
        """The array as ``[B · M, W]``."""
        moved = transposed(array, (*self.batch, self.axis, *self.others), graph)
        return graph.reshape(moved, (self.tables * self.rows, self.width))

    def array(self, table: Atom, graph: Graph) -> Atom:
        """``[B · M, W]`` as an array of ``shape``."""
        order = (*self.batch, self.axis, *self.others)
        moved = graph.reshape(table, tuple(self.shape[a] for a in order))
        return transposed(moved, [order.index(a) for a in range(len(order))], graph)

    def parts(self, selected: Atom, graph: Graph) -> Atom:
        """The selected parts as ``[B · E, W]``."""
        moved = transposed(selected, (*self.positions, *self.single, *self.window), graph)
        return graph.reshape(moved, (self.count, self.width))

    def numbers(self, indices: Atom, mode: Any, graph: Graph) -> Atom:
        """Numbers of rows of the table, ``int32[B · E]``; ``mode`` is one of ``mode_of``.

        What is out of bounds has the nearest row's number, or no row's.
        """
        if self.column is not None:
            indices = graph.emit(
                p.slice_p,
                indices,
                start_indices=(*(0 for _ in self.indices), self.column),
                limit_indices=(*self.indices, self.column + 1),
                strides=None,
            )
        moved = transposed(graph.reshape(indices, self.indices), self.order, graph)
        if np.dtype(moved.aval.dtype).itemsize < 4:  # type: ignore[attr-defined]
            moved = graph.convert(moved, _INT32)
        aval: Any = moved.aval
        if mode == Mode.CLIP:
            last = graph.literal(self.rows - 1, aval)
            moved = graph.emit(p.clamp_p, graph.literal(0, aval), moved, last)
        elif aval.dtype != _INT32:
            low = -1 if np.issubdtype(aval.dtype, np.signedinteger) else 0
            bounds = graph.literal(low, aval), graph.literal(self.rows, aval)
            moved = graph.emit(p.clamp_p, bounds[0], moved, bounds[1])
        moved = graph.convert(moved, _INT32)
        if self.batch:
            moved = self._of_all_tables(moved, mode, graph)
        return graph.reshape(moved, (self.count,))

    def _of_all_tables(self, index: Atom, mode: Any, graph: Graph) -> Atom:
        shape, aval = shape_of(index), index.aval
        counted = shape[: len(self.batch)]
        first = graph.emit(
            p.iota_p, dtype=_INT32, shape=(math.prod(counted),), dimension=0, sharding=None
        )
        rows = graph.full(graph.literal(self.rows, aval), (math.prod(counted),))
        first = graph.reshape(graph.mul(first, rows), counted)
        first = graph.broadcast(first, shape, tuple(range(len(counted))))
        number = graph.emit(p.add_p, index, first)
        if mode != Mode.FILL_OR_DROP:
            return number
        zero, end, nowhere = (
            graph.full(graph.literal(n, aval), shape)
            for n in (0, self.rows, self.tables * self.rows)
        )
        inside = graph.emit(
            p.and_p, graph.emit(p.ge_p, index, zero), graph.emit(p.lt_p, index, end)
        )
        return graph.emit(p.select_n_p, inside, nowhere, number)


def mode_of(eqn: JaxprEqn) -> Mode:
    """What becomes of a gather's or scatter's indices out of bounds.

    ``x[i]`` promises that there are none, whatever ``i`` is; XLA clips them, as JAX documents, and
    drops those of its gradient.
    """
    mode: Mode = eqn.params["mode"]
    if mode != Mode.PROMISE_IN_BOUNDS:
        return mode
    return Mode.CLIP if eqn.primitive is p.gather_p else Mode.FILL_OR_DROP


def of_gather(eqn: JaxprEqn) -> Access | None:
    """The access of a ``gather``, None unless it takes whole parts along one axis."""
    array, indices = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    return _access(
        shape_of(array),
        shape_of(indices),
        tuple(eqn.params["slice_sizes"]),
        numbers.offset_dims,
        eqn.params["mode"],
        (
            numbers.collapsed_slice_dims,
            numbers.start_index_map,
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
        ),
    )


def of_scatter(eqn: JaxprEqn) -> Access | None:
    """The access of a ``scatter-add``, None unless it adds whole parts along one axis."""
    array, indices, updates = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    shape = shape_of(array)
    single = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    sizes = iter([shape_of(updates)[a] for a in numbers.update_window_dims])
    return _access(
        shape,
        shape_of(indices),
        tuple(1 if a in single else next(sizes) for a in range(len(shape))),
        numbers.update_window_dims,
        eqn.params["mode"],
        (
            numbers.inserted_window_dims,
            numbers.scatter_dims_to_operand_dims,
            numbers.operand_batching_dims,
            numbers.scatter_indices_batching_dims,
        ),
    )


def _access(
    shape: tuple[int, ...],
    indices: tuple[int, ...],
    sizes: tuple[int, ...],
    window: Sequence[int],
    mode: Any,
    numbers: tuple[Sequence[int], ...],
) -> Access | None:
    collapsed, named, batch, leading = (tuple(map(int, part)) for part in numbers)
    # A part that is as long as its axis begins at 0, where its beginning is kept in bounds.
    whole = [a for a in named if sizes[a] == shape[a] and sizes[a] != 1]
    rows = [a for a in named if a not in whole]
    if len(rows) != 1 or (whole and mode not in (Mode.CLIP, Mode.PROMISE_IN_BOUNDS)):
        return None
    (axis,) = rows
    if {*collapsed} - {axis} or indices[-1] != len(named):
        return None
    if any(s != (1 if a in (axis, *batch) else shape[a]) for a, s in enumerate(sizes)):
        return None
    inside = [a for a in range(len(shape)) if a not in (*collapsed, *batch)]
    own = dict(zip(inside, map(int, window), strict=True))
    return Access(
        shape,
        axis,
        batch,
        indices[:-1],
        leading,
        tuple(at for a, at in own.items() if a != axis),
        tuple(at for a, at in own.items() if a == axis),
        named.index(axis) if len(named) > 1 else None,
    )


def transposed(atom: Atom, order: Sequence[int], graph: Graph) -> Atom:
    permutation = tuple(map(int, order))
    if permutation == tuple(range(len(permutation))):
        return atom
    return graph.emit(p.transpose_p, atom, permutation=permutation)
