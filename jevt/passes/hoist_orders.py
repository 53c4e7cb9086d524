"""What sums of segments need of their indices is made once for all steps of a loop.

Purpose: where layers are a ``scan``, the graph is among the loop's constants. Sorting its indices,
and bringing columns and weights into that order, is then the same work in each step.

Invariant: the same values. Moved is what depends on nothing but constants of the loop, and only as
far as a sum of segments reads it; loops inside loops hand it outwards.

    before  { lambda ; a:i32[50] b:f32[3,9,4]. let
                c:f32[9,4] = scan[jaxpr={ lambda ; d:i32[50] e:f32[9,4] f:f32[9,4]. let
                                    g:i32[50] = segment_order d
                                    h:i32[10] = segment_bounds[rows=9] d g
                                    … = segment_sum h … in (…) }] a … b in (c,) }
    after   { lambda ; a:i32[50] b:f32[3,9,4]. let
                i:i32[50] = segment_order a; j:i32[10] = segment_bounds[rows=9] a i
                c:f32[9,4] = scan[jaxpr={ lambda ; d:i32[50] h:i32[10] e:f32[9,4] f:f32[9,4]. let
                                    … = segment_sum h … in (…) }] a j … b in (c,) }
"""

from __future__ import annotations

from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt import _jaxpr
from jevt._jaxpr import Atom
from jevt.passes._rewrite import BODIES, map_bodies, once, read, rebuild
from jevt.primitives.segments import (
    segment_blocks_p,
    segment_bounds_p,
    segment_order_p,
    segment_sum_p,
)

_ORDERS = (segment_order_p, segment_bounds_p, segment_blocks_p)


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Moves orders, bounds and what is permuted by them out of the loops of ``jaxpr``."""
    body = once(run)
    eqns: list[JaxprEqn] = []
    for original in jaxpr.eqns:
        eqn = map_bodies(original, body)
        eqns += _hoisted(eqn) if eqn.primitive is p.scan_p else [eqn]
    return rebuild(jaxpr, eqns, {})


def _hoisted(loop: JaxprEqn) -> list[JaxprEqn]:
    """The equations that leave a loop, and the loop."""
    body: Jaxpr = loop.params["jaxpr"]
    constants, carry, inputs = internals.scan_operands(loop)
    made: dict[Var, JaxprEqn] = {}
    ordered: set[Atom] = set()  # of them, bounds and what depends on an order
    known = set(body.invars[:constants])
    for eqn in () if body.constvars else body.eqns:
        depends = [a for a in eqn.invars if isinstance(a, Var)]
        whole = depends and eqn.primitive not in BODIES and not eqn.effects
        if whole and all(a in known or a in made for a in depends):
            made.update(dict.fromkeys(eqn.outvars, eqn))
            if eqn.primitive in _ORDERS or any(a in ordered for a in depends):
                ordered.update(eqn.outvars)
    wanted = [
        a
        for eqn in body.eqns
        if not any(v in made for v in eqn.outvars)
        for a in eqn.invars
        if isinstance(a, Var) and a in made
        if eqn.primitive is segment_sum_p or (eqn.primitive is p.scan_p and a in ordered)
    ]
    roots = list(dict.fromkeys(wanted))
    if not roots:
        return [loop]
    outside: dict[Var, Atom] = dict(zip(body.invars, loop.invars[:constants], strict=False))
    moved = []
    for eqn in _needed(body, roots, made):
        outvars = [Var(v.aval) for v in eqn.outvars]
        moved.append(eqn.replace(invars=[read(outside, a) for a in eqn.invars], outvars=outvars))
        outside.update(zip(eqn.outvars, outvars, strict=True))
    # The equations of the body that made them are left to dead-code elimination.
    inner = {root: Var(root.aval) for root in roots}
    new_body = _jaxpr.make(
        [*body.invars[:constants], *inner.values(), *body.invars[constants:]],
        list(body.outvars),
        [e.replace(invars=[read(inner, a) for a in e.invars]) for e in body.eqns],
    )
    operands = [*loop.invars[:constants], *(read(outside, r) for r in roots)]
    counts = (constants + len(roots), carry, inputs)
    rest = loop.invars[constants:]
    return [*moved, internals.scan_like(loop, new_body, [*operands, *rest], counts, loop.outvars)]


def _needed(body: Jaxpr, roots: list[Var], made: dict[Var, JaxprEqn]) -> list[JaxprEqn]:
    """The equations that the roots depend on, in order."""
    needed: set[Var] = set()
    stack: list[Atom] = list(roots)
    while stack:
        var = stack.pop()
        if isinstance(var, Var) and var in made and var not in needed:
            needed.update(made[var].outvars)
            stack.extend(made[var].invars)
    return [eqn for eqn in body.eqns if any(v in needed for v in eqn.outvars)]
