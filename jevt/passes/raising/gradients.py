"""The gradient that belongs to a norm's statistics.

From a sum's terms back, what depends on x and its statistics alone is known, what is small and
depends on neither is a scale; each value through which all of the rest goes may be the cotangent g.
Evaluation tells whether the terms are the norm's gradient of g times the scales.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jax.extend.core import JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt.passes._facts import is_float, shape_of
from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import Program
from jevt.passes.attention.values import Named
from jevt.passes.raising import norms, search
from jevt.passes.raising.cones import Cone, Kind, Origins, size
from jevt.passes.raising.norms import Norm
from jevt.passes.raising.small import Evaluation, dimensions, ratio, same, times
from jevt.passes.raising.terms import Sum


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The gradient of a norm, found.

    Attributes:
      norm: whose.
      sum: in which it ends.
      g: the cotangent.
      scales: factors of the cotangent, with their shapes among the axes of x.
      sums: values that are multiples of sums: the sum, a factor, and whether rstd is one as well.
      source: an equation of it, for place and scopes.
    """

    norm: Norm
    sum: Sum
    g: Var
    scales: tuple[tuple[Var, tuple[int, ...]], ...]
    sums: dict[Var, tuple[str, float, bool]]
    source: JaxprEqn

    def position(self) -> int:
        """Before which equation everything is needed."""
        maker = self.norm.program.maker
        return min(maker[v] for v in (self.sum.root, *self.sums))


def find(norm: Norm) -> Gradient | None:
    """The gradient of a norm; None if nothing looks like one.

    Raises:
      NoMatch: something looks like one and is none, or it would not pay to replace it.
    """
    return search.first(_candidates(norm), functools.partial(_of_cotangent, norm))


def _candidates(norm: Norm) -> Iterator[tuple[Origins, Sum]]:
    statistics = norm.statistics()
    for lax in (False, True):
        origins = Origins(norm.program, norm.origin, statistics, lax=lax)
        for total in search.totals(origins, statistics):
            yield origins, total


def _of_cotangent(norm: Norm, origins: Origins, total: Sum, cone: Cone) -> Gradient:
    program, g = norm.program, cone.source
    if not is_float(g.aval):
        raise NoMatch("a cotangent that is not of floating-point type")
    positions = set(cone.positions)
    origins.expand(norm.x, positions)
    beside = set(_beside(program, origins, g))
    for position in beside:
        for atom in program.eqns[position].invars:
            if atom is not g and origins.kind(atom) is not Kind.OTHER:
                origins.expand(atom, positions)
    positions |= beside
    run = Evaluation(program, sorted(positions), alike=[var for _, var in total.terms])
    run.run()
    scales = list(_scales(program, positions, {norm.origin, g}))
    axes = run.axes(norm.x)
    names = run.names(norm.x)
    over = [name for axis in norm.axes for name in axes[axis]]
    inner = [v for v in scales if not set(over).isdisjoint(run.names(v))]
    full = times(run.value(g), *(run.value(v) for v in scales))
    part = times(run.value(g), *(run.value(v) for v in inner))
    if set(full.names) != set(names):
        raise NoMatch("a cotangent with other axes")
    x = run.value(norm.x)
    if not all(set(names).issuperset(run.value(var).names) for _, var in total.terms):
        raise NoMatch("terms with other axes")
    values = [sign * run.value(var).along(names) for sign, var in total.terms]
    got = Named(names, np.broadcast_to(sum(values), x.array.shape))
    known = norms.statistics(run, x, over, norm.epsilon)
    if not same(got, _formula(run, norm, x, full, known, over)):
        raise NoMatch("not the gradient of these statistics")
    if any(list(run.names(v)) != list(names) for v in (g, total.root) if v in run.labels.axes):
        raise NoMatch("a cotangent whose axes are in another order")
    shapes = []
    for scale in scales:
        places = dimensions(run.names(scale), axes)
        if places is None:
            raise NoMatch("a scale whose axes are in another order")
        shape = shape_of(norm.x)
        shapes.append(tuple(n if i in places else 1 for i, n in enumerate(shape)))
    inside = search.inside(origins, total, positions)
    found = Gradient(
        norm,
        total,
        g,
        tuple(zip(scales, shapes, strict=True)),
        _sums(norm, origins, run, inside, _known_sums(run, norm, x, part, known, over)),
        program.eqns[search.last_sum(program, inside)],
    )
    operands = (norm.x, g, total.root, *scales)
    if not norms.same_mesh(*operands):
        raise NoMatch("values that vary over different axes of a mesh, or are sharded")
    search.check_sums(origins, inside, {total.root, *found.sums}, 1 + norm.centred)
    return found


