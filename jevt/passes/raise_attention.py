"""Raising of attention: the equations around a softmax become ``attention``. For CUDA.

Purpose: scores and probabilities have one element a query and key. Written out, forward and
backward pass move them through memory a dozen times; fused kernels never store them. XLA and the
partitioner cannot find that form: it needs the softmax's sums to be kept up to date while the
product runs (Dao et al., FlashAttention, 2022).

Invariant: the same function, up to roundings: scores and softmax are float32, probabilities and the
scores' gradient are rounded to the operands' type before their products, as XLA's own spelling in
that type does. A query that sees no key at all is the mean of the values, as where a mask sets the
scores to a large negative number (where it sets them to -inf, that row was NaN); a bias below
``LOWEST`` counts as ``LOWEST``, which differs only where a query has no other. Forward and backward
pass are replaced together or not at all, and only if no one else reads scores, probabilities, or
what is computed from them.

    before  { lambda ; q:bf16[2,6,4,8] k:bf16[2,6,4,8] v:bf16[2,6,4,8]. let
                a:bf16[2,4,6,6] = dot_general[(([3], [3]), ([0, 2], [0, 2]))] q k
                b:f32[2,4,6,6] = convert_element_type (mul a 0.25)
                c:f32[2,4,6,6] = exp (sub b (reduce_max[axes=(3,)] b))
                d:bf16[2,4,6,6] = convert_element_type (div c (reduce_sum[axes=(3,)] c))
                e:bf16[2,4,8,6] = dot_general[(([1], [3]), ([0, 2], [0, 1]))] v d
                f:bf16[2,6,4,8] = transpose[permutation=(0, 3, 1, 2)] e in (f,) }
    after   { lambda ; q:bf16[2,6,4,8] k:bf16[2,6,4,8] v:bf16[2,6,4,8]. let
                f:bf16[2,6,4,8] _:f32[2,4,6] = attention[scale=0.25 causal=False layout=BTNH] q k v
              in (f,) }

How: an attention is recognised by what it computes, not by how it is spelled. From the exponential
of a softmax, everything between the surrounding products is one *region*; on named axes, without
transpositions and reshapes, it is evaluated on small random arrays and compared with attention's
formulas. See ``jevt/passes/attention/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import primitives as p

from jevt._context import Context
from jevt.partition.targets import body_context
from jevt.passes import canonicalize, cse, dce
from jevt.passes._remarks import Note, Remarks
from jevt.passes._rewrite import map_bodies, rebuild, substitute
from jevt.passes._rules import Graph, Rules, merged
from jevt.passes.attention import labels, policy, region, roles, scans, scores, small
from jevt.passes.attention.arrange import arrange
from jevt.passes.attention.emit import Emitter
from jevt.passes.attention.masks import seen_up_to, shows_some_key
from jevt.passes.attention.match import Match
from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import Program, Region
from jevt.passes.reductions.smaller import of_view
from jevt.primitives import cudnn_attention
from jevt.primitives.cudnn_attention import Case

# Emitted equations are canonical, and sums of results do not care for the order of their axes.
_RULES = merged(canonicalize.RULES, {p.reduce_sum_p: (of_view,)})

type Obstacle = Callable[[Case, Context], str]


def on_cudnn(case: Case, context: Context) -> str:
    """Why an attention has to stay as it is, "" if cuDNN runs it."""
    if context.partitioned:
        return "automatic partitioning over several devices"
    return cudnn_attention.obstacle(case, context.device.compute_capability)


def run(
    jaxpr: Jaxpr,
    context: Context,
    note: Note = lambda _: None,
    obstacle: Obstacle = on_cudnn,
) -> Jaxpr:
    """Raises the attentions of ``jaxpr`` and of its bodies.

    Args:
      jaxpr: canonical.
      context: for whom it is compiled.
      note: receives a line for each reason for which attentions, or what is nearly one, stay.
      obstacle: why there is no kernel for a case, "" if there is one.
    """
    this = _Run(obstacle)
    result = this.run(jaxpr, context)
    this.misses.tell(note)
    return result


class _Run:
    """One run of the pass: whom to ask, the bodies that are done, and what was missed.

    Attributes:
      misses: for which softmaxes there is no attention, and why.
    """

    def __init__(self, obstacle: Obstacle) -> None:
        self.obstacle = obstacle
        self.misses = Remarks()
        self.done: dict[tuple[Jaxpr, Context], Jaxpr] = {}

    def run(self, jaxpr: Jaxpr, context: Context, *, quiet: bool = False) -> Jaxpr:
        """``jaxpr`` with its attentions raised; the same for a body that is shared.

        ``quiet`` is for bodies whose misses are known.
        """
        key = jaxpr, context
        if key not in self.done:
            misses = Remarks() if quiet else self.misses
            self.done[key], _ = self._rewritten(Program(jaxpr), context, misses)
        return self.done[key]

    def _rewritten(
        self,
        program: Program,
        context: Context,
        misses: Remarks,
        length: int = 0,
        rules: Rules | None = None,
    ) -> tuple[Jaxpr, int]:
        """A jaxpr with its attentions raised, and how many equations its first ``length`` became.

        Equations that are emitted for one of the first come before the others.
        """
        jaxpr = program.jaxpr
        replaced: set[int] = set()
        todo: dict[int, list[Callable[[], None]]] = {}
        capability = context.device.compute_capability if context.own_kernels else 0
        graph = Graph(jaxpr, _RULES if rules is None else rules)
        for match in self._matches(program, context, misses):
            writer = Emitter(match, arrange(match), graph, capability)
            first, second = policy.places(match)
            todo.setdefault(first, []).append(writer.forward)
            if match.roles.d_out is not None:
                todo.setdefault(second, []).append(writer.backward)
            replaced.update(i for part in match.roles.results for i in match.replaced(part))
        loops, quiet = self._loops(program, context)
        if not todo and not loops:
            eqns = [self._with_bodies(e, context, i in quiet) for i, e in enumerate(program.eqns)]
            return rebuild(jaxpr, eqns, {}), length
        new_length = 0
        for position, eqn in enumerate(program.eqns):
            if position == length:
                new_length = len(graph.eqns)
            for write in todo.get(position, ()):
                write()
            if position in loops:
                graph.add(substitute(graph.env, loops[position]))
            elif position not in replaced:
                whole = substitute(graph.env, eqn)
                graph.add(self._with_bodies(whole, context, position in quiet))
        return rebuild(jaxpr, graph.eqns, graph.env), new_length

    def _with_bodies(self, eqn: JaxprEqn, context: Context, quiet: bool) -> JaxprEqn:
        inner = body_context(context, eqn.primitive.name, eqn.params)
        return map_bodies(eqn, lambda body: self.run(body, inner, quiet=quiet))

    def _loops(self, program: Program, context: Context) -> tuple[dict[int, JaxprEqn], set[int]]:
        """New loops for those whose attentions run forward in one and backward in another.

        Also the positions of loops that stay as they are, whose attentions have been looked at.
        """
        loops: dict[int, JaxprEqn] = {}
        quiet: set[int] = set()
        for joint in scans.joints(program):
            misses = Remarks()
            step = Program(joint.jaxpr)
            new, length = self._rewritten(step, context, misses, joint.length, rules={})
            if new is not joint.jaxpr:
                first, second = scans.split(program, joint, new, length)
                loops[joint.first], loops[joint.second] = map(_canonical, (first, second))
            elif misses:
                quiet |= {joint.first, joint.second}
            self.misses.update(misses)
        return loops, quiet

    def _matches(self, program: Program, context: Context, misses: Remarks) -> Iterator[Match]:
        taken: set[int] = set()
        for position, eqn in enumerate(program.eqns):
            if eqn.primitive is not p.exp_p or position in taken:
                continue
            reason = ""
            for candidate in region.find(program, position):
                try:
                    match = recognise(candidate)
                    if match is None:
                        continue
                    policy.check(match, lambda case: self.obstacle(case, context))
                except NoMatch as error:
                    reason = reason or str(error)
                    continue
                taken.update(candidate.positions())
                reason = ""
                yield match
                break
            if reason:
                misses.add(eqn, "attention", f": {reason}")


def _canonical(loop: JaxprEqn) -> JaxprEqn:
    return map_bodies(loop, lambda body: dce.run(cse.run(canonicalize.run(body))))


def recognise(candidate: Region) -> Match | None:
    """The attention that a region is, None if it does not look like one.

    Raises:
      NoMatch: it looks like one and is none, or is read by others.
    """
    if any(_is_sharded(atom.aval) for i in candidate.positions() for atom in _atoms(candidate, i)):
        return None
    names = labels.label(candidate)
    parts = roles.assign(candidate, names)
    if parts is None:
        return None
    how = scores.read(candidate, names, set(parts.axes.keys))
    small.confirm(candidate, names, parts, how)
    causal: tuple[Any, ...] = ()
    masks = []
    for mask, seen in how.masks:
        for part, part_seen in scores.parts(candidate, mask, seen):
            sight = seen_up_to(candidate.program, names, part, part_seen)
            if sight == "all":
                continue
            if not isinstance(sight, str) and not causal and set(sight) <= set(parts.axes.rows):
                causal = tuple(sight)
                continue
            masks.append((part, part_seen))
    keys = parts.axes.keys
    may_be_blind = bool(masks) and not (
        len(masks) == 1 and not causal and shows_some_key(candidate.program, names, *masks[0], keys)
    )
    biases = how.biases
    return Match(candidate, names, parts, how.scale, biases, tuple(masks), causal, may_be_blind)


def _atoms(candidate: Region, position: int) -> Iterator[Any]:
    eqn = candidate.program.eqns[position]
    yield from (*eqn.invars, *eqn.outvars)


def _is_sharded(aval: Any) -> bool:
    spec = getattr(aval.sharding, "spec", ())
    return any(entry is not None for entry in spec)
