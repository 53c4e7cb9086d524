"""Canonical forms of choices and of boolean arithmetic.

The same values for every operand; a rule that needs more than that says what it relies on.
"""

from __future__ import annotations

import math

from jax.extend.core import JaxprEqn, Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import follows_nan, is_float, kind, shape_of
from jevt.passes._rules import Graph, Rules


def _select_constant(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A choice between equal cases, or by a constant."""
    which, *cases = eqn.invars
    if all(case is cases[0] for case in cases):
        return cases[0]
    constant = graph.constant(which)
    if constant is None or not 0 <= int(constant) < len(cases):
        return None
    return cases[int(constant)]


def _select_not(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``not c ? b : a  =  c ? a : b``."""
    which, *cases = eqn.invars
    inner = graph.definition(which, p.not_p)
    if inner is None or len(cases) != 2 or kind(which.aval) != "b":
        return None
    return graph.emit(p.select_n_p, inner.invars[0], cases[1], cases[0])


def _select_of_select(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``c ? (c ? x : y) : z  =  c ? x : z``."""
    which, *cases = eqn.invars
    if len(cases) != 2:
        return None
    new = list(cases)
    for i, case in enumerate(cases):
        inner = graph.definition(case, p.select_n_p)
        if inner is not None and inner.invars[0] is which:
            new[i] = inner.invars[1 + i]
    same = all(a is b for a, b in zip(new, cases, strict=True))
    return None if same else graph.emit(p.select_n_p, which, *new)


def _select_nan(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``isnan(d) ? b : a = a`` where both a and b are NaN wherever d is.

    The guard of ``logaddexp``, once its second operand is known to be finite.
    """
    which, *cases = eqn.invars
    test = graph.definition(which, p.ne_p)
    if test is None or test.invars[0] is not test.invars[1] or len(cases) != 2:
        return None
    tested = test.invars[0]
    if shape_of(tested) != shape_of(eqn.outvars[0]) or not is_float(tested.aval):
        return None
    follow = all(follows_nan(case, tested, graph.definition) for case in cases)
    return cases[0] if follow else None


def _difference_of_selects(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``(c ? y : 0) - (c ? 0 : y) = y`` where ``c = (s ≥ 0)`` is false only for NaN, and y is NaN
    then.

    What differentiating ``|s|`` leaves of a sum s of exponentials: where s is NaN, both sides are.
    """
    kept, lost = (graph.definition(a, p.select_n_p) for a in eqn.invars)
    if kept is None or lost is None or kept.invars[0] is not lost.invars[0]:
        return None
    if len(kept.invars) != 3 or kept.invars[2] is not lost.invars[1]:
        return None
    value = kept.invars[2]
    zeros = (kept.invars[1], lost.invars[2])
    test = graph.definition(kept.invars[0], p.ge_p)
    if test is None or any(not _is_plus_zero(zero, graph) for zero in zeros):
        return None
    tested, bound = test.invars
    sure = (
        _is_plus_zero(bound, graph)
        and graph.is_nonnegative(tested)
        and shape_of(tested) == shape_of(value)
        and follows_nan(value, tested, graph.definition)
    )
    return value if sure else None


def _sum_of_selects(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``(c ? x : 0) - (c ? 0 : y) = c ? x : 0 - y``, ``(c ? x : 0)·k + (c ? 0 : y) = c ? x·k : y``.

    What differentiating ``|x|``, ``where`` and the activations that are made of it leaves, where
    the branches go on alike. A sum differs in the sign of a zero at most: -0.0 stays, where
    -0.0 + 0.0 is 0.0.
    """
    first, second = (_scaled_select(atom, graph) for atom in eqn.invars)
    if first is None or second is None or first[0].invars[0] is not second[0].invars[0]:
        return None
    (a, by), (b, times) = first, second
    for i, j in ((1, 2), (2, 1)):
        x, y, zeros = a.invars[i], b.invars[j], (a.invars[j], b.invars[i])
        if not all(_is_plus_zero(zero, graph) for zero in zeros):
            continue
        x, y = (v if k is None else graph.mul(v, k) for v, k in ((x, by), (y, times)))
        if eqn.primitive is p.sub_p:
            y = graph.emit(p.sub_p, graph.literal(0.0, y.aval), y)
        return graph.emit(p.select_n_p, a.invars[0], *((x, y) if i == 1 else (y, x)))
    return None


def _scaled_select(atom: Atom, graph: Graph) -> tuple[JaxprEqn, Literal | None] | None:
    """A choice between two, and the positive number that scales it."""
    if not is_float(atom.aval):
        return None
    scale: Literal | None = None
    product = graph.definition(atom, p.mul_p)
    if product is not None:
        x, y = product.invars
        atom, k = (x, y) if isinstance(y, Literal) else (y, x)
        if not isinstance(k, Literal) or not 0.0 < float(graph.constant(k)) < math.inf:
            return None
        scale = k
    choice = graph.definition(atom, p.select_n_p)
    return None if choice is None or len(choice.invars) != 3 else (choice, scale)


def _is_plus_zero(atom: Atom, graph: Graph) -> bool:
    value = graph.constant(atom)
    return value is not None and float(value) == 0.0 and math.copysign(1.0, float(value)) > 0


def _logic(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x and x = x``, ``x and True = x``, ``x and False = False``, and the duals; of booleans."""
    x, y = eqn.invars
    if kind(x.aval) != "b":
        return None
    if x is y:
        return x
    neutral = eqn.primitive is p.and_p
    for a, b in ((x, y), (y, x)):
        constant = graph.constant(b)
        if constant is not None and bool(constant) is neutral:
            return a
        if constant is not None:
            return graph.full(graph.literal(constant, b.aval), shape_of(eqn.outvars[0]))
    return None


def _not(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``not not x = x``."""
    inner = graph.definition(eqn.invars[0], p.not_p)
    return inner.invars[0] if inner is not None else None


def _compare_self(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x = x`` and the like of integers; a NaN is not equal to itself."""
    x, y = eqn.invars
    if x is not y or kind(x.aval) not in ("i", "b"):
        return None
    value = graph.literal(eqn.primitive in (p.eq_p, p.ge_p, p.le_p), eqn.outvars[0].aval)
    return graph.full(value, shape_of(eqn.outvars[0]))


def _is_nan_of_negation(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``isnan(-x) = isnan(|x|) = isnan(x)``, spelled ``x ≠ x``."""
    x, y = eqn.invars
    inner = graph.definition(x)
    if x is not y or inner is None or inner.primitive not in (p.neg_p, p.abs_p):
        return None
    (source,) = inner.invars
    return graph.emit(eqn.primitive, source, source) if is_float(source.aval) else None


RULES: Rules = {
    p.select_n_p: (_select_constant, _select_not, _select_of_select, _select_nan),
    p.sub_p: (_difference_of_selects, _sum_of_selects),
    p.add_p: (_sum_of_selects,),
    p.and_p: (_logic,),
    p.or_p: (_logic,),
    p.not_p: (_not,),
    p.eq_p: (_compare_self, _is_nan_of_negation),
    p.ne_p: (_compare_self, _is_nan_of_negation),
    **dict.fromkeys((p.lt_p, p.le_p, p.gt_p, p.ge_p), (_compare_self,)),
}
