"""Reduction elimination: sums whose result is known without adding anything up, and sums of less.

Purpose: a reduction bounds what a kernel can hold, and each one that goes joins two kernels. (EVT,
ASPLOS 2024, section 4: identities on sums, applied before fusion.)

Invariant: each identity holds in exact arithmetic, and a sum that is not finite because an operand
is not is replaced by something that is not (∞·(1 + 0) may stand for ∞·1 + ∞·0, which is NaN).
Identities that round differently (marked ≈) are used for float32 and float64 alone; results differ
by a few roundings of the sum of magnitudes, which is the error of the sum itself. Narrower types
accumulate in float32, and would be rounded more often. A factor is pulled out on the understanding
that the sum without it is in the type's range, which is why literal factors below 1, as of a mean
that is spelled ``Σ x/n``, stay inside.

The identities; A are the summed axes, n the number of summed elements, c is constant along A:

    Σ_A c             = n·c                          where n is a number of the type
    Σ_A over axes of size 1 = a reshape
    Σ_A B(y)          = n·Σ_A' y                     B repeats y
    Σ_A -x            = -Σ_A x
    Σ_A x             = an equal sum that exists already
    Σ_A (c·x)         ≈ c·Σ_A x,   Σ_A (x/c) ≈ Σ_A x / c
    Σ_A ((c·x)·y)     ≈ c·Σ_A (x·y)                  as in the gradient of a softmax
    Σ_A (x + y)       ≈ Σ_A x + Σ_A y                where both are known
    Σ_A (x - mean_A x) ≈ 0·mean_A x                  0, but NaN where the mean is NaN or infinite
    Σ_A (e / Σ_A e)   ≈ s / s                        a softmax: 1, but NaN where s is 0, ∞ or NaN
    Σ_c (iota_c == i)  = (0 ≤ i < n)                 one-hot, of any type
    Σ_c (iota_c == i ? u : 0) = (0 ≤ i < n ? u : 0)
    Σ_A Σ_B x         ≈ Σ_AB x                       where neither sum is along the contiguous axis
    Σ_A transpose x   = transpose Σ_A' x

    before  { lambda ; a:f32[8,5] b:i32[8]. let
                c:bool[8,5] = eq (iota[dimension=1]) (broadcast_in_dim b)
                d:f32[8,5] = convert_element_type c
                e:f32[8,5] = mul d -0.125; f:f32[8] = reduce_sum[axes=(1,)] e in (f,) }
    after   { lambda ; a:f32[8,5] b:i32[8]. let
                c:bool[8] = and (ge b 0) (le b 4); d:f32[8] = convert_element_type c
                f:f32[8] = mul d -0.125 in (f,) }

A sum is *known* if an expression of values that have no axis of A, or of sums that exist already,
gives it; ``_known`` builds that expression from the operand down, ``_DEPTH`` equations deep at
most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rules import Graph, Rules, merged, rewrite
from jevt.passes.canonical import arithmetic, views
from jevt.passes.one_hot import is_inside

_DEPTH = 6

# Emits an expression and returns its result: nothing is emitted before all of it is known to exist.
type _Expression = Callable[[], Atom]


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Simplifies the reductions of ``jaxpr`` and of its bodies."""
    return rewrite(jaxpr, RULES)


# Values that are constant along the summed axes


def _constant_along(
    atom: Atom, shape: tuple[int, ...], axes: tuple[int, ...], graph: Graph
) -> _Expression | None:
    """What is left of ``atom`` without ``axes``, None if it is not constant along them.

    ``atom`` is an operand of an equation whose result has this shape. The result broadcasts
    against an array of the kept axes, or is a scalar.
    """
    if shape_of(atom) == ():
        return lambda: atom
    if (value := graph.uniform(atom)) is not None:
        return lambda: value
    kept = tuple(axis for axis in range(len(shape)) if axis not in axes)
    if len(shape_of(atom)) == len(shape) and all(shape_of(atom)[axis] == 1 for axis in axes):
        return lambda: graph.reshape(atom, [shape_of(atom)[axis] for axis in kept])
    eqn = graph.definition(atom, p.broadcast_in_dim_p)
    if eqn is None or len(eqn.invars) > 1 or eqn.params["sharding"] is not None:
        return None
    source = eqn.invars[0]
    dimensions = [int(d) for d in eqn.params["broadcast_dimensions"]]
    if any(d in axes and shape_of(source)[i] != 1 for i, d in enumerate(dimensions)):
        return None
    stays = [i for i, d in enumerate(dimensions) if d not in axes]
    target = [shape_of(atom)[axis] for axis in kept]

    def expression() -> Atom:
        y = graph.reshape(source, [shape_of(source)[i] for i in stays])
        return graph.broadcast(y, target, [kept.index(dimensions[i]) for i in stays])

    return expression


