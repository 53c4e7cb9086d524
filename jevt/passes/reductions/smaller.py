"""Reductions of less: over fewer elements, fewer axes, or without a factor."""

from __future__ import annotations

import math

from jax.extend.core import JaxprEqn, Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rules import Graph
from jevt.passes.canonical import views
from jevt.passes.reductions.tools import (
    axes_of,
    factor,
    is_wide,
    number,
)


def unit_axes(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A reduction over axes of size 1 is a reshape; over others too, one over the others."""
    (x,), axes = eqn.invars, axes_of(eqn)
    units = {axis for axis in axes if shape_of(x)[axis] == 1}
    if axes and not units:
        return None
    if len(units) == len(axes):
        return graph.reshape(x, shape_of(eqn.outvars[0]))
    stays = [axis for axis in range(len(shape_of(x))) if axis not in units]
    source = graph.reshape(x, [shape_of(x)[axis] for axis in stays])
    new_axes = tuple(stays.index(axis) for axis in axes if axis not in units)
    return graph.emit(eqn.primitive, source, **{**eqn.params, "axes": new_axes})


def of_view(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A reduction looks through a transpose, a reversal, and a reshape of axes of size 1."""
    (x,), axes = eqn.invars, axes_of(eqn)
    view = graph.definition(x)
    if view is None or view.params.get("sharding") is not None:
        return None
    if view.primitive is p.transpose_p:
        permutation = view.params["permutation"]
        inner_axes = tuple(sorted(permutation[axis] for axis in axes))
        order = [axis for axis in permutation if axis not in inner_axes]
        inner = graph.emit(eqn.primitive, view.invars[0], **{**eqn.params, "axes": inner_axes})
        ranks = tuple(sorted(order).index(axis) for axis in order)
        return graph.emit(p.transpose_p, inner, permutation=ranks)
    if view.primitive is p.rev_p:
        inner = graph.emit(eqn.primitive, view.invars[0], **eqn.params)
        kept = [axis for axis in range(len(shape_of(x))) if axis not in axes]
        reversed_ = tuple(kept.index(d) for d in map(int, view.params["dimensions"]) if d in kept)
        return graph.emit(p.rev_p, inner, dimensions=reversed_) if reversed_ else inner
    if view.primitive is p.reshape_p and view.params["dimensions"] is None:
        (source,) = view.invars
        outer = [axis for axis, size in enumerate(shape_of(x)) if size != 1]
        inner_sizes = [axis for axis, size in enumerate(shape_of(source)) if size != 1]
        if views.without_units(shape_of(x)) != views.without_units(shape_of(source)):
            return None
        if 0 in shape_of(x) or any(shape_of(x)[axis] == 1 for axis in axes):
            return None
        inner_axes = tuple(inner_sizes[outer.index(axis)] for axis in axes)
        inner = graph.emit(eqn.primitive, source, **{**eqn.params, "axes": inner_axes})
        return graph.reshape(inner, shape_of(eqn.outvars[0]))
    return None


def of_repeated(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ_A B(y) = n·Σ_A' y``."""
    (x,), axes = eqn.invars, axes_of(eqn)
    view = graph.definition(x, p.broadcast_in_dim_p)
    if view is None or len(view.invars) > 1 or view.params["sharding"] is not None:
        return None
    source, shape = view.invars[0], shape_of(x)
    if isinstance(source, Literal) or 0 in shape or kind(x.aval) not in ("f", "i"):
        return None
    dimensions = [int(d) for d in view.params["broadcast_dimensions"]]
    summed = [i for i, d in enumerate(dimensions) if d in axes]
    repeated = math.prod(shape[axis] for axis in axes)
    repeated //= math.prod(shape_of(source)[i] for i in summed)
    times = number(repeated, x.aval, graph)
    if times is None or repeated == 1:
        return None
    result = graph.emit(eqn.primitive, source, **{**eqn.params, "axes": tuple(summed)})
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    places = [kept.index(d) for i, d in enumerate(dimensions) if i not in summed]
    result = graph.mul(result, times)
    return graph.broadcast(result, [shape[axis] for axis in kept], places)


def scaled(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ (c·x) ≈ c·Σ x``, ``Σ (x/c) ≈ (Σ x)/c``, ``Σ ((c·x)·y) ≈ c·Σ (x·y)``, ``Σ -x = -Σ x``."""
    (x,), axes = eqn.invars, axes_of(eqn)
    inner = graph.definition(x)
    if inner is None or kind(x.aval) != "f" or 0 in shape_of(x):
        return None
    if inner.primitive is p.neg_p:
        return graph.emit(p.neg_p, graph.emit(eqn.primitive, inner.invars[0], **eqn.params))
    if inner.primitive not in (p.mul_p, p.div_p) or not is_wide(x):
        return None
    split = factor(inner, axes, graph)
    if split is not None:
        base, scale = split
        if _shrinks(inner, graph):
            return None
        total = graph.emit(eqn.primitive, base, **eqn.params)
        return graph.emit(inner.primitive, total, scale(), **inner.params)
    if inner.primitive is p.mul_p and graph.readers(x) == 1:
        return _scaled_inside(eqn, inner, graph)
    return None


def _shrinks(eqn: JaxprEqn, graph: Graph) -> bool:
    """Whether one operand of a product is a number below 1, or the divisor one above 1."""
    values = [graph.constant(a) for a in eqn.invars]
    if eqn.primitive is p.div_p:
        return values[1] is not None and abs(float(values[1])) > 1.0
    return any(value is not None and abs(float(value)) < 1.0 for value in values)


def _scaled_inside(eqn: JaxprEqn, product: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ ((c·x)·y) ≈ c·Σ (x·y)``, where ``c·x`` has no other reader, so that it need not be."""
    axes, shape = axes_of(eqn), shape_of(product.outvars[0])
    for i, j in ((0, 1), (1, 0)):
        first, y = product.invars[i], product.invars[j]
        inner = graph.definition(first)
        if inner is None or inner.primitive not in (p.mul_p, p.div_p) or graph.readers(first) != 1:
            continue
        split = factor(inner, axes, graph) if shape_of(first) == shape else None
        if split is None or shape_of(y) != shape or _shrinks(inner, graph):
            continue
        x, scale = split
        total = graph.emit(eqn.primitive, graph.mul(x, y), **eqn.params)
        return graph.emit(inner.primitive, total, scale(), **inner.params)
    return None


def nested(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ_A Σ_B x ≈ Σ_AB x``, where neither is along the contiguous axis.

    Sums along it stay by themselves: rows that end on chip, then a small sum, is the better order.
    """
    (x,), axes = eqn.invars, axes_of(eqn)
    inner = graph.definition(x, eqn.primitive)
    if inner is None or not is_wide(x) or graph.readers(x) != 1 or not axes:
        return None
    shape, first = shape_of(inner.invars[0]), axes_of(inner)
    kept = [axis for axis in range(len(shape)) if axis not in first]
    both = tuple(sorted((*first, *(kept[axis] for axis in axes))))
    if not shape or len(shape) - 1 in both or inner.params != {**eqn.params, "axes": first}:
        return None
    return graph.emit(eqn.primitive, inner.invars[0], **{**eqn.params, "axes": both})


def contracted(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ_i (A·B)_ij ≈ (Σ_i A)·B`` for an axis i of one operand alone, if nothing else reads A·B.

    The product has so many fewer rows or columns; for float32 and float64, as sums of narrower
    operands would be rounded before they are multiplied.
    """
    (x,), axes = eqn.invars, axes_of(eqn)
    dot = graph.definition(x, p.dot_general_p)
    if dot is None or graph.readers(x) != 1 or not all(map(is_wide, (x, *dot.invars))):
        return None
    if dot.params.get("out_sharding") is not None or 0 in shape_of(x) or not axes:
        return None
    contracting, batch = dot.params["dimension_numbers"]
    first = len(batch[0])  # axes of the product: batch, those of the left, those of the right
    if min(axes) < first:
        return None
    operands, numbers = [], []
    for operand, contracted_axes, batch_axes in zip(dot.invars, contracting, batch, strict=True):
        own = {*map(int, contracted_axes), *map(int, batch_axes)}
        free = [axis for axis in range(len(shape_of(operand))) if axis not in own]
        summed = tuple(axis for i, axis in enumerate(free) if first + i in axes)
        first += len(free)
        left = [axis for axis in range(len(shape_of(operand))) if axis not in summed]
        operands.append(_sum(operand, summed, eqn, graph))
        numbers.append(
            [tuple(left.index(int(a)) for a in g) for g in (contracted_axes, batch_axes)]
        )
    (lhs, lhs_batch), (rhs, rhs_batch) = numbers
    return graph.emit(
        p.dot_general_p,
        *operands,
        **{**dot.params, "dimension_numbers": ((lhs, rhs), (lhs_batch, rhs_batch))},
    )


def _sum(atom: Atom, axes: tuple[int, ...], eqn: JaxprEqn, graph: Graph) -> Atom:
    return graph.emit(eqn.primitive, atom, **{**eqn.params, "axes": axes}) if axes else atom