def _beside(program: Program, origins: Origins, g: Var) -> Iterator[int]:
    """Sums of the cotangent times something known, of which the gradient may give the values."""
    for product in program.readers.get(g, ()):
        eqn = program.eqns[product]
        if eqn.primitive is not p.mul_p or eqn.invars[0] is eqn.invars[1]:
            continue
        (other,) = (a for a in eqn.invars if a is not g)
        if origins.kind(other) not in (Kind.DATA, Kind.STATISTIC):
            continue
        for reader in program.readers.get(eqn.outvars[0], ()):
            if program.eqns[reader].primitive is p.reduce_sum_p:
                yield from (product, reader)


def _formula(
    run: Evaluation,
    norm: Norm,
    x: Named,
    g: Named,
    known: dict[str, Named],
    over: list[norms.Factor],
) -> Named:
    """The gradient of a norm without scales."""
    names, n = x.names, run.count(over)
    c = _centred(norm, x, known)
    rstd = known["rstd" if norm.centred else "rrms"]
    inner = run.sum(times(g, c, rstd), over).along(names) / n
    result = g.along(names) - c.array * rstd.along(names) * inner
    if norm.centred:
        result = result - run.sum(g, over).along(names) / n
    return Named(names, result * rstd.along(names))


def _centred(norm: Norm, x: Named, known: dict[str, Named]) -> Named:
    return Named(x.names, x.array - known["mean"].along(x.names)) if norm.centred else x


def _known_sums(
    run: Evaluation,
    norm: Norm,
    x: Named,
    g: Named,
    known: dict[str, Named],
    over: list[norms.Factor],
) -> dict[tuple[str, bool], Named]:
    """The sums that the composite gives, without and with rstd."""
    found = {"sum_gc": run.sum(times(g, _centred(norm, x, known)), over)}
    if norm.centred:
        found["sum_g"] = run.sum(g, over)
    rstd = known["rstd" if norm.centred else "rrms"]
    plain = {(name, False): value for name, value in found.items()}
    return plain | {(name, True): times(value, rstd) for name, value in found.items()}


def _scales(program: Program, positions: set[int], known: set[Var]) -> Iterator[Var]:
    made = {v for i in positions for v in program.eqns[i].outvars}
    seen: set[Var] = set()
    for position in sorted(positions):
        for atom in program.eqns[position].invars:
            if isinstance(atom, Var) and atom not in made | known | seen:
                if not is_float(atom.aval):
                    raise NoMatch(f"{atom.aval.str_short(short_dtypes=True)} in the gradient")
                seen.add(atom)
                yield atom


def _sums(
    norm: Norm,
    origins: Origins,
    run: Evaluation,
    inside: set[int],
    known: dict[tuple[str, bool], Named],
) -> dict[Var, tuple[str, float, bool]]:
    """What others read of the gradient's rows, as far as the composite's sums give it."""
    program = norm.program
    ready = max((program.maker.get(v, -1) for v in run.values if v not in run.made()), default=-1)
    found: dict[Var, tuple[str, float, bool]] = {}
    for position in sorted(inside):
        (out,) = program.eqns[position].outvars
        outside = out in program.outputs or not inside.issuperset(program.readers.get(out, ()))
        if size(out) >= origins.full or not outside or position <= ready or out not in run.values:
            continue
        for (name, with_rstd), value in known.items():
            c = ratio(run.value(out), value)
            if c is not None and norms.in_order(run.names(out), run.names(norm.x)):
                found[out] = name, c, with_rstd
                break
    return found
