"""Canonical forms of arithmetic: fewer spellings, the same bits.

Every rule here gives the same number for every operand, NaN, infinities and the sign of zero
included, unless its docstring says otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import is_float, kind, shape_of
from jevt.passes._rules import Graph, Rules


def _negated(atom: Atom, graph: Graph) -> Atom | None:
    """``-atom`` where that costs nothing: of a negation, or of a literal."""
    if isinstance(atom, Literal):
        value = graph.constant(atom) if is_float(atom.aval) else None
        return None if value is None else graph.literal(-value, atom.aval)
    eqn = graph.definition(atom, p.neg_p)
    return eqn.invars[0] if eqn is not None else None


def _is(atom: Atom, number: float, graph: Graph) -> bool:
    """Whether each element is ``number``; 0.0 and -0.0 differ."""
    value = graph.constant(atom)
    if value is None or kind(atom.aval) not in ("f", "i"):
        return False
    return bool(value == number) and (
        kind(atom.aval) == "i" or bool(np.signbit(value)) == (math.copysign(1.0, number) < 0)
    )


def _is_power_of_two(value: Any) -> bool:
    """Whether value and reciprocal are normal powers of two, so that scaling by it is exact."""
    number = float(value)
    if not math.isfinite(number) or number == 0.0:
        return False
    tiny = float(jax.numpy.finfo(value.dtype).tiny)
    mantissa, _ = math.frexp(number)
    return abs(mantissa) == 0.5 and tiny <= abs(number) <= 1.0 / tiny


def _add_any(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``add_any x y`` (autodiff's sum of cotangents) = ``add x y``."""
    is_number = kind(eqn.outvars[0].aval) in ("f", "i", "c")
    return graph.emit(p.add_p, *eqn.invars) if is_number else None


