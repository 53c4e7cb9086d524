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

import collections
from collections.abc import Callable

from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn

from jevt.passes import canonicalize
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes._rules import Graph
from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import Program
from jevt.passes.raising import gradients, norms
from jevt.passes.raising.gradients import Gradient
from jevt.passes.raising.norms import Norm
from jevt.passes.raising.report import Note, report
from jevt.passes.raising.write import NormWriter
from jevt.primitives.norms import name_of


def run(jaxpr: Jaxpr, note: Note = lambda _: None) -> Jaxpr:
    """Raises the norms of ``jaxpr`` and of its bodies.

    Args:
      jaxpr: canonical.
      note: receives how many of each were raised, and a line for each reason for which what looks
        like a norm stays.
    """
    this = _Run()
    result = this.run(jaxpr)
    report("norm", this.counts, this.misses, note)
    return result


class _Run:
    """One run of the pass.

    Attributes:
      counts: statistics and gradients that were raised, by the norm's name.
      misses: source lines by the reason for which what is there stays.
    """

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        self.misses: dict[str, list[str]] = {}
        self.run = once(self._rewritten)

    def _rewritten(self, jaxpr: Jaxpr) -> Jaxpr:
        program = Program(jaxpr)
        graph = Graph(jaxpr, canonicalize.RULES)
        todo: dict[int, list[Callable[[], None]]] = {}
        replaced: set[int] = set()
        for norm, gradient in self._found(program):
            writer = NormWriter(norm, gradient, graph)
            gone = [*norm.results]
            first = min(program.maker[v] for v in norm.results)
            todo.setdefault(first, []).append(writer.statistics)
            if gradient is not None:
                todo.setdefault(gradient.position(), []).append(writer.sums)
                todo.setdefault(program.maker[gradient.sum.root], []).append(writer.sum)
                gone += [gradient.sum.root, *gradient.sums]
            replaced.update(program.maker[v] for v in gone)
        if not todo:
            return rebuild(jaxpr, [map_bodies(eqn, self.run) for eqn in jaxpr.eqns], {})
        for position, eqn in enumerate(jaxpr.eqns):
            for write in todo.get(position, ()):
                write()
            if position not in replaced:
                graph.add(map_bodies(substitute(graph.env, eqn), self.run))
        return rebuild(jaxpr, graph.eqns, graph.env)

    def _found(self, program: Program) -> list[tuple[Norm, Gradient | None]]:
        found: list[tuple[Norm, Gradient | None]] = []
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
                self._miss(str(error), eqn)
                continue
            taken.add(norm.x)
            name = name_of(shape_of(norm.x), norm.axes, centred=norm.centred)
            gradient = None
            try:
                gradient = gradients.find(norm)
            except NoMatch as error:
                self._miss(f"the gradient of {name}: {error}", eqn)
            if gradient is not None and gradient.sum.root in taken:
                gradient = None
            if gradient is not None:
                taken.add(gradient.sum.root)
            counts = self.counts[name]
            counts[0] += 1
            counts[1] += gradient is not None
            found.append((norm, gradient))
        return found

    def _miss(self, reason: str, eqn: JaxprEqn) -> None:
        place = source_info_util.summarize(eqn.source_info) or "a line of no file"
        self.misses.setdefault(reason, []).append(place)
