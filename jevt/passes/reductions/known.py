"""Sums that are known without adding anything up.

A sum is *known* if an expression of values that have no summed axis, or of sums that exist
already, gives it. ``_known`` builds that expression from the operand down, ``_DEPTH`` equations
deep at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rules import Graph
from jevt.passes.one_hot import is_inside
from jevt.passes.reductions.products import known_exponential, known_product
from jevt.passes.reductions.tools import (
    Expression,
    axes_of,
    constant_along,
    factor,
    hot_index,
    is_of_kept,
    is_wide,
    multiple,
    number,
    spread,
    without,
)

_DEPTH = 6
# Both factors of a product are taken apart.
_DEPTH_OF_PRODUCTS = 4


def _known(
    atom: Atom, axes: tuple[int, ...], graph: Graph, depth: int = _DEPTH
) -> Expression | None:
    """The sum of ``atom`` over ``axes`` without a reduction, None if it is not known."""
    shape = shape_of(atom)
    kept = without(shape, axes)
    count = math.prod(shape[axis] for axis in axes)
    if (value := graph.constant(atom)) is not None:
        total = multiple(value, count)
        return None if total is None else lambda: graph.full(graph.literal(total, atom.aval), kept)
    if (existing := graph.sum_of(atom, axes)) is not None:
        return lambda: existing
    eqn = graph.definition(atom)
    if eqn is None or depth == 0:
        return None
    part = constant_along(atom, shape, axes, graph)
    if part is not None:
        times = number(count, atom.aval, graph)
        return None if times is None else lambda: graph.mul(part(), times)
    rule = _KNOWN.get(eqn.primitive)
    return None if rule is None else rule(eqn, axes, graph, depth)


def _known_operand(
    atom: Atom, eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> Expression | None:
    """The known sum of an operand of ``eqn``, as often as it is repeated along ``axes``."""
    shape = shape_of(eqn.outvars[0])
    if shape_of(atom) == shape:
        return _known(atom, axes, graph, depth - 1)
    part = constant_along(atom, shape, axes, graph)
    times = number(math.prod(shape[axis] for axis in axes), atom.aval, graph)
    if part is None or times is None:
        return None
    return lambda: graph.mul(part(), times)


def _known_neg(eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int) -> Expression | None:
    inner = _known(eqn.invars[0], axes, graph, depth - 1)
    return None if inner is None else lambda: graph.emit(p.neg_p, inner())


def _known_scaled(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> Expression | None:
    """``c·x``, ``x/c``, and products that are known otherwise."""
    split = factor(eqn, axes, graph)
    if not is_wide(eqn.outvars[0]):
        return None
    inner = None if split is None else _known_operand(split[0], eqn, axes, graph, depth)
    if split is not None and inner is not None:
        scale = split[1]
        return lambda: graph.emit(eqn.primitive, inner(), scale(), **eqn.params)
    if eqn.primitive is not p.mul_p:
        return None
    return known_product(eqn, axes, graph, min(depth, _DEPTH_OF_PRODUCTS), _known)


def _known_exponential(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> Expression | None:
    return known_exponential(eqn, axes, graph)


def _known_sum(eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int) -> Expression | None:
    """``x + y``, ``x - y``, and ``x - mean x``."""
    if not is_wide(eqn.outvars[0]):
        return None
    if eqn.primitive is p.sub_p and (zero := _centred(eqn, axes, graph)) is not None:
        return zero
    x, y = (_known_operand(a, eqn, axes, graph, depth) for a in eqn.invars)
    if x is None or y is None:
        return None
    return lambda: graph.emit(eqn.primitive, x(), y())


def _centred(eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph) -> Expression | None:
    """``Σ (x - mean x) = 0``, as 0 times the mean."""
    x, mean = eqn.invars
    shape = shape_of(x)
    if shape != shape_of(eqn.outvars[0]):
        return None
    # The mean as the subtraction sees it, the same without the axes, and the sum that it is of.
    view = graph.definition(mean)
    part = constant_along(mean, shape, axes, graph)
    if part is None or view is None or not is_of_kept(view, shape, axes):
        return None
    scaled = graph.definition(view.invars[0])
    total = graph.sum_of(x, axes)
    count = math.prod(shape[axis] for axis in axes)
    if scaled is None or total is None or not _is_mean(scaled, total, count, graph):
        return None
    zero = graph.literal(0.0, eqn.outvars[0].aval)
    return lambda: graph.mul(part(), zero)


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
) -> Expression | None:
    """A one-hot of numbers."""
    hot = _hot_position(eqn.invars[0], axes, graph)
    if hot is None or kind(eqn.outvars[0].aval) not in ("f", "i"):
        return None
    inside = _inside(hot, shape_of(eqn.outvars[0])[axes[0]], graph)
    return lambda: graph.emit(p.convert_element_type_p, inside(), **eqn.params)


def _known_select(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int
) -> Expression | None:
    """``one-hot ? u : 0``."""
    which, *cases = eqn.invars
    shape = shape_of(eqn.outvars[0])
    if len(cases) != 2 or shape_of(which) != shape or graph.constant(cases[0]) != 0:
        return None
    hot = _hot_position(which, axes, graph)
    value = constant_along(cases[1], shape, axes, graph)
    if hot is None or value is None:
        return None
    kept = without(shape, axes)
    inside = _inside(hot, shape[axes[0]], graph)

    def expression() -> Atom:
        u = spread(value(), kept, graph)
        zeros = graph.full(graph.literal(0, eqn.outvars[0].aval), kept)
        return graph.emit(p.select_n_p, spread(inside(), kept, graph), zeros, u)

    return expression


def _hot_position(which: Atom, axes: tuple[int, ...], graph: Graph) -> Expression | None:
    """The i of ``iota == i`` along the one axis of ``axes``."""
    index = hot_index(which, axes, graph)
    return None if index is None else constant_along(index, shape_of(which), axes, graph)


def _inside(hot: Expression, size: int, graph: Graph) -> Expression:
    return lambda: is_inside(hot(), size, graph)


_KNOWN: dict[Any, Callable[..., Expression | None]] = {
    p.neg_p: _known_neg,
    p.mul_p: _known_scaled,
    p.div_p: _known_scaled,
    p.add_p: _known_sum,
    p.sub_p: _known_sum,
    p.convert_element_type_p: _known_convert,
    p.select_n_p: _known_select,
    p.exp_p: _known_exponential,
}


def known_sum(atom: Atom, axes: tuple[int, ...], graph: Graph) -> Expression | None:
    """The sum of ``atom`` over ``axes``, an array of the others, without a reduction.

    None if it is not known. What it is made of is not emitted before it is called.
    """
    if kind(atom.aval) not in ("f", "i") or 0 in shape_of(atom) or not axes:
        return None
    expression = _known(atom, axes, graph)
    if expression is None:
        return None
    return lambda: spread(expression(), without(shape_of(atom), axes), graph)


def eliminated(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A known sum."""
    expression = known_sum(eqn.invars[0], axes_of(eqn), graph)
    return None if expression is None else expression()
