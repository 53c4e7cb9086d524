"""Sums of products that follow from sums that exist already: the sums of a gradient.

``Σ a·y`` is looked for without its product being there: the factor a is taken apart until what is
left is a product that somebody computes and sums up, or a sum of y alone. A are the summed axes, c
is constant along A:

    Σ (c·x)·y             ≈ c·Σ x·y            the same of x/c and -x
    Σ (x ± z)·y           ≈ Σ x·y ± Σ z·y      where both are known

and what ``picks.py`` knows of products with a one-hot. Sums of exponentials of logarithms of
themselves:

    Σ exp(x - log Σ exp x) ≈ s / s             with s = Σ exp x: 1, but NaN where s is 0, ∞ or NaN
    Σ exp(x - (log Σ exp(x - m) + m)) ≈ s / s
"""

from __future__ import annotations

import functools
from typing import Any

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph
from jevt.passes.reductions.picks import of_one_hot
from jevt.passes.reductions.tools import (
    Expression,
    Known,
    axes_of,
    constant_along,
    factor,
    is_of_kept,
    is_wide,
)


def known_product(
    eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph, depth: int, known: Known
) -> Expression | None:
    """The sum of a product.

    Args:
      eqn: the product.
      axes: the summed ones.
      graph: the equations so far.
      depth: how many equations back to look.
      known: the sum of one array, if that is known.
    """
    x, y = eqn.invars
    shape = shape_of(eqn.outvars[0])
    if not is_wide(eqn.outvars[0]) or shape_of(x) != shape or shape_of(y) != shape:
        return None
    return _of_factors(x, y, axes, graph, depth, known)


def _of_factors(
    x: Atom, y: Atom, axes: tuple[int, ...], graph: Graph, depth: int, known: Known
) -> Expression | None:
    product = graph.product_of(x, y)
    if product is not None and (existing := graph.sum_of(product, axes)) is not None:
        return lambda: existing
    if depth == 0:
        return None
    for a, b in ((x, y), (y, x)):
        found = _of_parts(a, b, axes, graph, depth, known)
        if found is not None:
            return found
    return None


def _of_parts(
    a: Atom, y: Atom, axes: tuple[int, ...], graph: Graph, depth: int, known: Known
) -> Expression | None:
    """``Σ a·y`` from the parts of a."""
    shape = shape_of(y)
    if (part := constant_along(a, shape, axes, graph)) is not None:
        total = known(y, axes, graph, depth - 1)
        return None if total is None else lambda: graph.mul(total(), part())
    eqn = graph.definition(a)
    if eqn is None or shape_of(a) != shape:
        return None

    def of(x: Atom) -> Expression | None:
        if shape_of(x) == shape:
            return _of_factors(x, y, axes, graph, depth - 1, known)
        return _of_parts(x, y, axes, graph, depth - 1, known)

    if eqn.primitive is p.neg_p:
        inner = of(eqn.invars[0])
        return None if inner is None else lambda: graph.emit(p.neg_p, inner())
    if eqn.primitive in (p.mul_p, p.div_p):
        split = factor(eqn, axes, graph)
        scaled = None if split is None else of(split[0])
        if split is None or scaled is None:
            return None
        scale = split[1]
        return lambda: graph.emit(eqn.primitive, scaled(), scale(), **eqn.params)
    if eqn.primitive in (p.add_p, p.sub_p):
        first = of(eqn.invars[0])
        second = None if first is None else of(eqn.invars[1])
        if first is None or second is None:
            return None
        return lambda: graph.emit(eqn.primitive, first(), second())
    return of_one_hot(eqn, y, axes, graph) if eqn.primitive is p.select_n_p else None


def known_exponential(eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph) -> Expression | None:
    """``Σ exp (x - log Σ exp x)``, a softmax that is computed from its logarithm."""
    difference = graph.definition(eqn.invars[0], p.sub_p)
    shape = shape_of(eqn.outvars[0])
    if difference is None or not is_wide(eqn.outvars[0]):
        return None
    x, subtracted = difference.invars
    view = graph.definition(subtracted)
    if shape_of(x) != shape or view is None or not is_of_kept(view, shape, axes):
        return None
    row = view.invars[0]
    shift = graph.definition(row, p.add_p)
    ways: Any = [(row, None)] if shift is None else [shift.invars, shift.invars[::-1]]
    for logarithm, m in ways:
        log = graph.definition(logarithm, p.log_p)
        if log is not None and _is_sum_of_exponentials(log.invars[0], x, m, shape, axes, graph):
            return functools.partial(graph.emit, p.div_p, log.invars[0], log.invars[0])
    return None


def _is_sum_of_exponentials(
    total: Atom, x: Atom, m: Atom | None, shape: Any, axes: tuple[int, ...], graph: Graph
) -> bool:
    """Whether ``total`` is ``Σ exp x``, or ``Σ exp(x - m)``."""
    reduction = graph.definition(total, p.reduce_sum_p)
    if reduction is None or axes_of(reduction) != axes:
        return False
    exponential = graph.definition(reduction.invars[0], p.exp_p)
    if exponential is None:
        return False
    operand = exponential.invars[0]
    if m is None:
        return operand is x
    difference = graph.definition(operand, p.sub_p)
    view = None if difference is None else graph.definition(difference.invars[1])
    if difference is None or view is None:
        return False
    return difference.invars[0] is x and view.invars[0] is m and is_of_kept(view, shape, axes)
