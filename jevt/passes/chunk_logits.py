"""The logits of a language model, and their gradient, are computed for some tokens at a time.

Purpose: a linear layer of V outputs and a cross entropy need logits [tokens, V] and a gradient of
the same size, which are the peak of a training step's memory: 2 · 33.5 GB of 65536 tokens and
256000 words in bfloat16. Forward and backward pass of both are row by row but for the gradients of
the layer's weights, which are sums over rows. So a loop over chunks of tokens computes a chunk's
logits, loss, gradient of logits and of hidden states, and adds to the gradients of weights; what
is as large as the logits exists for one chunk only. Its body is made of ordinary equations, which
become kernels as they do elsewhere.

What is in the loop is found from the product in front of a softmax, by where rows are
(``chunks/``), not by how a loss is spelled: labels as integers, soft or smoothed, z-losses, masks,
caps, predictions such as ``argmax``, [batch, tokens] or flat, with the weights of the embedding.

Invariant: each row's values are computed by the same equations. Sums over all rows (of weights'
gradients) are added up in float32 over the chunks (float64 for float64) and rounded once.

Where: the logits and the gradient that products read take more than 1/16 of the device's memory
(``chunks/policy.py``), at the price of reading and writing the sums in float32 once a chunk. What
was chosen is noted, and if logits of that size have to stay, the reason: they are a result, or
something reads them across tokens. Where their gradient waits for a sum over many tokens, as that
of a preference between two texts, they are computed twice if they take more than a quarter of the
memory, and stay if less. Under automatic partitioning they stay: tokens are on several devices.

    before  { lambda ; h:f32[16384,64] w:f32[64,32000] y:i32[16384]. let
                z = dot_general h w; m s = softmax_statistics z; …
                dz:f32[16384,32000] = …; dh = dot_general dz w; dw = dot_general h dz
              in (…, dh, dw) }
    after   { lambda ; h:f32[16384,64] w:f32[64,32000] y:i32[16384]. let
                dw, loss, dh = scan[length=4 jaxpr={ lambda ; w dw h:f32[4096,64] y:i32[4096]. let
                    z:f32[4096,32000] = dot_general h w; m s = softmax_statistics z; …
                    dz:f32[4096,32000] = …; dh = dot_general dz w; e = dot_general h dz
                    f = add dw e in (f, …, dh) }] w zeros (reshape h) (reshape y)
              in (…, reshape dh, dw) }
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt._context import Context, Device
from jevt.passes import cse, dce
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes._rules import Graph, on_same_mesh
from jevt.passes.chunks import cut, policy
from jevt.passes.chunks.region import Head, Obstacle, Region
from jevt.passes.chunks.search import Found, eased, look
from jevt.passes.chunks.write import write
from jevt.primitives.softmax import softmax_statistics_p

type Note = Callable[[str], None]


def run(jaxpr: Jaxpr, context: Context, note: Note = lambda _: None) -> Jaxpr:
    """Rewrites what is around large logits, in ``jaxpr`` and in its bodies.

    Args:
      jaxpr: with the composites of softmaxes, what is equal computed once.
      context: for which device, and whether programs are partitioned over several.
      note: receives what was decided.
    """
    body = once(lambda inner: _run(inner, context, note, body))
    return body(jaxpr)


def _run(jaxpr: Jaxpr, context: Context, note: Note, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    jaxpr = rebuild(jaxpr, [map_bodies(eqn, body) for eqn in jaxpr.eqns], {})
    while True:
        changed, why = None, list[str]()
        for variant, remark in _variants(jaxpr, context.device):
            changed, notes = _changed(variant, context)
            if changed is not None:
                why = [line + remark for line in notes]
                break
            why = why or notes
        for line in why:
            note(line)
        if changed is None:
            return jaxpr
        jaxpr = changed


def _variants(jaxpr: Jaxpr, device: Device) -> Iterator[tuple[Found, str]]:
    """The program, and what else computes the same, but in more equations; with a remark."""
    if not any(eqn.primitive is softmax_statistics_p for eqn in jaxpr.eqns):
        return
    whole = eased(look(jaxpr, device), device)
    yield whole, ""
    # Of products of which some rows are not read, those are left out.
    short = cut.run(jaxpr, lambda atom: policy.may_be_large(atom, device))
    variants = [whole]
    if short is not jaxpr:
        variants.append(eased(look(dce.run(cse.run(short)), device), device))
        yield variants[-1], ""
    for variant in variants:
        twice = eased(variant, device, twice=True)
        if twice is not variant:
            yield twice, "; computed twice, as the gradient waits for all tokens"


def _changed(found: Found, context: Context) -> tuple[Jaxpr | None, list[str]]:
    """The program with one region rewritten and how; or None, and why others are not.

    Of logits that meet, as those of a teacher and a student, the region of one holds the other's.
    That is the one with more equations that depend on its logits.
    """
    obstacles = dict(found.obstacles)
    for region in sorted(found.regions, key=lambda r: len(r.copied) - len(r.inside)):
        choice = policy.choose(region, context.device)
        if choice is None:
            continue
        try:
            if context.partitioned:
                raise Obstacle("tokens are partitioned automatically")
            result = dce.run(cse.run(_rewritten(region, choice.rows)))
        except Obstacle as obstacle:
            obstacles[region.head.eqn] = region.head, obstacle
            continue
        how = (
            f"{_words(region.head)}: {choice.chunks} chunks of {choice.rows} tokens,"
            f" {_gib(choice.whole)} become {_gib(choice.part)} for predicted"
            f" {choice.microseconds:.0f} µs"
        )
        return result, [how]
    return None, [f"{_words(head)} stay whole: {why}" for head, why in obstacles.values()]


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _words(head: Head) -> str:
    place = source_info_util.summarize(head.eqn.source_info) or "a line of no file"
    return f"logits {head.logits.aval.str_short(short_dtypes=True)} at {place}"


def _rewritten(region: Region, rows: int) -> Jaxpr:
    """The program with the region as a loop.

    The loop stands where everything that it reads has been computed. What reads its results and
    came before that follows it.

    Raises:
      Obstacle: that would change the order of effects, or arrays are sharded.
    """
    program = region.program
    if not all(on_same_mesh([var]) for var, _ in region.leaves()):
        raise Obstacle("arrays are sharded")
    ready = max((program.maker.get(var, 0) for var, _ in region.leaves()), default=0)
    inside = set(region.inside) - region.copied
    graph = Graph(program.jaxpr, {})
    late = {v for at in inside for v in program.eqns[at].outvars}
    waiting: list[JaxprEqn] = []
    for position, eqn in enumerate(program.eqns):
        if position in inside:
            pass
        elif any(isinstance(a, Var) and a in late for a in eqn.invars):
            if eqn.effects:
                raise Obstacle(f"{eqn.primitive.name} has effects and reads what follows from them")
            waiting.append(eqn)
            late.update(eqn.outvars)
        else:
            graph.add(substitute(graph.env, eqn))
        if position == max(ready, region.head.product):
            write(region, rows, graph)
            late.clear()
            for later in waiting:
                graph.add(substitute(graph.env, later))
    return rebuild(program.jaxpr, graph.eqns, graph.env)
