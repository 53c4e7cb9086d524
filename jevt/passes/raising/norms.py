"""The statistics of a norm, found from the root of a variance.

    x ─▶ … Σ … ─▶ variance ─▶ (+ epsilon) ─▶ rsqrt, or sqrt

From the root's operand back, each value through which all of the way goes may be the x whose mean
square or variance it is; evaluation tells. The nearest x of a centred norm is taken, else that of
an uncentred one: the mean square of ``x - mean`` is the variance of x.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.lowering.axes import Factor
from jevt.passes._facts import shape_of
from jevt.passes.attention.operations import VIEWS, NoMatch
from jevt.passes.attention.region import Program, number, root
from jevt.passes.attention.values import Named
from jevt.passes.raising.cones import Cone, dominators, size
from jevt.passes.raising.small import Evaluation, dimensions, ratio, same, times

#: Dominators that are tried, and how many equations further a centred norm is looked for.
_TRIES = 5

ROOTS = frozenset({p.rsqrt_p, p.sqrt_p, p.pow_p})


@dataclasses.dataclass(frozen=True)
class Norm:
    """The statistics of a norm, found.

    Attributes:
      program: whose.
      root: the equation that takes the root, and makes rstd if it is an ``rsqrt``.
      cone: x, and the equations from it to the variance.
      origin: what x is a view of.
      variance: the value.
      axes: of x, over which it runs.
      epsilon: added to the variance.
      centred: whether it is that of ``x - mean``.
      two_pass: whether a sum needs another one first.
      results: what else reads of the cone and the root, as a multiple of a statistic.
    """

    program: Program
    root: int
    cone: Cone
    origin: Var
    variance: Var
    axes: tuple[int, ...]
    epsilon: float
    centred: bool
    two_pass: bool
    results: dict[Var, tuple[str, float]]

    @property
    def x(self) -> Var:
        return self.cone.source

    def statistics(self) -> list[Var]:
        """Values of the cone that are smaller than x, and the root's."""
        eqns = [self.program.eqns[i] for i in (*self.cone.positions, self.root)]
        return [v for eqn in eqns for v in eqn.outvars if size(v) < size(self.x)]


def find(program: Program, position: int) -> Norm | None:
    """The norm whose root an equation takes; None if this does not look like one.

    Raises:
      NoMatch: it looks like one and is none.
    """
    eqn = program.eqns[position]
    if eqn.primitive is p.pow_p and number(program, eqn.invars[1]) != -0.5:
        return None
    variance, epsilon = _without_epsilon(program, eqn.invars[0])
    if variance is None or epsilon < 0:
        return None
    found: Norm | None = None
    looks = False
    for tries, cone in enumerate(dominators(program, [variance])):
        if size(cone.source) <= size(variance):
            continue
        looks = True
        norm = _confirm(program, position, cone, variance, epsilon)
        if norm is not None and (norm.centred or found is None):
            found = norm
            if norm.centred:
                break
        if tries >= _TRIES or (found is not None and not _may_be_centred(program, cone.source)):
            break
    if found is None and looks and eqn.primitive is p.rsqrt_p:
        raise NoMatch("the root of sums, but not of a variance or a mean square")
    return found


def _may_be_centred(program: Program, x: Var) -> bool:
    """Whether x may be a difference from a mean, perhaps seen differently."""
    eqn = program.definition(x)
    while eqn is not None and (eqn.primitive in VIEWS or eqn.primitive is p.convert_element_type_p):
        eqn = program.definition(eqn.invars[0])
    return eqn is not None and eqn.primitive in (p.sub_p, p.add_p)


def _without_epsilon(program: Program, atom: Atom) -> tuple[Var | None, float]:
    """The variance and epsilon of their sum, behind views."""
    epsilon: float | None = None
    while isinstance(atom, Var):
        eqn = program.definition(atom)
        if eqn is not None and eqn.primitive is p.add_p and epsilon is None:
            values = [number(program, a) for a in eqn.invars]
            if (values[0] is None) == (values[1] is None):
                return atom, 0.0
            epsilon = next(value for value in values if value is not None)
            atom = eqn.invars[0 if values[0] is None else 1]
        elif eqn is None or eqn.primitive not in VIEWS:
            return atom, epsilon or 0.0
        else:
            atom = eqn.invars[0]
    return None, 0.0


def _confirm(
    program: Program, root_position: int, cone: Cone, variance: Var, epsilon: float
) -> Norm | None:
    """The norm of a cone, None if the variance is another value."""
    try:
        run = Evaluation(program, (*cone.positions, *_tail(program, root_position, variance)))
        run.run()
    except NoMatch:
        return None
    x, v = run.value(cone.source), run.value(variance)
    over = [name for name in x.names if name not in v.names]
    n = run.count(over)
    if n < 3:
        return None
    known = statistics(run, x, over, epsilon)
    if same(v, known["variance"]):
        centred = True
    elif same(v, known["meansquare"]):
        centred = False
    else:
        return None
    axes = run.axes(cone.source)
    kept = dimensions([name for name in x.names if name not in over], axes)
    if kept is None:
        return None
    return Norm(
        program,
        root_position,
        cone,
        _origin(program, cone.source),
        variance,
        tuple(i for i, axis in enumerate(axes) if axis and i not in kept),
        epsilon,
        centred,
        _is_two_pass(program, cone),
        _results(program, root_position, cone, run, known, centred=centred),
    )


