"""Loss elimination: a step without its marked outputs, and the program of these alone.

Purpose: a gradient does not need the value of its loss. What only the outputs need that are marked
by ``jevt.lazy`` leaves the step, and is computed by a second program when it is asked for (EVT,
section 3.1).

Invariant: ``step`` and ``rest`` together have the outputs of the jaxpr that was split. Both have
all its inputs, ``rest`` no equation with effects.

    before  { lambda ; a:f32[8]. let
                b:f32[8] = sin a; c:f32[8] = cos a; d:f32[] = reduce_sum b; e:f32[] = lazy d
              in (c, e) }
    step    { lambda ; a:f32[8]. let c:f32[8] = cos a in (c,) }
    rest    { lambda ; a:f32[8]. let b:f32[8] = sin a; d:f32[] = reduce_sum b in (d,) }

A marked output stays in the step if the step computes it anyway, for another output or inside
one; or if it depends on an equation with effects (a callback, a mutable array), as these must not
happen again. It is for outputs: what the step makes of a marked value is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jevt._jaxpr import Atom
from jevt._lazy import lazy_p
from jevt.passes import cse, dce, inline


@dataclasses.dataclass(frozen=True)
class Split:
    """A step in two.

    Attributes:
      step: the outputs that are computed, in order. Inlined, dead code removed.
      rest: the outputs that are put off, in order.
      lazy: their positions among the outputs of both.
      effectful: for each marked output that is computed because of it, by its position, the
        equation whose effect it depends on.
    """

    step: Jaxpr
    rest: Jaxpr
    lazy: tuple[int, ...]
    effectful: dict[int, JaxprEqn]


def marked(jaxpr: Jaxpr) -> tuple[bool, ...]:
    """For each output, whether it is just what ``jevt.lazy`` marked, in ``jaxpr`` or in a call."""
    producers = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}

    def is_marked(atom: Atom) -> bool:
        if isinstance(atom, Literal) or atom not in producers:
            return False
        eqn, position = producers[atom]
        if eqn.primitive is lazy_p:
            return True
        if eqn.primitive in inline.IDENTITIES:
            return is_marked(eqn.invars[0])
        called = inline.called_jaxpr(eqn)
        if called is None:
            return False
        result = called.outvars[position]
        if isinstance(result, Var) and result in called.invars:
            return is_marked(eqn.invars[called.invars.index(result)])
        return marked(called)[position]

    return tuple(is_marked(a) for a in jaxpr.outvars)


def split(jaxpr: Jaxpr) -> Split:
    """Takes the marked outputs out of a step.

    Constants of calls become constants of both results.
    """
    marks = marked(jaxpr)
    # Equal values are one before it is asked what the step computes anyway.
    jaxpr = cse.run(dce.run(inline.run(jaxpr)))
    effects = _effects(jaxpr)
    effectful = {
        i: effects[a]
        for i, (a, mark) in enumerate(zip(jaxpr.outvars, marks, strict=True))
        if mark and isinstance(a, Var) and a in effects
    }
    put_off = [mark and i not in effectful for i, mark in enumerate(marks)]
    step = _with_outputs(jaxpr, jaxpr.eqns, [not later for later in put_off])
    there = {*step.invars, *step.constvars, *(v for eqn in step.eqns for v in eqn.outvars)}
    lazy = [
        i
        for i, (a, later) in enumerate(zip(jaxpr.outvars, put_off, strict=True))
        if later and isinstance(a, Var) and a not in there
    ]
    pure = [eqn for eqn in jaxpr.eqns if not eqn.effects]
    return Split(
        step=_with_outputs(jaxpr, jaxpr.eqns, [i not in lazy for i in range(len(marks))]),
        rest=_with_outputs(jaxpr, pure, [i in lazy for i in range(len(marks))]),
        lazy=tuple(lazy),
        effectful=effectful,
    )


def _effects(jaxpr: Jaxpr) -> dict[Var, JaxprEqn]:
    """Variables that depend on an equation with effects, and which."""
    effects: dict[Var, JaxprEqn] = {}
    for eqn in jaxpr.eqns:
        sources = (effects[a] for a in eqn.invars if isinstance(a, Var) and a in effects)
        source = eqn if eqn.effects else next(sources, None)
        if source is not None:
            effects |= dict.fromkeys(eqn.outvars, source)
    return effects


def _with_outputs(jaxpr: Jaxpr, eqns: Sequence[JaxprEqn], keep: Sequence[bool]) -> Jaxpr:
    """The jaxpr with these equations and some of its outputs, and without what is dead then."""
    outvars = [a for a, k in zip(jaxpr.outvars, keep, strict=True) if k]
    effects = set().union(*(eqn.effects for eqn in eqns))
    return dce.run(jaxpr.replace(outvars=outvars, eqns=list(eqns), effects=effects))
