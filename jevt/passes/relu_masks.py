"""Masks of relus are taken from their results.

Purpose: the gradient of ``y = max(x, 0)`` is masked by ``x > 0``, so that ``x`` is kept for the
backward pass beside ``y``, which the next layer keeps for its own gradient. ``y > 0`` is the same
mask, and nobody needs ``x``.

Invariant: equal masks, NaN and all: ``max(x, c) > c`` where ``x > c``, for the same constant. Only
a maximum that is there already is read, so that nothing more is computed.

    before  { lambda ; a:f32[8] b:f32[8]. let
                c:f32[8] = max a 0.0:f32[]; d:bool[8] = gt a 0.0:f32[]
                e:f32[8] = select_n d 0.0:f32[] b in (c, e) }
    after   { lambda ; a:f32[8] b:f32[8]. let
                c:f32[8] = max a 0.0:f32[]; d:bool[8] = gt c 0.0:f32[]
                e:f32[8] = select_n d 0.0:f32[] b in (c, e) }
"""

from __future__ import annotations

import math

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt.passes._rewrite import is_scalar_literal, map_bodies, once, rebuild


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Takes the masks of ``jaxpr`` and of its bodies from the results of relus."""
    body = once(run)
    results: dict[tuple[Var, int | float], Var] = {}
    eqns: list[JaxprEqn] = []
    for original in jaxpr.eqns:
        eqn = map_bodies(original, body)
        key = _key(eqn)
        if key is not None and eqn.primitive is p.max_p:
            results.setdefault(key, eqn.outvars[0])
        elif key in results and eqn.primitive is p.gt_p:
            eqn = eqn.replace(invars=[results[key], eqn.invars[1]])
        eqns.append(eqn)
    return rebuild(jaxpr, eqns, {})


def _key(eqn: JaxprEqn) -> tuple[Var, int | float] | None:
    """The value and the finite real constant that a maximum or a comparison has as operands."""
    if eqn.primitive not in (p.max_p, p.gt_p):
        return None
    operands = list(eqn.invars)
    if eqn.primitive is p.max_p and isinstance(operands[0], Literal):
        operands.reverse()
    value, constant = operands
    if not isinstance(value, Var) or not is_scalar_literal(constant):
        return None
    assert isinstance(constant, Literal)
    number = np.asarray(constant.val).item()
    return None if isinstance(number, complex) or not math.isfinite(number) else (value, number)
