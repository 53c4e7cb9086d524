"""Composite equations that no kernel or library takes whole become their one best spelling.

Purpose: the partitioner and the kernels work on plain equations, and hold a norm together, or keep
a batch norm's statistics and its normalisation apart, as the cost model says. What raising has
gained is the spelling. Over n elements, with c = x - mean:

    norm_statistics   mean = Σx/n
                      variance = Σc²/n              where a row is on chip, or the program says so
                               = max(0, Σx²/n - mean²)     else: both sums in one pass over x
                      rstd = rsqrt(variance + ε)
    norm_gradient     sum_g = Σγ'g, sum_gc = Σγ'gc        γ': the scales that vary along the row
                      of a group norm in two steps, first without γ', over height and width
                      dx = rstd·γ·((γ'g - sum_g/n) - c·a)           a = rstd²·sum_gc/n
                         = (k·γ'g - x·(k·a)) + k·(a·mean - sum_g/n)   k = rstd·γ

    softmax_statistics  maximum = max x              0 where that is not finite, if guarded
                        total = Σexp(x - maximum)
    softmax_gradient    p = exp(x - maximum)/total
                        dx = p·(g - Σp·g)                        where a row is on chip
                           = p·(g - Σ(exp(x - maximum)·g)/total)         else

The second dx of a norm is for rows that are not on chip, whose numbers come through memory, of
programs that take the variance in one pass: its rounding error grows with the mean as that of such
a variance does.

Invariant: the values of the primitives' references. Scopes and source lines of the composite stay.

    before  { lambda ; x:f32[8,64]. let m:f32[8] v:f32[8] r:f32[8] = norm_statistics[axes=(1,) …] x
              in (m, r) }
    after   { lambda ; x:f32[8,64]. let
                m:f32[8] = mul (reduce_sum[axes=(1,)] x) 0.015625; c:f32[8,64] = sub x (reshape m)
                v:f32[8] = mul (reduce_sum[axes=(1,)] (square c)) 0.015625
                r:f32[8] = rsqrt (add v 1e-06) in (m, r) }
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes import canonicalize
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes._rules import Graph
from jevt.passes.raising.rows import along, exponential, on_chip
from jevt.passes.raising.write import cast, number
from jevt.primitives.norms import norm_gradient_p, norm_statistics_p, varies
from jevt.primitives.softmax import softmax_gradient_p, softmax_statistics_p


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Expands the composites of ``jaxpr`` and of its bodies."""
    body = once(lambda inner: _run(inner, body))
    return _run(jaxpr, body)


