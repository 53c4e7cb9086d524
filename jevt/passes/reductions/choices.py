"""Sums of what is chosen for all summed elements at once.

    Σ_A (c ? x : v)    = c ? Σ_A x  : n·v            where c is constant along A, and v is a number
    Σ_A (c ? x : v)²   = c ? Σ_A x² : n·v²

So is the norm that has a gradient at 0 spelled, as optax's trust ratio has it for each parameter:
Σ (‖x‖ > 0 ? x : 1)², which needs ‖x‖ first, and would take another pass over x. Its root is chosen
where ‖x‖ > 0 again, and what is never read of the inner choice goes, with n:

    c ? √(c ? x : y) : z = c ? √x : z
"""

from __future__ import annotations

import math

import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rules import Graph
from jevt.passes.reductions.tools import axes_of, constant_along, multiple, spread, without


def chosen(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """The choice between two sums."""
    (operand,) = eqn.invars
    shape, axes = shape_of(operand), axes_of(eqn)
    power = graph.definition(operand, p.square_p)
    choice = graph.definition(operand if power is None else power.invars[0], p.select_n_p)
    if choice is None or len(choice.invars) != 3 or kind(operand.aval) != "f":
        return None
    which, *cases = choice.invars
    values = [graph.constant(case) for case in cases]
    condition = constant_along(which, shape, axes, graph)
    if condition is None or [value is None for value in values].count(True) != 1:
        return None
    if any(graph.definition(case, p.exp_p) is not None for case in cases):
        return None  # of a softmax, whose masks are its own
    count, kept = math.prod(shape[axis] for axis in axes), without(shape, axes)
    sums: list[Atom] = []
    for case, value in zip(cases, values, strict=True):
        if value is None:
            of = case if power is None else graph.emit(p.square_p, case, **power.params)
            sums.append(graph.emit(p.reduce_sum_p, of, **eqn.params))
            continue
        total = multiple(value if power is None else np.square(value), count)
        if total is None:
            return None
        sums.append(graph.full(graph.literal(total, operand.aval), kept))
    return graph.emit(p.select_n_p, spread(condition(), kept, graph), *sums)


def decided(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A choice of roots without those that the same condition has ruled out."""
    which, *cases = eqn.invars
    if len(cases) != 2:
        return None
    for position, case in enumerate(cases):
        root = graph.definition(case, p.sqrt_p)
        inner = None if root is None else graph.definition(root.invars[0], p.select_n_p)
        if root is None or inner is None or len(inner.invars) != 3:
            continue
        if not _is_same(inner.invars[0], which, graph):
            continue
        new = list(cases)
        new[position] = graph.emit(p.sqrt_p, inner.invars[1 + position], **root.params)
        return graph.emit(p.select_n_p, which, *new)
    return None


def _is_same(one: Atom, other: Atom, graph: Graph) -> bool:
    """Whether two conditions are one, or will be once equal equations are."""
    if one is other:
        return True
    a, b = graph.definition(one), graph.definition(other)
    if a is None or b is None or (a.primitive, a.params) != (b.primitive, b.params):
        return False
    return all(_is_equal(x, y) for x, y in zip(a.invars, b.invars, strict=True))


def _is_equal(one: Atom, other: Atom) -> bool:
    if isinstance(one, Literal) and isinstance(other, Literal):
        return one.aval == other.aval and bool(np.array_equal(one.val, other.val))
    return one is other
