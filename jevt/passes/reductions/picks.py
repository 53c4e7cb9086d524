"""Sums of one element a row, which is chosen by its position: the logit or probability of a label.

A are the summed axes, of which there is one, c is constant along it, and n is its size:

    Σ (iota == i ? c·x : 0)     = c·Σ (iota == i ? x : 0)     the same of x/c; for 0 ≤ i < n
    Σ (iota == i ? u : 0)·y     ≈ (0 ≤ i < n ? u·y[i] : 0) + 0·Σ y
                                                 where y[i] and Σ y exist: the gradient of log(p[i])

The last term is not 0 where some y is not finite, as in the sum itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.extend.core import JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import is_float, shape_of
from jevt.passes._rules import Graph
from jevt.passes.one_hot import is_inside
from jevt.passes.reductions.tools import (
    Expression,
    axes_of,
    constant_along,
    factor,
    hot_index,
    spread,
    without,
)


def of_one_hot(eqn: JaxprEqn, y: Atom, axes: tuple[int, ...], graph: Graph) -> Expression | None:
    """``Σ (one-hot ? u : 0)·y``."""
    which, *cases = eqn.invars
    shape = shape_of(y)
    if len(cases) != 2 or shape_of(which) != shape or graph.constant(cases[0]) != 0:
        return None
    index, u = hot_index(which, axes, graph), constant_along(cases[1], shape, axes, graph)
    total = graph.sum_of(y, axes)
    if index is None or u is None or total is None:
        return None
    size, kept = shape[axes[0]], without(shape, axes)
    picked = next(_picked(y, index, axes, graph), None)
    position = constant_along(index, shape, axes, graph)
    if picked is None or position is None:
        return None

    def expression() -> Atom:
        inside = spread(is_inside(position(), size, graph), kept, graph)
        zero = graph.literal(0.0, y.aval)
        value = graph.mul(picked, spread(u(), kept, graph))
        chosen = graph.emit(p.select_n_p, inside, graph.full(zero, kept), value)
        return graph.emit(p.add_p, chosen, graph.mul(total, zero))

    return expression


def _picked(y: Atom, index: Atom, axes: tuple[int, ...], graph: Graph) -> Iterator[Var]:
    """Existing sums of one element of y a row: the one at ``index``, where that is in the row."""
    size = shape_of(y)[axes[0]]
    for choice in graph.choices_of(y):
        which, *cases = choice.invars
        total = graph.sum_of(choice.outvars[0], axes)
        other = hot_index(which, axes, graph)
        if total is None or other is None or len(cases) != 2 or graph.constant(cases[0]) != 0:
            continue
        if _is_same_position(index, other, size, graph):
            yield total


def _is_same_position(index: Atom, other: Atom, size: int, graph: Graph) -> bool:
    """Whether two positions are equal where the first is inside the row."""
    (a, *seen), (b, *seen_other) = (_source(v, graph) for v in (index, other))
    if seen != seen_other:
        return False
    clamp = graph.definition(b, p.clamp_p)
    return a is b or (clamp is not None and clamp.invars[1] is a and _is_clamped(b, size, graph))


def _source(index: Atom, graph: Graph) -> tuple[Any, ...]:
    """What a position is a broadcast of, and how."""
    view = graph.definition(index, p.broadcast_in_dim_p)
    if view is None or len(view.invars) > 1:
        return index, None
    return view.invars[0], tuple(map(int, view.params["broadcast_dimensions"]))


def _is_clamped(index: Atom, size: int, graph: Graph) -> bool:
    """Whether a position has been brought into 0 … size-1."""
    clamp = graph.definition(index, p.clamp_p)
    if clamp is None:
        return False
    bounds = [graph.constant(a) for a in (clamp.invars[0], clamp.invars[2])]
    return bounds == [0, size - 1]


def picked(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``Σ (one-hot ? c·x : 0) = c·Σ (one-hot ? x : 0)``, the same of x/c: of one element, exactly.

    For positions that are inside of the row: outside, the left side is 0 even for infinite c.
    """
    (x,), axes = eqn.invars, axes_of(eqn)
    choice = graph.definition(x, p.select_n_p)
    if choice is None or len(choice.invars) != 3 or not is_float(x.aval):
        return None
    which, zeros, value = choice.invars
    scaled = graph.definition(value)
    index = hot_index(which, axes, graph)
    if index is None or scaled is None or graph.constant(zeros) != 0:
        return None
    if scaled.primitive not in (p.mul_p, p.div_p) or shape_of(which) != shape_of(x):
        return None
    split = factor(scaled, axes, graph)
    if split is None or not _is_clamped(_source(index, graph)[0], shape_of(x)[axes[0]], graph):
        return None
    base, scale = split
    chosen = graph.emit(p.select_n_p, which, zeros, base)
    total = graph.emit(eqn.primitive, chosen, **eqn.params)
    return graph.emit(scaled.primitive, total, scale(), **scaled.params)
