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
from jevt.passes.raising import gradient_sums, norms, search
from jevt.passes.raising.cones import Cone, Kind, Origins
from jevt.passes.raising.gradient_sums import Part
from jevt.passes.raising.norms import Norm
from jevt.passes.raising.small import Evaluation, dimensions, same, times
from jevt.passes.raising.terms import Sum


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The gradient of a norm, found.

    Attributes:
      norm: whose.
      sum: in which it ends.
      g: the cotangent.
      scales: factors of the cotangent, with their shapes among the axes of x.
      summed: axes over which the composite's two sums run, all of the norm's or some.
      sums: values that these give.
      source: an equation of it, for place and scopes.
    """

    norm: Norm
    sum: Sum
    g: Var
    scales: tuple[tuple[Var, tuple[int, ...]], ...]
    summed: tuple[int, ...]
    sums: dict[Var, Part]
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
    full = times(run.value(g), *(run.value(v) for v in scales))
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
    summed, parts = gradient_sums.find(norm, run, g, scales, known, inside)
    found = Gradient(
        norm,
        total,
        g,
        tuple(zip(scales, shapes, strict=True)),
        summed,
        parts,
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
    c = gradient_sums.centred(norm, x, known)
    rstd = known["rstd" if norm.centred else "rrms"]
    inner = run.sum(times(g, c, rstd), over).along(names) / n
    result = g.along(names) - c.array * rstd.along(names) * inner
    if norm.centred:
        result = result - run.sum(g, over).along(names) / n
    return Named(names, result * rstd.along(names))


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
