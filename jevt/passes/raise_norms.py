"""Raising of norms: the statistics and gradients of layer, RMS, batch and group norms.

Purpose: programs spell a variance in many ways (in one pass with a clip, in two, by ``jnp.var``),
and differentiation makes a different gradient of each: two to four sums a row, terms that are
rounded one by one, masks of the clip. As a composite each has its one best spelling, which
``expand_composites`` writes.

Invariant: the same function in exact arithmetic, up to the derivative of a clip of the variance at
0. Statistics stay in their type, float32 at least, and are rounded at least as carefully; the
gradient is added up in that type and rounded once. Sums over the full size do not become more. What
is normalised, scaled and shifted stays as it is, element by element.

    before  { lambda ; x:f32[8,64]. let
                m:f32[8] = mul (reduce_sum[axes=(1,)] x) 0.015625
                s:f32[8] = mul (reduce_sum[axes=(1,)] (square x)) 0.015625
                v:f32[8] = max 0.0 (sub s (square m)); r:f32[8] = rsqrt (add v 1e-06) in (m, r) }
    after   { lambda ; x:f32[8,64]. let
                m:f32[8] v:f32[8] r:f32[8] = norm_statistics[axes=(1,) epsilon=1e-06 …] x
              in (m, r) }

How: see ``jevt/passes/raising/``.
"""

from __future__ import annotations

from collections.abc import Iterator

from jax.extend.core import Jaxpr, JaxprEqn

from jevt.passes._facts import shape_of
from jevt.passes._remarks import Note
from jevt.passes._rules import Graph
from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import Program
from jevt.passes.raising import gradients, norms
from jevt.passes.raising.gradients import Gradient
from jevt.passes.raising.norms import Norm
from jevt.passes.raising.run import Rewrite, Run, Write
from jevt.passes.raising.write import NormWriter
from jevt.primitives.norms import name_of


def run(jaxpr: Jaxpr, note: Note = lambda _: None) -> Jaxpr:
    """Raises the norms of ``jaxpr`` and of its bodies.

    Args:
      jaxpr: canonical.
      note: receives how many of each were raised, and a line for each reason for which what looks
        like a norm stays.
    """
    return Run("norm", _find).raised(jaxpr, note)


def _find(run: Run, program: Program, graph: Graph) -> Iterator[Rewrite]:
    taken: set[object] = set()
    for position, eqn in enumerate(program.eqns):
        if eqn.primitive not in norms.ROOTS:
            continue
        try:
            norm = norms.find(program, position)
            if norm is None or not norm.results or norm.x in taken or 0 in shape_of(norm.x):
                continue
            norms.check(norm)
        except NoMatch as error:
            run.miss(eqn, error)
            continue
        taken.add(norm.x)
        name = name_of(shape_of(norm.x), norm.axes, centred=norm.centred)
        gradient = _gradient(run, norm, name, eqn)
        if gradient is not None and gradient.sum.root in taken:
            gradient = None
        if gradient is not None:
            taken.add(gradient.sum.root)
        run.count(name, backward=gradient is not None)
        yield _rewrite(norm, gradient, graph)


def _gradient(run: Run, norm: Norm, name: str, eqn: JaxprEqn) -> Gradient | None:
    try:
        return gradients.find(norm)
    except NoMatch as error:
        run.miss(eqn, f"the gradient of {name}: {error}")
        return None


def _rewrite(norm: Norm, gradient: Gradient | None, graph: Graph) -> Rewrite:
    maker = norm.program.maker
    writer = NormWriter(norm, gradient, graph)
    gone = [*norm.results]
    writes: list[tuple[int, Write]] = [(min(maker[v] for v in gone), writer.statistics)]
    if gradient is not None:
        writes += [(gradient.position(), writer.sums), (maker[gradient.sum.root], writer.sum)]
        gone += [gradient.sum.root, *gradient.sums]
    return Rewrite(tuple(writes), frozenset(maker[v] for v in gone))