def _run(jaxpr: Jaxpr, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    graph = Graph(jaxpr, canonicalize.RULES)
    if not any(eqn.primitive in EXPANSIONS for eqn in jaxpr.eqns):
        return rebuild(jaxpr, [map_bodies(eqn, body) for eqn in jaxpr.eqns], {})
    for eqn in jaxpr.eqns:
        whole = map_bodies(substitute(graph.env, eqn), body)
        expansion = EXPANSIONS.get(eqn.primitive)
        if expansion is None:
            graph.add(whole)
            continue
        graph.place(whole)
        graph.env.update(zip(whole.outvars, expansion(whole, graph), strict=True))
    return rebuild(jaxpr, graph.eqns, graph.env)


class _Rows:
    """Arithmetic on an array and on one value for each of its rows."""

    def __init__(self, shape: Sequence[int], axes: tuple[int, ...], graph: Graph) -> None:
        self.axes = axes
        self.graph = graph
        self.n = math.prod(shape[axis] for axis in axes)
        self._placed = tuple(1 if axis in axes else n for axis, n in enumerate(shape))

    def sum(self, x: Atom) -> Atom:
        return self.graph.emit(p.reduce_sum_p, x, axes=self.axes, out_sharding=None)

    def over_n(self, row: Atom) -> Atom:
        return self.graph.emit(p.div_p, row, number(self.n, row, self.graph))

    def along(self, row: Atom) -> Atom:
        """A row's values with axes of size 1 in the place of the others."""
        return self.graph.reshape(row, self._placed)

    def square(self, x: Atom) -> Atom:
        return self.graph.emit(p.square_p, x)

    def sub(self, x: Atom, y: Atom) -> Atom:
        return self.graph.emit(p.sub_p, x, y)


def _statistics(eqn: JaxprEqn, graph: Graph) -> list[Atom]:
    (x,), params = eqn.invars, eqn.params
    rows = _Rows(shape_of(x), params["axes"], graph)
    results = []
    if params["centred"]:
        mean = rows.over_n(rows.sum(x))
        if params["two_pass"] or on_chip(shape_of(x), params["axes"]):
            centred = rows.sub(x, rows.along(mean))
            variance = rows.over_n(rows.sum(rows.square(centred)))
        else:
            squares = rows.over_n(rows.sum(rows.square(x)))
            zero = number(0.0, squares, graph)
            variance = graph.emit(p.max_p, zero, rows.sub(squares, rows.square(mean)))
        results.append(mean)
    else:
        variance = rows.over_n(rows.sum(rows.square(x)))
    shifted = variance
    if params["epsilon"]:
        shifted = graph.emit(p.add_p, variance, number(params["epsilon"], variance, graph))
    return [*results, variance, graph.emit(p.rsqrt_p, shifted, accuracy=None)]


def _gradient(eqn: JaxprEqn, graph: Graph) -> list[Atom]:
    x, *rest = eqn.invars
    axes, centred = eqn.params["axes"], eqn.params["centred"]
    (*means, rstd), g, scales = rest[: 1 + centred], rest[1 + centred], rest[2 + centred :]
    rows = _Rows(shape_of(x), axes, graph)
    c = rows.sub(x, rows.along(means[0])) if centred else x
    g = cast(g, x, graph)
    scales = [cast(scale, x, graph) for scale in scales]
    outer = rows.along(rstd)
    summed = eqn.params["summed"]
    for scale in scales:
        if not varies(shape_of(scale), axes):
            outer = graph.mul(outer, scale)
        elif varies(shape_of(scale), summed):
            g = graph.mul(g, scale)
    parts = _Rows(shape_of(x), summed, graph)
    results = [parts.sum(g)] if centred else []
    results.append(parts.sum(graph.mul(c, g)))
    sums = results
    if summed != axes:
        placed = [parts.along(part) for part in results]
        for scale in scales:
            if varies(shape_of(scale), axes) and not varies(shape_of(scale), summed):
                g = graph.mul(g, scale)
                placed = [graph.mul(part, scale) for part in placed]
        sums = [rows.sum(part) for part in placed]
    a = rows.over_n(graph.mul(rows.square(rstd), sums[-1]))
    if eqn.params["two_pass"] or not centred or on_chip(shape_of(x), axes):
        dx = rows.sub(g, rows.along(rows.over_n(sums[0]))) if centred else g
        return [graph.mul(rows.sub(dx, graph.mul(c, rows.along(a))), outer), *results]
    # Rows of numbers pass through memory from the sums to here: as few as can be.
    slope = graph.mul(outer, rows.along(a))
    shift = graph.mul(outer, rows.along(rows.over_n(sums[0])))
    shift = rows.sub(graph.mul(slope, rows.along(means[0])), shift)
    dx = rows.sub(graph.mul(g, outer), graph.mul(x, slope))
    return [graph.emit(p.add_p, dx, shift), *results]


def _softmax(eqn: JaxprEqn, graph: Graph) -> list[Atom]:
    (x,), axes = eqn.invars, eqn.params["axes"]
    rows = _Rows(shape_of(x), axes, graph)
    maximum = graph.emit(p.reduce_max_p, x, axes=axes, out_sharding=None)
    if eqn.params["guarded"]:
        zero = graph.broadcast(number(0.0, maximum, graph), shape_of(maximum), ())
        maximum = graph.emit(p.select_n_p, graph.emit(p.is_finite_p, maximum), zero, maximum)
    return [maximum, rows.sum(exponential(x, maximum, axes, graph))]


def _softmax_gradient(eqn: JaxprEqn, graph: Graph) -> list[Atom]:
    x, maximum, total, g = eqn.invars
    axes = eqn.params["axes"]
    rows = _Rows(shape_of(x), axes, graph)
    exp, g = exponential(x, maximum, axes, graph), cast(g, x, graph)
    probability = graph.emit(p.div_p, exp, along(total, x, axes, graph))
    if on_chip(shape_of(x), axes):
        inner = rows.sum(graph.mul(probability, g))
    else:
        # A sum that does not wait for the total can share a pass over the rows with it.
        inner = graph.emit(p.div_p, rows.sum(graph.mul(exp, g)), total)
    return [graph.mul(probability, rows.sub(g, rows.along(inner)))]


#: What replaces a composite equation: emits the others, and returns its results.
EXPANSIONS: Mapping[Primitive, Callable[[JaxprEqn, Graph], list[Atom]]] = {
    norm_statistics_p: _statistics,
    norm_gradient_p: _gradient,
    softmax_statistics_p: _softmax,
    softmax_gradient_p: _softmax_gradient,
}