def _tail(program: Program, position: int, variance: Var) -> list[int]:
    """The equations from the variance to the root, ascending."""
    tail = [position]
    atom = program.eqns[position].invars[0]
    while isinstance(atom, Var) and atom is not variance:
        tail.append(program.maker[atom])
        eqn = program.eqns[tail[-1]]
        atom = next(a for a in eqn.invars if isinstance(a, Var) and number(program, a) is None)
    constants = [
        program.maker[a]
        for i in tail
        for a in program.eqns[i].invars
        if isinstance(a, Var) and a in program.maker and number(program, a) is not None
    ]
    return sorted({*tail, *constants})


def statistics(run: Evaluation, x: Named, over: list[Factor], epsilon: float) -> dict[str, Named]:
    """The statistics of small values."""
    n = run.count(over)
    mean = run.sum(x, over)
    mean = Named(mean.names, mean.array / n)
    square = run.sum(times(x, x), over)
    square = Named(square.names, square.array / n)
    variance = Named(mean.names, square.along(mean.names) - mean.array**2)
    return {
        "mean": mean,
        "variance": variance,
        "meansquare": square,
        "rstd": Named(mean.names, 1 / np.sqrt(variance.array + epsilon)),
        "rrms": Named(square.names, 1 / np.sqrt(square.array + epsilon)),
    }


def _results(
    program: Program,
    root_position: int,
    cone: Cone,
    run: Evaluation,
    known: dict[str, Named],
    *,
    centred: bool,
) -> dict[Var, tuple[str, float]]:
    """The values that others read and that a statistic gives, with their factors."""
    names = ("mean", "variance", "rstd") if centred else ("meansquare", "rrms")
    inside = {*cone.positions, root_position}
    results = {}
    for position in sorted(inside):
        (out,) = program.eqns[position].outvars
        if size(out) >= size(cone.source):
            continue
        readers = program.readers.get(out, ())
        outside = out in program.outputs or not inside.issuperset(readers)
        aval: Any = out.aval
        if aval.dtype == bool:
            continue
        for name in names:
            c = ratio(run.value(out), known[name])
            if c is None or not (outside or abs(c - 1.0) < 1e-6):
                continue
            if in_order(run.names(out), run.value(cone.source).names):
                results[out] = (name, c)
                break
    return results


def in_order(names: tuple[Factor, ...], of: tuple[Factor, ...]) -> bool:
    """Whether names come in the order in which they come in ``of``."""
    return list(names) == [name for name in of if name in names]


def _is_two_pass(program: Program, cone: Cone) -> bool:
    summed: set[Var] = set()
    for position in cone.positions:
        eqn = program.eqns[position]
        reads = any(isinstance(a, Var) and a in summed for a in eqn.invars)
        if eqn.primitive is p.reduce_sum_p:
            if reads:
                return True
            summed.update(eqn.outvars)
        elif reads:
            summed.update(eqn.outvars)
    return False


def _origin(program: Program, x: Var) -> Var:
    origin = root(program, x)
    assert isinstance(origin, Var)
    return origin


def check(norm: Norm) -> None:
    """Raises :class:`NoMatch` where the statistics have to stay, or where it would not pay."""
    program, x = norm.program, norm.x
    narrow = next(filter(_is_narrow, (x, *norm.statistics())), None)
    if narrow is not None:
        raise NoMatch(f"statistics in {narrow.aval.str_short(short_dtypes=True)}")
    if _sharded(x):
        raise NoMatch("it is sharded")
    inside = {*norm.cone.positions, norm.root}
    before = sums([program.eqns[i] for i in inside], size(x))
    after = sums(living(program, inside, set(norm.results)), size(x)) + 1 + norm.centred
    if after > before:
        raise NoMatch("sums of the statistics that others read")


def _is_narrow(var: Var) -> bool:
    aval: Any = var.aval
    return np.dtype(aval.dtype).itemsize < 4 and aval.dtype != bool


def _sharded(atom: Atom) -> bool:
    aval: Any = atom.aval
    spec = getattr(aval.sharding, "spec", ())
    return any(entry is not None for entry in spec)


def same_mesh(*atoms: Atom) -> bool:
    """Whether values vary over the same axes of a mesh, and none is sharded."""
    varying = {internals.manual_axes_of(a.aval) for a in atoms if not isinstance(a, Literal)}
    return len(varying) <= 1 and not any(_sharded(a) for a in atoms)


def living(program: Program, inside: set[int], replaced: set[Var]) -> list[JaxprEqn]:
    """Those of the equations that are still needed when ``replaced`` come from elsewhere."""
    needed: list[JaxprEqn] = []
    live: set[int] = set()
    for position in sorted(inside, reverse=True):
        eqn = program.eqns[position]
        for var in eqn.outvars:
            if var in replaced:
                continue
            readers = program.readers.get(var, ())
            if var in program.outputs or any(r not in inside or r in live for r in readers):
                live.add(position)
                needed.append(eqn)
                break
    return needed


def sums(eqns: list[JaxprEqn], full: int) -> int:
    """Reductions of arrays of the full size."""
    return sum(
        eqn.primitive in (p.reduce_sum_p, p.reduce_max_p)
        and size(eqn.invars[0]) >= full > int(np.prod(shape_of(eqn.outvars[0])))
        for eqn in eqns
    )
