"""Cross entropies, forward and backward: found, counted, and brought to one spelling.

Purpose: a cross entropy is the difference of a logsumexp and of the target's x. Spelled as the
target's element of a ``log_softmax``, its sum needs the total of the row, so that a long row is
read a third time; a z-loss adds a second multiple of the softmax to the gradient. No primitives of
its own are needed: the row's statistics (``jevt/primitives/softmax.py``) are all that is dear, and
with them

    loss = log total - Σ target·(x - maximum)        where the target is one element of the row
    dx = (k / total)·exp(x - maximum) - target·g     k: the factor of the loss, and of a z-loss

Invariant: the same bits forward where the target is one element of the row. A gradient with a
z-loss is rounded once less. Soft labels t whose sum is known without a pass over them (smoothed
ones, Σ t·log_softmax = Σ t·(x - maximum) - log total·Σ t) need no total before their product is
summed up, either, and are chosen by the target's mask: so a kernel that holds a row reads it once.
Other soft labels stay as they are spelled, and are counted; where a row does not fit on chip, two
passes over logits and labels give loss and gradient.

    before  { lambda ; x:f32[8,64] hot:bool[8,64]. let
                m:f32[8] s:f32[8] = softmax_statistics[axes=(1,) guarded=False] x
                l:f32[8,64] = sub (sub x (reshape m)) (reshape (log s))
              in (reduce_sum[axes=(1,)] (select_n hot 0.0 l),) }          hot: position = label
    after   { lambda ; x:f32[8,64] hot:bool[8,64]. let
                m:f32[8] s:f32[8] = softmax_statistics[axes=(1,) guarded=False] x
                t:f32[8] = reduce_sum[axes=(1,)] (select_n hot 0.0 x)
              in (select_n (0 ≤ label ≤ 63) 0.0 (sub (sub t m) (log s)),) }
"""

from __future__ import annotations

from collections.abc import Callable

from jax.extend.core import Jaxpr
from jax.extend.core import primitives as p

from jevt.passes import canonicalize
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes._rules import Graph
from jevt.passes.attention.region import Program
from jevt.passes.raising import cross_entropies, cross_entropy_gradients
from jevt.passes.raising.cross_entropies import Logits, Rewrite
from jevt.primitives.softmax import softmax_statistics_p

type Note = Callable[[str], None]


def run(jaxpr: Jaxpr, note: Note = lambda _: None) -> Jaxpr:
    """Rewrites the cross entropies of ``jaxpr`` and of its bodies.

    Args:
      jaxpr: with the composites of softmaxes, what is equal computed once.
      note: receives how many there are, forward and backward.
    """
    counts = [0, 0]
    body = once(lambda inner: _run(inner, body, counts))
    result = body(jaxpr)
    if any(counts):
        note(f"cross entropy: {counts[0]} forward, {counts[1]} backward")
    return result


def _run(jaxpr: Jaxpr, body: Callable[[Jaxpr], Jaxpr], counts: list[int]) -> Jaxpr:
    program = Program(jaxpr)
    todo: dict[int, Callable[[Graph], None]] = {}
    for eqn in program.eqns:
        if eqn.primitive is not softmax_statistics_p:
            continue
        logits = Logits(program, eqn)
        forward = cross_entropies.losses(logits)
        counts[0] += bool(forward)
        if forward:
            counts[1] += cross_entropies.has_gradient(logits)
        else:
            counts[1] += cross_entropy_gradients.is_alone(logits)
        rewrites: list[Rewrite | None] = [*cross_entropy_gradients.multiples_of_labels(logits)]
        for position in forward:
            rewrites += cross_entropies.picked(logits, position)
        for position in logits.sums():
            rewrites.append(cross_entropies.weighted(logits, position))
            rewrites += cross_entropies.multiples_of_labels(logits, position)
        rewrites += [
            cross_entropies.merged(logits, position)
            for position in logits.readers_of_multiples()
            if program.eqns[position].primitive in (p.add_p, p.add_jaxvals_p)
        ]
        for rewrite in filter(None, rewrites):
            todo.setdefault(rewrite.position, rewrite.write)
    if not todo:
        return rebuild(jaxpr, [map_bodies(eqn, body) for eqn in jaxpr.eqns], {})
    graph = Graph(jaxpr, canonicalize.RULES)
    for position, eqn in enumerate(jaxpr.eqns):
        if position in todo:
            graph.place(eqn)
            todo[position](graph)
        else:
            graph.add(map_bodies(substitute(graph.env, eqn), body))
    return rebuild(jaxpr, graph.eqns, graph.env)
