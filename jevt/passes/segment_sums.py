"""``scatter-add`` of rows as sums of segments, without atomic additions. For GPUs.

Purpose: aggregation on a graph and the gradient of a lookup add many rows to rows that indices
name. XLA adds each element atomically, which in bfloat16 is a loop of compare-and-swap, and writes
the rows to be added to memory first. Sorting the indices makes the additions to one row neighbours:
one program adds them up in float32, reading the table that the rows came from. Indices are sorted
once however often they are used, and not at all where the scatter says that they are, or where a
matrix is in CSR form.

    scatter_add(x, i, w·t[c])            = x + segment_sum(bounds(i), c[o], t, w[o]), o = order(i)
    scatter_add(x, i, where(m, w·t[c], 0)): a mask of edges is one of c (``masked_lookups``)
    scatter_add(0, i, 1)                 = bounds(i)[1:] - bounds(i)[:-1]
    bcsr_dot_general(data, c, indptr, x) = segment_sum(indptr, c, x, data)

Invariant: the same sums, each rounded once and in an order that does not change from run to run.
An index outside of the result adds nothing (CLIP: to the nearest row), as in the scatter; one that
looks up beyond the table takes the nearest row, as in the gather (FILL_OR_DROP: a row of 0). Left
alone: few updates, for which sorting is not worth it, updates that are not floating-point, indices
that are known to differ from one another, and rows that are many more than the indices.

    before  { lambda ; a:f32[9,4] b:i32[50,1] c:i32[50,1] d:f32[50]. let
                e:f32[50,4] = gather[PROMISE_IN_BOUNDS] a b; f:f32[50,1] = reshape d
                g:f32[50,4] = mul e f; h:f32[9,4] = broadcast_in_dim 0.0
                i:f32[9,4] = scatter-add h c g in (i,) }
    after   { lambda ; a:f32[9,4] b:i32[50,1] c:i32[50,1] d:f32[50]. let
                e:i32[50] = reshape c; f:i32[50] = segment_order e
                g:i32[10] = segment_bounds[rows=9] e f; h:i32[2,0] = segment_blocks[edges=50] g
                i:i32[50] = clamp 0 (reshape b) 8; j:i32[50] = gather i f
                k:f32[50] = gather d f; l:f32[9,4] = segment_sum g h j a k in (l,) }
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental.sparse import bcsr_dot_general_p
from jax.extend.core import Jaxpr, JaxprEqn, Primitive
from jax.extend.core import primitives as p
from jax.lax import GatherDimensionNumbers
from jax.lax import GatherScatterMode as Mode

from jevt._jaxpr import Atom
from jevt.passes import _rows, _terms, masked_lookups
from jevt.passes._facts import shape_of
from jevt.passes._remarks import Note, Remarks
from jevt.passes._rows import transposed
from jevt.passes._rules import Graph, Rule, rewrite
from jevt.primitives.segments import (
    segment_blocks_p,
    segment_bounds_p,
    segment_order_p,
    segment_sum_p,
)
from jevt_kernels.segment_sum import BLOCK

#: Fewest updates, in elements: below, sorting costs more than the additions.
MIN_UPDATES = 1 << 20

#: Most rows for each index: what is added to is read and written as a whole.
_MOST_ROWS = 4

_FLOATS = (jax.numpy.bfloat16, np.float16, np.float32, np.float64)
_LARGEST = 2**31 - BLOCK


def run(
    jaxpr: Jaxpr, capability: int, note: Note = lambda _: None, smallest: int = MIN_UPDATES
) -> Jaxpr:
    """Rewrites scatters, and products with CSR matrices, of ``jaxpr`` and of its bodies.

    Args:
      jaxpr: the program.
      capability: compute capability of the GPU, 90 for sm_90.
      note: receives a line for each reason for which such sums stay, or their terms are made.
      smallest: number of elements of the terms from which on.
    """
    this = _Run(capability, smallest)
    rules: dict[Primitive, tuple[Rule, ...]] = {
        p.scatter_add_p: (this.scatter_add,),
        bcsr_dot_general_p: (this.bcsr_dot_general,),
        p.select_n_p: (masked_lookups.rule(smallest),),
    }
    result = rewrite(jaxpr, rules)
    this.remarks.tell(note)
    return result


class _Run:
    """One run of the pass.

    Attributes:
      remarks: what stays, and why.
    """

    def __init__(self, capability: int, smallest: int) -> None:
        self.capability = capability
        self.smallest = smallest
        self.remarks = Remarks()

    def scatter_add(self, eqn: JaxprEqn, graph: Graph) -> Atom | None:
        into, indices, updates = eqn.invars
        out: Any = eqn.outvars[0].aval
        if math.prod(shape_of(updates)) < self.smallest or out.dtype not in _FLOATS:
            return None
        access = _rows.of_scatter(eqn)
        reason = _obstacle(eqn, access)
        if access is None or reason:
            self.remarks.add(eqn, "the scatter that adds", f" stays: {reason}")
            return None
        rows = access.tables * access.rows
        index = access.numbers(indices, _rows.mode_of(eqn), graph)
        ascends = eqn.params["indices_are_sorted"] and not access.batch
        order = () if ascends else (graph.emit(segment_order_p, index),)
        capability = self.capability
        bounds = graph.emit(segment_bounds_p, index, *order, rows=rows, capability=capability)
        number = graph.constant(updates)
        if number is not None and np.isfinite(number):
            total = _counted(bounds, number, (rows, access.width), out.dtype, graph)
        else:
            terms = _terms.read(updates, access, out.dtype, graph)
            if terms.reason:
                made = f" are made: {terms.reason}"
                self.remarks.add(eqn, "the terms of the sum of segments", made)
            total = self._sum(bounds, order, access.count, terms, out.dtype, graph)
        total = access.array(total, graph)
        return total if graph.constant(into) == 0 else graph.emit(p.add_p, into, total)

    def _sum(
        self,
        bounds: Atom,
        order: tuple[Atom, ...],
        edges: int,
        terms: _terms.Terms,
        dtype: Any,
        graph: Graph,
    ) -> Atom:
        columns = terms.columns
        if columns is not None:
            columns = _permuted(columns, order, graph)
        elif order:
            columns = order[0]
        else:
            columns = graph.emit(
                p.iota_p, dtype=np.dtype("int32"), shape=(edges,), dimension=0, sharding=None
            )
        weights = () if terms.weight is None else (_permuted(terms.weight, order, graph),)
        return graph.emit(
            segment_sum_p,
            bounds,
            graph.emit(segment_blocks_p, bounds, edges=edges),
            columns,
            terms.table,
            *weights,
            dtype=np.dtype(dtype),
            fills=terms.fills,
            capability=self.capability,
        )

    def bcsr_dot_general(self, eqn: JaxprEqn, graph: Graph) -> Atom | None:
        data, indices, indptr, dense = eqn.invars
        out: Any = eqn.outvars[0].aval
        (_, (contracted,)), _ = eqn.params["dimension_numbers"]
        sizes, edges = shape_of(dense), shape_of(indices)[-1]
        width = math.prod(sizes) // max(1, sizes[contracted])
        if not is_plain_csr(eqn) or out.dtype not in _FLOATS or edges * width < self.smallest:
            return None
        if not 1 < edges < _LARGEST or not 0 < sizes[contracted] < 2**31:
            return None
        rest = [a for a in range(len(sizes)) if a != contracted]
        table = transposed(dense, (contracted, *rest), graph)
        access = _rows.Access((sizes[contracted],), 0, (), (edges,), (), ())
        columns = access.numbers(indices, Mode.FILL_OR_DROP, graph)
        terms = _terms.Terms(
            graph.reshape(table, (sizes[contracted], width)), columns, data, fills=True
        )
        bounds = graph.convert(indptr, np.dtype("int32"))
        total = self._sum(bounds, (), edges, terms, out.dtype, graph)
        return graph.reshape(total, out.shape)


def is_plain_csr(eqn: JaxprEqn) -> bool:
    """Whether a ``bcsr_dot_general`` is one matrix, without dense axes, times columns."""
    data, indices, *_ = eqn.invars
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    flat = len(shape_of(indices)) == 1 and shape_of(data) == shape_of(indices)
    return flat and tuple(contracted) == (1,) and not batch


def _obstacle(eqn: JaxprEqn, access: _rows.Access | None) -> str:
    """Why a scatter of many numbers has to stay, "" if nothing is in the way."""
    if access is None:
        return "its indices name more than rows along one axis"
    if eqn.params["mode"] not in _rows.MODES:
        return f"what becomes of indices out of bounds is {eqn.params['mode']}"
    if eqn.params["unique_indices"]:
        return "no two updates meet"
    rows = access.tables * access.rows
    if not 0 < rows < 2**31 or not 1 < access.count < _LARGEST:
        return f"{rows} rows and {access.count} indices do not suit the kernel"
    if rows > _MOST_ROWS * access.count:
        return f"{access.count} indices are few for {rows} rows"
    return ""


def _counted(bounds: Atom, number: Any, shape: tuple[int, int], dtype: Any, graph: Graph) -> Atom:
    """The sums of terms that are all one number: how many there are, times it."""
    rows, _ = shape
    ends = [
        graph.emit(p.slice_p, bounds, start_indices=(i,), limit_indices=(rows + i,), strides=None)
        for i in (1, 0)
    ]
    wide = np.dtype("float64") if dtype == np.float64 else np.dtype("float32")
    count = graph.convert(graph.emit(p.sub_p, *ends), wide)
    if number != 1:
        count = graph.mul(count, graph.full(graph.literal(number, count.aval), (rows,)))
    return graph.broadcast(graph.convert(count, dtype), shape, (0,))


def _permuted(values: Atom, order: tuple[Atom, ...], graph: Graph) -> Atom:
    """``values[order]``; ``values`` where there is none."""
    if not order:
        return values
    count, *parts = shape_of(values)
    return graph.emit(
        p.gather_p,
        values,
        graph.reshape(order[0], (count, 1)),
        dimension_numbers=GatherDimensionNumbers(
            offset_dims=tuple(range(1, 1 + len(parts))),
            collapsed_slice_dims=(0,),
            start_index_map=(0,),
        ),
        slice_sizes=(1, *parts),
        indices_are_sorted=False,
        unique_indices=True,
        mode=Mode.PROMISE_IN_BOUNDS,
        fill_value=None,
    )
