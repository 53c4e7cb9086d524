"""The tie counts of a maximum whose gradient is zero: they go.

A softmax shifts by its maximum, which changes nothing; where that is not said by
``stop_gradient``, differentiation finds it out: the maximum's gradient is a difference of equal
numbers, spread over the elements that equal the maximum, by their number.

    u - s·(u/s)            ≈ 0·s·(u/s)              zero, or NaN where one of both is not finite
    u/s - s·(u·(1/s²))     ≈ 0·s·(u·(1/s²))
    z / Σ (x == max x)     = z, or NaN where max x is        for z of zeros and NaN
    z · (x == max x)       = z                               for z of zeros and NaN

Each left side is zero, up to the rounding of its terms, or not finite; so is each right side, and
both at the same elements. (Signs of zeros differ.)
"""

from __future__ import annotations

import math

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import is_float, kind, shape_of
from jevt.passes._rules import Graph, Rules
from jevt.passes.reductions.tools import axes_of, is_of_kept, is_wide


def _equal_terms(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``u - s·(u/s)``, ``u/s - s·(u/s²)``: no more than zero."""
    u, y = eqn.invars
    product = graph.definition(y, p.mul_p)
    if product is None or not is_wide(eqn.outvars[0]) or shape_of(u) != shape_of(y):
        return None
    for s, share in (product.invars, product.invars[::-1]):
        if _is_quotient(share, u, s, graph) or _is_square_quotient(share, u, s, graph):
            return graph.mul(y, graph.literal(0.0, y.aval))
    return None


def _is_quotient(share: Atom, u: Atom, s: Atom, graph: Graph) -> bool:
    """Whether ``share = u/s``."""
    quotient = graph.definition(share, p.div_p)
    return quotient is not None and quotient.invars[0] is u and quotient.invars[1] is s


def _is_square_quotient(share: Atom, u: Atom, s: Atom, graph: Graph) -> bool:
    """Whether ``u = v/s`` and ``share = v·(1/s²)``."""
    product, quotient = graph.definition(share, p.mul_p), graph.definition(u, p.div_p)
    if product is None or quotient is None or quotient.invars[1] is not s:
        return False
    for v, inverse in (product.invars, product.invars[::-1]):
        reciprocal = graph.definition(inverse, p.div_p)
        if v is not quotient.invars[0] or reciprocal is None:
            continue
        square = graph.definition(reciprocal.invars[1], p.square_p)
        if graph.constant(reciprocal.invars[0]) == 1 and square is not None:
            return square.invars[0] is s
    return False


def _share(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """Nothing, divided among those that equal the maximum."""
    z, count = eqn.invars
    if not graph.is_null(z) or shape_of(z) != shape_of(count):
        return None
    maximum = _maximum_of_ties(count, graph)
    if maximum is None or shape_of(maximum) != shape_of(z):
        return None
    is_nan = graph.emit(p.ne_p, maximum, maximum)
    nan = graph.full(graph.literal(math.nan, z.aval), shape_of(z))
    return graph.emit(p.select_n_p, is_nan, z, nan)


def _maximum_of_ties(count: Atom, graph: Graph) -> Atom | None:
    """The ``max x`` of ``Σ (x == max x)``."""
    total = graph.definition(count, p.reduce_sum_p)
    if total is None:
        return None
    flags = graph.definition(total.invars[0], p.convert_element_type_p)
    test = None if flags is None else graph.definition(flags.invars[0], p.eq_p)
    for x, view in [] if test is None else [test.invars, test.invars[::-1]]:
        seen = graph.definition(view)
        if seen is None or not is_of_kept(seen, shape_of(x), axes_of(total)):
            continue
        maximum = graph.definition(seen.invars[0])
        if maximum is None or maximum.primitive not in (p.reduce_max_p, p.reduce_min_p):
            continue
        if maximum.invars[0] is x and axes_of(maximum) == axes_of(total):
            return maximum.outvars[0]
    return None


def _spread(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """Nothing, given to some: zeros and NaN times 0 or 1."""
    for z, flags in (eqn.invars, eqn.invars[::-1]):
        cast = graph.definition(flags, p.convert_element_type_p)
        is_flag = cast is not None and kind(cast.invars[0].aval) == "b"
        if is_flag and is_float(z.aval) and graph.is_null(z):
            return z if shape_of(z) == shape_of(eqn.outvars[0]) else None
    return None


RULES: Rules = {p.sub_p: (_equal_terms,), p.div_p: (_share,), p.mul_p: (_spread,)}