def _add_zero(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x + 0 = x``: of integers, of -0.0, and of 0.0 where x is known not to be -0.0."""
    x, y = eqn.invars
    for a, b in ((x, y), (y, x)):
        if _is(b, -0.0, graph) or (
            _is(b, 0.0, graph) and (kind(a.aval) == "i" or graph.is_nonnegative(a))
        ):
            return a
    return None


def _add_negation(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x + -y = x - y``, which is how floating-point subtraction is defined; y may be a view."""
    if not is_float(eqn.outvars[0].aval):
        return None
    x, y = eqn.invars
    for a, b in ((x, y), (y, x)):
        if (opposite := _opposite(b, graph)) is not None:
            return graph.emit(p.sub_p, a, opposite)
    return None


def _add_self(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x + x = 2·x``: both are exact but for overflow, which they share."""
    x, y = eqn.invars
    is_double = x is y and not isinstance(x, Literal) and is_float(x.aval)
    return graph.mul(x, graph.literal(2.0, x.aval)) if is_double else None


def _opposite(atom: Atom, graph: Graph) -> Atom | None:
    """The y of ``-y``, or of a view of ``-y``."""
    eqn = graph.definition(atom)
    if eqn is None:
        return None
    if eqn.primitive is p.neg_p:
        return eqn.invars[0]
    if eqn.primitive in (p.broadcast_in_dim_p, p.reshape_p) and len(eqn.invars) == 1:
        negated = graph.definition(eqn.invars[0], p.neg_p)
        if negated is not None:
            return graph.emit(eqn.primitive, negated.invars[0], **eqn.params)
    return None


def _sub(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x - 0 = x`` (not ``0 - x``, nor ``x - -0.0``: the sign of zero), ``x - -y = x + y``."""
    x, y = eqn.invars
    if _is(y, 0.0, graph):
        return x
    opposite = _opposite(y, graph) if is_float(eqn.outvars[0].aval) else None
    return None if opposite is None else graph.emit(p.add_p, x, opposite)


def _neg(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``--x = x``, ``-(x·c) = x·(-c)``, ``-(x/c) = x/(-c)``, ``-(c/x) = (-c)/x``."""
    (x,) = eqn.invars
    if not is_float(x.aval):
        return None
    if (result := _negated(x, graph)) is not None:
        return result
    inner = graph.definition(x)
    if inner is not None and inner.primitive in (p.mul_p, p.div_p):
        a, b = inner.invars
        if isinstance(b, Literal) and (negated := _negated(b, graph)) is not None:
            return graph.emit(inner.primitive, a, negated, **inner.params)
        if isinstance(a, Literal) and (negated := _negated(a, graph)) is not None:
            return graph.emit(inner.primitive, negated, b, **inner.params)
    return None


def _mul_one(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x · 1 = x``; ``x · -1 = -x``; ``x · 0 = 0`` of integers only."""
    x, y = eqn.invars
    for a, b in ((x, y), (y, x)):
        if _is(b, 1.0, graph):
            return a
        if _is(b, -1.0, graph) and is_float(a.aval):
            return graph.emit(p.neg_p, a)
        if _is(b, 0, graph) and kind(a.aval) == "i":
            return graph.full(graph.literal(0, b.aval), shape_of(eqn.outvars[0]))
    return None


def _product_of_negations(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``-x · -y = x · y``, ``-x · c = x · -c``, and the same of quotients."""
    x, y = eqn.invars
    if not is_float(eqn.outvars[0].aval) or (isinstance(x, Literal) and isinstance(y, Literal)):
        return None
    a, b = _negated(x, graph), _negated(y, graph)
    return None if a is None or b is None else graph.emit(eqn.primitive, a, b, **eqn.params)


def _mul_self(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x · x = x²``."""
    x, y = eqn.invars
    is_square = x is y and kind(x.aval) in ("f", "i")
    return graph.emit(p.square_p, x) if is_square else None


def _scale_of_scale(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``(x · c) · d = x · (c·d)`` where one of c and d is a power of two.

    Then ``c·d`` is exact, and the product is rounded once in place of at most twice. Left alone
    where ``x · c`` could overflow although ``x · c · d`` does not.
    """
    (x, d), (y, c) = _with_literal(eqn), (None, None)
    if x is None or d is None:
        return None
    inner = graph.definition(x, p.mul_p)
    if inner is not None:
        y, c = _with_literal(inner)
    if y is None or c is None or not is_float(eqn.outvars[0].aval):
        return None
    first, second = graph.constant(c), graph.constant(d)
    if not (_is_power_of_two(first) or _is_power_of_two(second)):
        return None
    product = float(first) * float(second)
    tiny = float(jax.numpy.finfo(first.dtype).tiny)
    exact = tiny <= abs(product) <= float(jax.numpy.finfo(first.dtype).max)
    overflows_early = abs(float(first)) > 1.0 and abs(float(second)) < 1.0
    return None if overflows_early or not exact else graph.mul(y, graph.literal(product, c.aval))


def _with_literal(eqn: JaxprEqn) -> tuple[Any, Any]:
    """The operands of a commutative equation as (variable, literal); Nones if they are not."""
    a, b = eqn.invars
    if isinstance(a, Literal):
        a, b = b, a
    is_scaling = isinstance(b, Literal) and not isinstance(a, Literal) and shape_of(b) == ()
    return (a, b) if is_scaling else (None, None)


def _div_by_constant(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x / c = x · (1/c)`` where c is a power of two: both are the same number, rounded once.

    Other constants stay divisors: ``x · (1/c)`` would round twice.
    """
    x, y = eqn.invars
    divisor = graph.uniform(y)
    if divisor is None or not is_float(y.aval) or shape_of(x) != shape_of(eqn.outvars[0]):
        return None
    value = graph.constant(divisor)
    if float(value) == 1.0:
        return x
    if not _is_power_of_two(value):
        return None
    return graph.mul(x, graph.literal(1.0 / float(value), divisor.aval))


def _integer_pow(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """Small powers as products, in the order in which XLA multiplies."""
    (x,), y = eqn.invars, eqn.params["y"]
    if kind(x.aval) not in ("f", "i") or (kind(x.aval) == "i" and y < 0):
        return None
    if y == 1:
        return x
    if y == -1:
        return graph.emit(p.div_p, graph.literal(1, x.aval), x)
    if abs(y) not in (2, 3, 4):
        return None
    result = graph.emit(p.square_p, x)
    if abs(y) == 3:
        result = graph.mul(x, result)
    elif abs(y) == 4:
        result = graph.emit(p.square_p, result)
    return result if y > 0 else graph.emit(p.div_p, graph.literal(1, x.aval), result)


def _square(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``(-x)² = |x|² = x²``."""
    inner = graph.definition(eqn.invars[0])
    is_real = inner is not None and kind(inner.invars[0].aval) in ("f", "i")
    if is_real and inner is not None and inner.primitive in (p.neg_p, p.abs_p):
        return graph.emit(p.square_p, inner.invars[0])
    return None


def _abs(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``|x| = x`` where x cannot be negative, as a sum of exponentials; ``|-x| = |x|``."""
    (x,) = eqn.invars
    if graph.is_nonnegative(x):
        return x
    inner = graph.definition(x, p.neg_p)
    return graph.emit(p.abs_p, inner.invars[0]) if inner is not None and is_float(x.aval) else None


def _max_of_lowest(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``max(-∞, x) = x``, ``min(∞, x) = x``: NaN is NaN on either side."""
    sign = -1 if eqn.primitive is p.max_p else 1
    x, y = eqn.invars
    for a, b in ((x, y), (y, x)):
        if (bound := graph.constant(b)) is None:
            continue
        if is_float(b.aval) and float(bound) == sign * math.inf:
            return a
        if kind(b.aval) == "i":
            limits = jax.numpy.iinfo(bound.dtype)
            if int(bound) == int(limits.min if sign < 0 else limits.max):
                return a
    return x if x is y else None


RULES: Rules = {
    p.add_jaxvals_p: (_add_any,),
    p.add_p: (_add_zero, _add_negation, _add_self),
    p.sub_p: (_sub,),
    p.neg_p: (_neg,),
    p.mul_p: (_mul_one, _product_of_negations, _mul_self, _scale_of_scale),
    p.div_p: (_div_by_constant, _product_of_negations),
    p.integer_pow_p: (_integer_pow,),
    p.square_p: (_square,),
    p.abs_p: (_abs,),
    p.max_p: (_max_of_lowest,),
    p.min_p: (_max_of_lowest,),
}
