"""What else a program reads of the sums that a norm's gradient takes: gradients of scale and bias.

In a batch norm they are the gradient's own sums. In a group norm, whose scale varies along the
group, they are its sums before these are added up over the group, without the scale:

    Σ_group γ·g = Σ_channels γ·(Σ_height,width g)      bias: Σ_examples (Σ_height,width g)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jax.extend.core import Var
from jax.extend.core import primitives as p

from jevt.passes.attention.values import Named
from jevt.passes.raising import norms
from jevt.passes.raising.cones import size
from jevt.passes.raising.norms import Norm
from jevt.passes.raising.small import Evaluation, ratio, times


@dataclasses.dataclass(frozen=True)
class Part:
    """A value of the program that one of the composite's sums gives.

    Attributes:
      name: of the sum.
      factor: by which it is multiplied.
      with_rstd: whether rstd is a factor as well.
      over: axes of the sum over which it is added up.
    """

    name: str
    factor: float
    with_rstd: bool
    over: tuple[int, ...] = ()


def find(
    norm: Norm,
    run: Evaluation,
    g: Var,
    scales: Sequence[Var],
    known: Mapping[str, Named],
    inside: set[int],
) -> tuple[tuple[int, ...], dict[Var, Part]]:
    """The axes over which the composite's sums are to run, and what they give of the program.

    Args:
      norm: whose gradient.
      run: the values of the gradient's equations.
      g: the cotangent.
      scales: its factors.
      known: the statistics.
      inside: the gradient's equations.
    """
    axes = run.axes(norm.x)
    varying = {name for scale in scales for name in run.names(scale)}
    free = tuple(axis for axis in norm.axes if varying.isdisjoint(axes[axis]))
    if free and free != norm.axes:
        parts = _read(norm, run, inside, _sums(norm, run, g, scales, known, free))
        if parts:
            return free, {**parts, **dict(_added_up(norm, run, g, free, inside))}
    return norm.axes, _read(norm, run, inside, _sums(norm, run, g, scales, known, norm.axes))


def centred(norm: Norm, x: Named, known: Mapping[str, Named]) -> Named:
    """What is normalised, less its mean in a centred norm."""
    return Named(x.names, x.array - known["mean"].along(x.names)) if norm.centred else x


def _sums(
    norm: Norm,
    run: Evaluation,
    g: Var,
    scales: Sequence[Var],
    known: Mapping[str, Named],
    summed: tuple[int, ...],
) -> dict[tuple[str, bool], Named]:
    """The composite's sums, without and with rstd."""
    x, axes = run.value(norm.x), run.axes(norm.x)
    over = [name for axis in summed for name in axes[axis]]
    inner = (run.value(v) for v in scales if not set(over).isdisjoint(run.names(v)))
    scaled = times(run.value(g), *inner)
    found = {"sum_gc": run.sum(times(scaled, centred(norm, x, known)), over)}
    if norm.centred:
        found["sum_g"] = run.sum(scaled, over)
    rstd = known["rstd" if norm.centred else "rrms"]
    plain = {(name, False): value for name, value in found.items()}
    return plain | {(name, True): times(value, rstd) for name, value in found.items()}


def _read(
    norm: Norm, run: Evaluation, inside: set[int], sums: Mapping[tuple[str, bool], Named]
) -> dict[Var, Part]:
    """What others read of the gradient's rows, as far as the composite's sums give it."""
    program = norm.program
    found: dict[Var, Part] = {}
    for position in sorted(inside):
        (out,) = program.eqns[position].outvars
        outside = out in program.outputs or not inside.issuperset(program.readers.get(out, ()))
        if size(out) >= size(norm.x) or not outside or position <= _ready(run):
            continue
        if out not in run.values:
            continue
        for (name, with_rstd), value in sums.items():
            c = ratio(run.value(out), value)
            if c is not None and norms.in_order(run.names(out), run.names(norm.x)):
                found[out] = Part(name, c, with_rstd)
                break
    return found


def _added_up(
    norm: Norm, run: Evaluation, g: Var, summed: tuple[int, ...], inside: set[int]
) -> Iterator[tuple[Var, Part]]:
    """Sums of the cotangent over more than the composite's axes: the gradient of a bias."""
    program, names = norm.program, run.names(norm.x)
    left = [axis for i, axis in enumerate(run.axes(norm.x)) if i not in summed]
    for position in program.readers.get(g, ()):
        eqn = program.eqns[position]
        if eqn.primitive is not p.reduce_sum_p or position in inside or position <= _ready(run):
            continue
        axes = [axis for i, axis in enumerate(run.axes(g)) if i not in eqn.params["axes"]]
        rest = tuple(name for axis in axes for name in axis)
        over = tuple(i for i, axis in enumerate(left) if set(rest).isdisjoint(axis))
        kept = {name for i, axis in enumerate(left) if i not in over for name in axis}
        if norm.centred and over and kept == set(rest) and norms.in_order(rest, names):
            yield eqn.outvars[0], Part("sum_g", 1.0, with_rstd=False, over=over)


def _ready(run: Evaluation) -> int:
    """The position of the last equation that makes something the gradient is computed from."""
    maker = run.program.maker
    return max((maker.get(v, -1) for v in run.values if v not in run.made()), default=-1)
