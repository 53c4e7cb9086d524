"""``scatter-add`` of rows as sums of segments, without atomic additions. For GPUs.

Purpose: aggregation on a graph and the gradient of a lookup add many rows to rows that indices
name. XLA adds each element atomically, which in bfloat16 is a loop of compare-and-swap, and writes
the rows to be added to memory first. Sorting the indices makes the additions to one row neighbours:
one program adds them up in float32, reading the table that the rows came from. Indices are sorted
once however often they are used.

    scatter_add(0[R, F], i, w·table[c]) = segment_sum(bounds(i), c[order(i)], table, w[order(i)])

Invariant: the same sums, each rounded once and in an order that does not change from run to run.
An index outside of the result adds nothing (CLIP: to the nearest row), as in the scatter. Left
alone: few updates, for which sorting is not worth it, and updates that are not floating-point.

    before  { lambda ; a:f32[9,4] b:i32[50,1] c:i32[50,1] d:f32[50]. let
                e:f32[50,4] = gather[PROMISE_IN_BOUNDS] a b; f:f32[50,1] = reshape d
                g:f32[50,4] = mul e f; h:f32[9,4] = broadcast_in_dim 0.0
                i:f32[9,4] = scatter-add h c g in (i,) }
    after   { lambda ; a:f32[9,4] b:i32[50,1] c:i32[50,1] d:f32[50]. let
                e:i32[50] = reshape c; f:i32[50] = segment_order e
                g:i32[10] = segment_bounds[rows=9] e f; h:i32[50] = reshape b
                i:i32[50] = gather h f; j:f32[50] = gather d f
                k:f32[9,4] = segment_sum g i a j in (k,) }
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import primitives as p
from jax.lax import GatherDimensionNumbers
from jax.lax import GatherScatterMode as Mode

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph, Rule, rewrite
from jevt.passes._scatters import adds_rows, row_numbers
from jevt.primitives.segments import segment_bounds_p, segment_order_p, segment_sum_p

#: Fewest updates, in elements: below, sorting costs more than the additions.
MIN_UPDATES = 1 << 20

_FLOATS = (jax.numpy.bfloat16, np.float16, np.float32, np.float64)
_ROW_OF = GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
_ELEMENT_OF = GatherDimensionNumbers(
    offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
)


def run(jaxpr: Jaxpr, capability: int, smallest: int = MIN_UPDATES) -> Jaxpr:
    """Rewrites scatters of ``jaxpr`` and of its bodies.

    Args:
      jaxpr: the program.
      capability: compute capability of the GPU, 90 for sm_90.
      smallest: number of elements of the updates from which on.
    """
    return rewrite(jaxpr, {p.scatter_add_p: (_rule(capability, smallest),)})


def _rule(capability: int, smallest: int) -> Rule:
    def scatter_add(eqn: JaxprEqn, graph: Graph) -> Atom | None:
        into, indices, updates = eqn.invars
        out: Any = eqn.outvars[0].aval
        if graph.constant(into) != 0 or not adds_rows(eqn) or out.dtype not in _FLOATS:
            return None
        count, width = math.prod(shape_of(indices)[:-1]), math.prod(out.shape[1:])
        if count * width < smallest or not 0 < out.shape[0] < 2**31 or not 1 < count < 2**31:
            return None
        index = row_numbers(eqn, graph)
        if index is None:
            return None
        table, columns, weights, fills = _source(updates, count, width, graph)
        if fills and columns is not None:
            index = _dropped(index, columns, shape_of(table)[0], out.shape[0], graph)
        order = graph.emit(segment_order_p, index)
        bounds = graph.emit(segment_bounds_p, index, order, rows=out.shape[0])
        columns = order if columns is None else _permuted(columns, order, graph)
        total = graph.emit(
            segment_sum_p,
            bounds,
            columns,
            table,
            *(_permuted(w, order, graph) for w in weights),
            capability=capability,
        )
        return graph.reshape(total, out.shape)

    return scatter_add


def _source(
    updates: Atom, count: int, width: int, graph: Graph
) -> tuple[Atom, Atom | None, tuple[Atom, ...], bool]:
    """What the updates are made of.

    A table, the row of each update (None: its own), weights, and whether the update of a row that
    the table does not have is 0.
    """
    if len(shape_of(updates)) == 2:
        for rows, weights in ((updates, ()), *_weighted(updates, graph)):
            found = _gathered(rows, count, width, graph)
            if found is not None:
                table, columns, fills = found
                return table, columns, weights, fills
    return graph.reshape(updates, (count, width)), None, (), False


def _weighted(updates: Atom, graph: Graph) -> list[tuple[Atom, tuple[Atom, ...]]]:
    """The ways to read a product as rows times one weight each."""
    product = graph.definition(updates, p.mul_p)
    if product is None or product.params.get("out_dtype") is not None:
        return []
    x, y = product.invars
    found: list[tuple[Atom, tuple[Atom, ...]]] = []
    for rows, factor in ((x, y), (y, x)):
        if shape_of(rows) != shape_of(updates):
            continue
        count = shape_of(updates)[0]
        if shape_of(factor) == (count, 1):
            found.append((rows, (graph.reshape(factor, (count,)),)))
            continue
        spread = graph.definition(factor, p.broadcast_in_dim_p)
        if spread is not None and spread.params["broadcast_dimensions"] in ((0,), (0, 1)):
            weight = spread.invars[0]
            if math.prod(shape_of(weight)) == count and shape_of(weight)[:1] == (count,):
                found.append((rows, (graph.reshape(weight, (count,)),)))
    return found


def _gathered(rows: Atom, count: int, width: int, graph: Graph) -> tuple[Atom, Atom, bool] | None:
    """The table and the row numbers of a lookup of whole rows, and whether it fills with 0."""
    lookup = graph.definition(rows, p.gather_p)
    if lookup is None or lookup.params["dimension_numbers"] != _ROW_OF:
        return None
    table, indices = lookup.invars
    table_aval: Any = table.aval
    index_aval: Any = indices.aval
    sizes = tuple(lookup.params["slice_sizes"])
    if sizes != (1, width) or table_aval.shape[1] != width or index_aval.shape != (count, 1):
        return None
    if table_aval.shape[0] >= 2**31 or np.dtype(index_aval.dtype) != np.int32:
        return None
    columns = graph.reshape(indices, (count,))
    match lookup.params["mode"]:
        case Mode.PROMISE_IN_BOUNDS:
            return table, columns, False
        case Mode.CLIP:
            last = graph.literal(table_aval.shape[0] - 1, index_aval)
            clipped = graph.emit(p.clamp_p, graph.literal(0, index_aval), columns, last)
            return table, clipped, False
        case Mode.FILL_OR_DROP if lookup.params["fill_value"] == 0:
            return table, columns, True
    return None


def _dropped(index: Atom, columns: Atom, table_rows: int, rows: int, graph: Graph) -> Atom:
    """The indices, those of updates that the table has no row for beyond the result's end."""
    aval: Any = columns.aval
    end: Any = index.aval
    zero = graph.full(graph.literal(0, aval), aval.shape)
    stop = graph.full(graph.literal(table_rows, aval), aval.shape)
    inside = graph.emit(
        p.and_p, graph.emit(p.ge_p, columns, zero), graph.emit(p.lt_p, columns, stop)
    )
    beyond = graph.full(graph.literal(rows, end), end.shape)
    return graph.emit(p.select_n_p, inside, beyond, index)


def _permuted(values: Atom, order: Atom, graph: Graph) -> Atom:
    """``values[order]``."""
    (count,) = shape_of(order)
    return graph.emit(
        p.gather_p,
        values,
        graph.reshape(order, (count, 1)),
        dimension_numbers=_ELEMENT_OF,
        slice_sizes=(1,),
        indices_are_sorted=False,
        unique_indices=True,
        mode=Mode.PROMISE_IN_BOUNDS,
        fill_value=None,
    )