# Known sums


def _known(
    atom: Atom, axes: tuple[int, ...], graph: Graph, depth: int = _DEPTH
) -> _Expression | None:
    """The sum of ``atom`` over ``axes`` without a reduction, None if it is not known."""
    shape = shape_of(atom)
    kept = _without(shape, axes)
    count = math.prod(shape[axis] for axis in axes)
    if (value := graph.constant(atom)) is not None:
        total = _multiple(value, count)
        return None if total is None else lambda: graph.full(graph.literal(total, atom.aval), kept)
    if (existing := graph.sum_of(atom, axes)) is not None:
        return lambda: existing
    eqn = graph.definition(atom)
    if eqn is None or depth == 0:
        return None
    part = _constant_along(atom, shape, axes, graph)
    if part is not None:
        times = _number(count, atom.aval, graph)
        return None if times is None else lambda: graph.mul(part(), times)
    rule = _KNOWN.get(eqn.primitive)
    return None if rule is None else rule(eqn, axes, graph, depth)


def _known_operand(
    atom: Atom, eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> _Expression | None:
    """The known sum of an operand of ``eqn``, as often as it is repeated along ``axes``."""
    shape = shape_of(eqn.outvars[0])
    if shape_of(atom) == shape:
        return _known(atom, axes, graph, depth - 1)
    part = _constant_along(atom, shape, axes, graph)
    times = _number(math.prod(shape[axis] for axis in axes), atom.aval, graph)
    if part is None or times is None:
        return None
    return lambda: graph.mul(part(), times)


def _known_neg(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> _Expression | None:
    inner = _known(eqn.invars[0], axes, graph, depth - 1)
    return None if inner is None else lambda: graph.emit(p.neg_p, inner())


def _known_scaled(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> _Expression | None:
    """``c·x``, ``x/c``."""
    split = _factor(eqn, axes, graph)
    if split is None or not _is_wide(eqn.outvars[0]):
        return None
    x, scale = split
    inner = _known_operand(x, eqn, axes, graph, depth)
    if inner is None:
        return None
    return lambda: graph.emit(eqn.primitive, inner(), scale(), **eqn.params)


def _factor(eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph) -> tuple[Atom, _Expression] | None:
    """(x, c) of a product ``c·x`` or quotient ``x/c``; x has the shape of the result."""
    shape = shape_of(eqn.outvars[0])
    orders = [(0, 1)] if eqn.primitive is p.div_p else [(0, 1), (1, 0)]
    for i, j in orders:
        x, c = eqn.invars[i], eqn.invars[j]
        if shape_of(x) == shape and (scale := _constant_along(c, shape, axes, graph)) is not None:
            return x, scale
    return None


def _known_sum(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> _Expression | None:
    """``x + y``, ``x - y``, and ``x - mean x``."""
    if not _is_wide(eqn.outvars[0]):
        return None
    if eqn.primitive is p.sub_p and (zero := _centred(eqn, axes, graph)) is not None:
        return zero
    x, y = (_known_operand(a, eqn, axes, graph, depth) for a in eqn.invars)
    if x is None or y is None:
        return None
    return lambda: graph.emit(eqn.primitive, x(), y())


def _centred(eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph) -> _Expression | None:
    """``Σ (x - mean x) = 0``, as 0 times the mean."""
    x, mean = eqn.invars
    shape = shape_of(x)
    if shape != shape_of(eqn.outvars[0]):
        return None
    # The mean as the subtraction sees it, the same without the axes, and the sum that it is of.
    view = graph.definition(mean)
    part = _constant_along(mean, shape, axes, graph)
    if part is None or view is None or view.primitive not in (p.reshape_p, p.broadcast_in_dim_p):
        return None
    scaled = graph.definition(view.invars[0])
    total = graph.sum_of(x, axes)
    count = math.prod(shape[axis] for axis in axes)
    if scaled is None or total is None or not _is_mean(scaled, total, count, graph):
        return None
    # A mean over other axes would have another shape, unless axes of the same size are exchanged.
    if view.primitive is p.reshape_p:
        placed = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        in_place = shape_of(mean) == placed
    else:
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        in_place = list(map(int, view.params["broadcast_dimensions"])) == kept
    zero = graph.literal(0.0, eqn.outvars[0].aval)
    return (lambda: graph.mul(part(), zero)) if in_place else None


def _is_mean(eqn: JaxprEqn, total: Atom, count: int, graph: Graph) -> bool:
    a, b = eqn.invars
    if eqn.primitive is p.mul_p and a is not total:
        a, b = b, a
    value = graph.constant(b)
    if a is not total or value is None:
        return False
    wanted = {p.mul_p: 1.0 / count, p.div_p: float(count)}.get(eqn.primitive)
    return wanted is not None and value == np.asarray(wanted, value.dtype)


def _known_convert(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> _Expression | None:
    """A one-hot of numbers."""
    hot = _hot_position(eqn.invars[0], axes, graph)
    if hot is None or kind(eqn.outvars[0].aval) not in ("f", "i"):
        return None
    inside = _inside(hot, shape_of(eqn.outvars[0])[axes[0]], graph)
    return lambda: graph.emit(p.convert_element_type_p, inside(), **eqn.params)


def _known_select(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> _Expression | None:
    """``one-hot ? u : 0``."""
    which, *cases = eqn.invars
    shape = shape_of(eqn.outvars[0])
    if len(cases) != 2 or shape_of(which) != shape or graph.constant(cases[0]) != 0:
        return None
    hot = _hot_position(which, axes, graph)
    value = _constant_along(cases[1], shape, axes, graph)
    if hot is None or value is None:
        return None
    kept = _without(shape, axes)
    inside = _inside(hot, shape[axes[0]], graph)

    def expression() -> Atom:
        u = _spread(value(), kept, graph)
        zeros = graph.full(graph.literal(0, eqn.outvars[0].aval), kept)
        return graph.emit(p.select_n_p, _spread(inside(), kept, graph), zeros, u)

    return expression


def _hot_position(which: Atom, axes: tuple[int, ...], graph: Graph) -> _Expression | None:
    """The i of ``iota == i`` along the one axis of ``axes``."""
    test = graph.definition(which, p.eq_p)
    if test is None or len(axes) != 1:
        return None
    (axis,), shape = axes, shape_of(which)
    for counter, index in (test.invars, test.invars[::-1]):
        iota = graph.definition(counter, p.iota_p)
        if iota is None or iota.params["dimension"] != axis or len(shape_of(counter)) != len(shape):
            continue
        aval: Any = counter.aval
        counts = kind(aval) == "i" and shape[axis] - 1 <= jax.numpy.iinfo(aval.dtype).max
        if counts and aval.shape[axis] == shape[axis]:
            return _constant_along(index, shape, axes, graph)
    return None


def _inside(hot: _Expression, size: int, graph: Graph) -> _Expression:
    return lambda: is_inside(hot(), size, graph)


_KNOWN: dict[Any, Callable[..., _Expression | None]] = {
    p.neg_p: _known_neg,
    p.mul_p: _known_scaled,
    p.div_p: _known_scaled,
    p.add_p: _known_sum,
    p.sub_p: _known_sum,
    p.convert_element_type_p: _known_convert,
    p.select_n_p: _known_select,
}


def _eliminated(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A known sum."""
    (x,), axes = eqn.invars, _axes(eqn)
    if kind(x.aval) not in ("f", "i") or 0 in shape_of(x) or not axes:
        return None
    expression = _known(x, axes, graph)
    if expression is None:
        return None
    return _spread(expression(), shape_of(eqn.outvars[0]), graph)


# Sums of less


def _unit_axes(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A reduction over axes of size 1 is a reshape; over others too, one over the others."""
    (x,), axes = eqn.invars, _axes(eqn)
    units = {axis for axis in axes if shape_of(x)[axis] == 1}
    if axes and not units:
        return None
    if len(units) == len(axes):
        return graph.reshape(x, shape_of(eqn.outvars[0]))
    stays = [axis for axis in range(len(shape_of(x))) if axis not in units]
    source = graph.reshape(x, [shape_of(x)[axis] for axis in stays])
    new_axes = tuple(stays.index(axis) for axis in axes if axis not in units)
    return graph.emit(eqn.primitive, source, **{**eqn.params, "axes": new_axes})


def _of_view(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A reduction looks through a transpose, and a reshape that adds or drops axes of size 1."""
    (x,), axes = eqn.invars, _axes(eqn)
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


def _of_repeated(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ_A B(y) = n·Σ_A' y``."""
    (x,), axes = eqn.invars, _axes(eqn)
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
    times = _number(repeated, x.aval, graph)
    if times is None or repeated == 1:
        return None
    result = graph.emit(eqn.primitive, source, **{**eqn.params, "axes": tuple(summed)})
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    places = [kept.index(d) for i, d in enumerate(dimensions) if i not in summed]
    result = graph.mul(result, times)
    return graph.broadcast(result, [shape[axis] for axis in kept], places)


def _scaled(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ (c·x) ≈ c·Σ x``, ``Σ (x/c) ≈ (Σ x)/c``, ``Σ ((c·x)·y) ≈ c·Σ (x·y)``, ``Σ -x = -Σ x``."""
    (x,), axes = eqn.invars, _axes(eqn)
    inner = graph.definition(x)
    if inner is None or kind(x.aval) != "f" or 0 in shape_of(x):
        return None
    if inner.primitive is p.neg_p:
        return graph.emit(p.neg_p, graph.emit(eqn.primitive, inner.invars[0], **eqn.params))
    if inner.primitive not in (p.mul_p, p.div_p) or not _is_wide(x):
        return None
    split = _factor(inner, axes, graph)
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
    axes, shape = _axes(eqn), shape_of(product.outvars[0])
    for i, j in ((0, 1), (1, 0)):
        first, y = product.invars[i], product.invars[j]
        inner = graph.definition(first)
        if inner is None or inner.primitive not in (p.mul_p, p.div_p) or graph.readers(first) != 1:
            continue
        split = _factor(inner, axes, graph) if shape_of(first) == shape else None
        if split is None or shape_of(y) != shape or _shrinks(inner, graph):
            continue
        x, scale = split
        total = graph.emit(eqn.primitive, graph.mul(x, y), **eqn.params)
        return graph.emit(inner.primitive, total, scale(), **inner.params)
    return None


def _nested(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ_A Σ_B x ≈ Σ_AB x``, where neither is along the contiguous axis.

    Sums along it stay by themselves: rows that end on chip, then a small sum, is the better order.
    """
    (x,), axes = eqn.invars, _axes(eqn)
    inner = graph.definition(x, eqn.primitive)
    if inner is None or not _is_wide(x) or graph.readers(x) != 1 or not axes:
        return None
    shape, first = shape_of(inner.invars[0]), _axes(inner)
    kept = [axis for axis in range(len(shape)) if axis not in first]
    both = tuple(sorted((*first, *(kept[axis] for axis in axes))))
    if not shape or len(shape) - 1 in both or inner.params != {**eqn.params, "axes": first}:
        return None
    return graph.emit(eqn.primitive, inner.invars[0], **{**eqn.params, "axes": both})


# Tools


def _spread(atom: Atom, shape: tuple[int, ...], graph: Graph) -> Atom:
    """A scalar, or an array with axes of size 1, as an array of this shape."""
    if shape_of(atom) == shape:
        return atom
    if isinstance(atom, Literal):
        return graph.full(atom, shape)
    return graph.broadcast(atom, shape, range(len(shape_of(atom))))


def _axes(eqn: JaxprEqn) -> tuple[int, ...]:
    return tuple(int(axis) for axis in eqn.params["axes"])


def _without(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _is_wide(atom: Atom) -> bool:
    """Whether the type is the one in which sums accumulate."""
    aval: Any = atom.aval
    return aval.dtype in (np.float32, np.float64)


def _multiple(value: Any, count: int) -> Any:
    """``count·value``, None if that is not exact up to one rounding."""
    if kind(value) == "i":
        info = jax.numpy.iinfo(value.dtype)
        total = int(value) * count
        return value.dtype.type(total) if info.min <= total <= info.max else None
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.float64(value) * count).astype(value.dtype)[()]


def _number(count: int, like: Any, graph: Graph) -> Literal | None:
    """``count`` as a literal, None if the type does not hold it."""
    if kind(like) == "i":
        fits = count <= jax.numpy.iinfo(like.dtype).max
    else:
        with np.errstate(over="ignore"):
            fits = kind(like) == "f" and float(np.asarray(count, like.dtype)) == count
    return graph.literal(count, like) if fits else None


_SUM = (_unit_axes, _eliminated, _of_view, _of_repeated, _scaled, _nested)

RULES: Rules = merged(
    {p.reduce_sum_p: _SUM, p.reduce_max_p: (_unit_axes,), p.reduce_min_p: (_unit_axes,)},
    views.RULES,
    arithmetic.RULES,
)
