"""The derivative of softplus as ``logistic``.

``jax.nn.softplus``, ``log_sigmoid`` and the sigmoid cross entropies of optax are
``logaddexp(x, 0)``. JAX differentiates that into ``exp(x' - y')``, where y is the softplus of x and
the primes put 0 for ∞:

    y = max(x, 0) + log1p(exp(-|x|))        exp(x - y) = eˣ / (1 + eˣ) = logistic(x)

At x = ∞ both are exp(0 - 0) = 1; at -∞ both are 0; NaN stays NaN. The difference of two rounded
numbers, whose exponential is taken, has an error of ``ulp(y)``, so ``logistic`` is the more
precise of the two, but for results below the smallest normal number, which it may round to zero.
And it needs no logarithm: a gradient without its loss reads x alone.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._rules import Graph, Rules


def _exp(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    difference = graph.definition(eqn.invars[0], p.sub_p)
    if difference is None:
        return None
    x, y = (_without_infinity(a, graph) for a in difference.invars)
    if x is None or y is None or not _is_softplus(y, x, graph):
        return None
    return graph.emit(p.logistic_p, x, accuracy=None)


def _without_infinity(atom: Atom, graph: Graph) -> Atom | None:
    """The x of ``x == ∞ ? 0 : x``."""
    choice = graph.definition(atom, p.select_n_p)
    if choice is None or len(choice.invars) != 3:
        return None
    which, x, zero = choice.invars
    test = graph.definition(which, p.eq_p)
    found = test is not None and test.invars[0] is x and _is(test.invars[1], math.inf, graph)
    return x if found and _is(zero, 0.0, graph) else None


def _is_softplus(y: Atom, x: Atom, graph: Graph) -> bool:
    """Whether ``y = max(x, 0) + log1p(exp(-|x|))``."""
    total = graph.definition(y, p.add_p)
    if total is None:
        return False
    for a, b in (total.invars, total.invars[::-1]):
        maximum, logarithm = graph.definition(a, p.max_p), graph.definition(b, p.log1p_p)
        if maximum is None or logarithm is None:
            continue
        exponential = graph.definition(logarithm.invars[0], p.exp_p)
        negative = exponential and graph.definition(exponential.invars[0], p.neg_p)
        size = negative and graph.definition(negative.invars[0], p.abs_p)
        operands: Any = maximum.invars
        is_positive_part = any(m is x and _is(n, 0.0, graph) for m, n in (operands, operands[::-1]))
        if size and is_positive_part:
            return size.invars[0] is x or _is_negation(size.invars[0], x, graph)
    return False


def _is_negation(a: Atom, b: Atom, graph: Graph) -> bool:
    return any(
        (eqn := graph.definition(c, p.neg_p)) is not None and eqn.invars[0] is d
        for c, d in ((a, b), (b, a))
    )


def _is(atom: Atom, number: float, graph: Graph) -> bool:
    value = graph.constant(atom)
    return value is not None and float(value) == number


RULES: Rules = {p.exp_p: (_exp,)}
