"""Raising of softmaxes: the statistics and gradients of softmax, its logarithm and logsumexp.

Purpose: programs spell a softmax in many ways (``exp(x - max)/Σ``, the exponential of a logarithm,
without a maximum), and differentiation makes a different gradient of each, with terms that are
rounded one by one and squares of the sum. As a composite each has its one best spelling, which
``expand_composites`` writes.

Invariant: the same function in exact arithmetic. Statistics and gradient are float32 at least, and
rounded once. Sums over the full size do not become more; a row that a kernel holds on chip may get
a maximum, which keeps its exponentials from overflowing. Rows with infinities give what they gave.

    before  { lambda ; x:f32[8,64] g:f32[8,64]. let
                m:f32[8] = reduce_max[axes=(1,)] x; e:f32[8,64] = exp (sub x (reshape m))
                s:f32[8] = reduce_sum[axes=(1,)] e; k:f32[8] = div 1.0 (square s)
                n:f32[8] = mul (reduce_sum[axes=(1,)] (mul g e)) k
                dx:f32[8,64] = mul (sub (div g (reshape s)) n) e in (div e (reshape s), dx) }
    after   { lambda ; x:f32[8,64] g:f32[8,64]. let
                m:f32[8] s:f32[8] = softmax_statistics[axes=(1,) guarded=False] x
                e:f32[8,64] = exp (sub x (reshape m))
                dx:f32[8,64] = softmax_gradient[axes=(1,)] x m s g in (div e (reshape s), dx) }

How: see ``jevt/passes/raising/``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt.passes._remarks import Note
from jevt.passes._rules import Graph
from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import Program
from jevt.passes.raising import logsumexp_gradients, softmax_gradients, softmaxes
from jevt.passes.raising.logsumexp_gradients import Multiple
from jevt.passes.raising.run import Rewrite, Run, Write
from jevt.passes.raising.softmax_gradients import SoftmaxGradient
from jevt.passes.raising.softmaxes import Softmax
from jevt.passes.raising.write_softmax import SoftmaxWriter


def run(jaxpr: Jaxpr, note: Note = lambda _: None) -> Jaxpr:
    """Raises the softmaxes of ``jaxpr`` and of its bodies.

    Args:
      jaxpr: canonical.
      note: receives how many of each were raised, and a line for each reason for which what looks
        like a softmax stays.
    """
    return Run("softmax", _find).raised(jaxpr, note)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A softmax, its gradient, and its multiples by numbers a row."""

    softmax: Softmax
    gradient: SoftmaxGradient | None
    multiples: tuple[Multiple, ...]

    def inside(self) -> set[int]:
        """The equations of the gradients."""
        inside = {i for m in self.multiples for i in m.inside}
        return inside | (self.gradient.inside if self.gradient is not None else set())

    def replaced(self) -> set[Var]:
        """The gradients' results."""
        values = {m.value for m in self.multiples}
        return values | ({self.gradient.sum.root} if self.gradient is not None else set())


def _find(run: Run, program: Program, graph: Graph) -> Iterator[Rewrite]:
    taken: set[object] = set()
    for position, eqn in enumerate(program.eqns):
        if eqn.primitive is not p.exp_p:
            continue
        try:
            softmax = softmaxes.find(program, position)
            if softmax is None or not taken.isdisjoint((softmax.total, *softmax.results)):
                continue
            found = _with_gradients(run, softmax, eqn, taken)
            softmaxes.check(softmax, found.inside(), found.replaced())
        except NoMatch as error:
            run.miss(eqn, error)
            continue
        taken.update((softmax.total, *softmax.results))
        taken.update(found.replaced())
        run.count(softmax.name(), backward=bool(found.replaced()))
        yield _rewrite(found, graph)


def _with_gradients(run: Run, softmax: Softmax, eqn: JaxprEqn, taken: set[object]) -> _Found:
    multiples = tuple(m for m in logsumexp_gradients.find(softmax) if m.value not in taken)
    gradient = None
    if softmax.name() == "softmax":
        try:
            gradient = softmax_gradients.find(softmax)
        except NoMatch as error:
            run.miss(eqn, f"the gradient of softmax: {error}")
    if gradient is not None and gradient.sum.root in taken:
        gradient = None
    return _Found(softmax, gradient, multiples)


def _rewrite(found: _Found, graph: Graph) -> Rewrite:
    softmax, maker = found.softmax, found.softmax.program.maker
    writer = SoftmaxWriter(softmax, found.gradient, graph)
    values: dict[Var, Write] = {}
    values |= {v: functools.partial(writer.result, v) for v in softmax.results}
    first = min(maker[v] for v in (softmax.total, *values))
    values |= {m.value: functools.partial(writer.multiple, m) for m in found.multiples}
    if found.gradient is not None:
        values[found.gradient.sum.root] = writer.sum
    writes = ((maker[var], write) for var, write in values.items())
    return Rewrite(((first, writer.statistics), *writes), frozenset(maker[v] for v in values))
