"""The composite equations in the place of what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Primitive, Var, new_jaxpr_eqn
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph
from jevt.passes.raising.gradients import Gradient
from jevt.passes.raising.norms import Norm
from jevt.passes.raising.terms import Sum
from jevt.primitives.norms import norm_gradient_p, norm_statistics_p


class NormWriter:
    """Writes a norm's statistics and, later in the program, its gradient."""

    def __init__(self, norm: Norm, gradient: Gradient | None, graph: Graph) -> None:
        self.norm = norm
        self.gradient = gradient
        self.graph = graph
        self._rows: list[Atom] = []  # mean, where there is one, and rstd
        self._dx: Atom | None = None

    def statistics(self) -> None:
        norm = self.norm
        source = norm.program.eqns[norm.root]
        x = read(self.graph.env, norm.x)
        results = composite(
            self.graph,
            source,
            norm_statistics_p,
            [x],
            axes=norm.axes,
            epsilon=norm.epsilon,
            centred=norm.centred,
            two_pass=norm.two_pass,
        )
        names = ("mean", "variance", "rstd") if norm.centred else ("meansquare", "rrms")
        known = dict(zip(names, results, strict=True))
        self._rows = [known["mean"], known["rstd"]] if norm.centred else [known["rrms"]]
        for var, (name, factor) in norm.results.items():
            self._stand_for(var, known[name], factor)

    def sums(self) -> None:
        """Writes the gradient, and what others read of its sums."""
        norm, gradient, graph = self.norm, self.gradient, self.graph
        assert gradient is not None
        graph.place(gradient.source)
        x = read(graph.env, norm.x)
        g = graph.reshape(read(graph.env, gradient.g), shape_of(norm.x))
        scales = [graph.reshape(read(graph.env, v), shape) for v, shape in gradient.scales]
        dx, *sums = composite(
            graph,
            gradient.source,
            norm_gradient_p,
            [x, *self._rows, g, *scales],
            axes=norm.axes,
            summed=gradient.summed,
            centred=norm.centred,
            two_pass=norm.two_pass,
        )
        self._dx = dx
        known = dict(zip(("sum_g", "sum_gc")[-len(sums) :], sums, strict=True))
        for var, part in gradient.sums.items():
            value = known[part.name]
            graph.place(gradient.source)
            if part.with_rstd:
                value = graph.mul(value, self._rows[-1])
            if part.over:
                value = graph.emit(p.reduce_sum_p, value, axes=part.over, out_sharding=None)
            self._stand_for(var, value, part.factor)

    def sum(self) -> None:
        """Writes the sum in which the gradient ends."""
        assert self.gradient is not None and self._dx is not None
        self.graph.place(self.gradient.source)
        total = self.gradient.sum
        self.graph.env[total.root] = summed(total, self._dx, self.graph)

    def _stand_for(self, var: Var, value: Atom, factor: float) -> None:
        """Puts ``factor·value`` in the place of a value of the program."""
        graph = self.graph
        graph.place(self.norm.program.eqns[self.norm.program.maker[var]])
        if abs(factor - 1.0) > 1e-6:
            value = graph.mul(value, number(_tidy(factor), value, graph))
        graph.env[var] = cast(graph.reshape(value, shape_of(var)), var, graph)


def _tidy(factor: float) -> float:
    """A whole number, or the reciprocal of one, where the factor is one but for roundings."""
    for value, back in ((factor, lambda v: v), (1 / factor, lambda v: 1 / v)):
        whole = round(value)
        if whole and abs(value - whole) <= 1e-6 * abs(whole):
            return float(back(whole))
    return factor


def summed(total: Sum, dx: Atom, graph: Graph) -> Atom:
    """The gradient and the other terms, in the order in which the program adds these."""
    root = total.root
    result: Atom | None = None
    for sign, var in (*total.others, (1, None)):
        value = cast(graph.reshape(dx, shape_of(root)), root, graph) if var is None else var
        value = cast(read(graph.env, value) if isinstance(value, Var) else value, root, graph)
        if result is None:
            result = value if sign > 0 else graph.emit(p.neg_p, value)
        else:
            result = graph.emit(p.add_p if sign > 0 else p.sub_p, result, value)
    assert result is not None
    return result


def cast(value: Atom, like: Any, graph: Graph) -> Atom:
    """``value`` in the type of the variable ``like``."""
    return graph.convert(value, like.aval.dtype)


def number(value: float, like: Atom, graph: Graph) -> Atom:
    """A number in the type of ``like``, cast to vary over the same axes of a mesh."""
    aval: Any = like.aval
    literal = graph.literal(value, aval)
    axes = internals.manual_axes_of(aval)
    if not axes:
        return literal
    out, source = Var(internals.array_like(aval, (), aval.dtype)), graph.source
    params = {"axes": tuple(sorted(axes))}
    graph.add(
        new_jaxpr_eqn(
            [literal], [out], internals.pvary_p, params, set(), source.source_info, source.ctx
        )
    )
    return out


def composite(
    graph: Graph, source: JaxprEqn, primitive: Primitive, operands: Sequence[Atom], **params: Any
) -> list[Atom]:
    """The results of a new equation of several results, at the place of ``source``."""
    avals: list[Any] = [a.aval for a in operands]
    inside_mesh = any(not aval.sharding.mesh.empty for aval in avals)
    with source.ctx.manager if inside_mesh else contextlib.nullcontext():
        types, _ = primitive.abstract_eval(*avals, **params)
    results = [Var(aval) for aval in types]
    graph.add(
        new_jaxpr_eqn(
            list(operands), results, primitive, params, set(), source.source_info, source.ctx
        )
    )
    return list(results)
