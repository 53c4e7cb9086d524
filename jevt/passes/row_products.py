"""Products of looked-up rows, summed along the row, in one kernel. For GPUs.

Purpose: the gradient of the weights of a sum of segments, and of the elements of a sparse matrix,
is one product of two rows an edge. As equations it looks up two arrays with a row for each edge,
and multiplies and sums these; in one kernel, rows are read where they lie.

    Σ_f w[e] · a[i[e], f] · b[j[e], f] = w[e] · row_products(i, j, a, b)[e]

Invariant: the same sums, in float32 (float64 of float64) and rounded once. Left alone: few
elements, lookups of more than rows, and sums over only a part of a row that is not its end.

    before  { lambda ; a:f32[9,4] b:f32[7,4] c:i32[50,1] d:i32[50,1]. let
                e:f32[50,4] = gather[PROMISE_IN_BOUNDS] a c
                f:f32[50,4] = gather[FILL_OR_DROP fill_value=0] b d
                g:f32[50,4] = mul e f; h:f32[50] = reduce_sum[axes=(1,)] g in (h,) }
    after   { lambda ; a:f32[9,4] b:f32[7,4] c:i32[50,1] d:i32[50,1]. let
                e:i32[50] = clamp 0 (reshape c) 8; f:i32[50] = reshape d
                g:f32[50,1] = row_products[heads=1 fills=(False, True)] e f a b
                h:f32[50] = reshape g in (h,) }
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import primitives as p
from jax.lax import GatherScatterMode as Mode

from jevt._jaxpr import Atom
from jevt.passes import _rows, _terms
from jevt.passes._facts import is_float, shape_of
from jevt.passes._rows import Access, Layout, transposed
from jevt.passes._rules import Graph, rewrite
from jevt.passes.segment_sums import MIN_UPDATES
from jevt.primitives.row_products import row_products_p

_FLOATS = (jax.numpy.bfloat16, np.float16, np.float32, np.float64)
_DEPTH = 8


@dataclasses.dataclass
class _Leaves:
    """What a product is made of.

    Attributes:
      lookups: lookups, how they see the product, and their casts, the last one first.
      factors: everything else.
    """

    lookups: list[tuple[JaxprEqn, Access, Layout, tuple[Any, ...]]]
    factors: list[_terms.Factor]


def run(jaxpr: Jaxpr, capability: int, smallest: int = MIN_UPDATES) -> Jaxpr:
    """Rewrites products of looked-up rows, in ``jaxpr`` and in its bodies.

    Args:
      jaxpr: the program.
      capability: compute capability of the GPU, 90 for sm_90.
      smallest: number of elements of the looked-up rows from which on.
    """

    def reduce_sum(eqn: JaxprEqn, graph: Graph) -> Atom | None:
        (operand,) = eqn.invars
        if math.prod(shape_of(operand)) < smallest:
            return None
        return _product(eqn, [operand], tuple(eqn.params["axes"]), capability, graph)

    def dot_general(eqn: JaxprEqn, graph: Graph) -> Atom | None:
        (contracted, of_rhs), (batch, batch_rhs) = eqn.params["dimension_numbers"]
        lhs, rhs = eqn.invars
        alike = (contracted, batch) == (of_rhs, batch_rhs) and list(batch) == sorted(batch)
        if not alike or len(contracted) + len(batch) != len(shape_of(lhs)):
            return None
        if shape_of(lhs) != shape_of(rhs) or math.prod(shape_of(lhs)) < smallest:
            return None
        return _product(eqn, [lhs, rhs], tuple(contracted), capability, graph)

    return rewrite(jaxpr, {p.reduce_sum_p: (reduce_sum,), p.dot_general_p: (dot_general,)})


def _product(
    eqn: JaxprEqn, parts: list[Atom], axes: tuple[int, ...], capability: int, graph: Graph
) -> Atom | None:
    """The sum of the product of ``parts`` along ``axes``; None if it is none of two lookups."""
    out: Any = eqn.outvars[0].aval
    shape = shape_of(parts[0])
    found = _Leaves([], [])
    same = tuple(range(len(shape)))
    if out.dtype not in _FLOATS or not all(_collect(p_, same, (), found, graph) for p_ in parts):
        return None
    if len(found.lookups) != 2 or found.lookups[0][2] != found.lookups[1][2]:
        return None
    # In one order, so that equal products are one, however their factors are spelled.
    found.lookups.sort(key=lambda lookup: (str(lookup[0].params["mode"]), lookup[1].rows))
    layout = found.lookups[0][2]
    kept = tuple(a for a in layout.window if a not in axes)
    heads = math.prod(shape[a] for a in kept)
    if kept != layout.window[: len(kept)] or any(a in layout.positions for a in axes):
        return None
    try:
        each = [_terms.axes_of(f, layout, shape, graph)[2] for f in found.factors]
    except _terms.TooFine:
        return None
    if any(h not in (1, heads) for h in each) or not 0 < layout.count < 2**31 or not heads:
        return None
    tables, rows, fills = [], [], []
    for lookup, access, _, casts in found.lookups:
        array, indices = lookup.invars
        tables.append(_terms.rounded(access.table(array, graph), casts, graph))
        mode = _rows.mode_of(lookup)
        rows.append(access.numbers(indices, mode, graph))
        fills.append(mode == Mode.FILL_OR_DROP)
    total = graph.emit(
        row_products_p,
        *rows,
        *tables,
        heads=heads,
        dtype=np.dtype(out.dtype),
        fills=tuple(fills),
        capability=capability,
    )
    weight = _terms.weight_of(tuple(found.factors), layout, shape, out.dtype, graph)
    if weight is not None:
        size = (layout.count, heads)
        weight = graph.convert(weight, out.dtype)
        total = graph.mul(total, graph.broadcast(weight, size, range(len(shape_of(weight)))))
    target = (*layout.positions, *kept)
    total = graph.reshape(total, tuple(shape[a] for a in target))
    return transposed(total, sorted(range(len(target)), key=lambda i: target[i]), graph)


def _collect(
    part: Atom, places: tuple[int, ...], casts: tuple[Any, ...], found: _Leaves, graph: Graph
) -> bool:
    """Adds the lookups and factors that ``part`` is the product of; False if it is not one.

    ``places`` are the axes of the product that the axes of ``part`` are.
    """
    if len(found.lookups) + len(found.factors) + len(casts) > _DEPTH:
        return False
    eqn = graph.definition(part)
    if eqn is not None and len(shape_of(part)) == len(places):
        operand = eqn.invars[0]
        if eqn.primitive is p.gather_p and len(found.lookups) < 2:
            access = _rows.of_gather(eqn)
            mode, fill = eqn.params["mode"], eqn.params["fill_value"]
            usable = mode in _rows.MODES and (mode != Mode.FILL_OR_DROP or fill == 0)
            if access is not None and usable and access.tables * access.rows < 2**31:
                found.lookups.append((eqn, access, access.layout(places), casts))
                return True
        if eqn.primitive is p.convert_element_type_p and is_float(operand.aval):
            casts = (*casts, eqn.params["new_dtype"])
            return _collect(operand, places, casts, found, graph)
        if (before := _terms.before_view(eqn, places)) is not None:
            return _collect(operand, before, casts, found, graph)
        if eqn.primitive is p.mul_p and eqn.params.get("out_dtype") is None:
            return all(
                _collect(x, places[: len(shape_of(x))], casts, found, graph) for x in eqn.invars
            )
        if eqn.primitive is p.neg_p:
            found.factors.append(_terms.Factor(graph.literal(-1, operand.aval), ()))
            return _collect(operand, places, casts, found, graph)
        if eqn.primitive is p.div_p:
            below = eqn.invars[1]
            divisor = _terms.Factor(below, places[: len(shape_of(below))], inverse=True)
            found.factors.append(divisor)
            return _collect(operand, places[: len(shape_of(operand))], casts, found, graph)
    if not is_float(part.aval):
        return False
    found.factors.append(_terms.Factor(part, places[: len(shape_of(part))]))
    return True
