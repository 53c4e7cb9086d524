"""Common-subexpression elimination: equal equations of equal operands are computed once.

Purpose: the backward pass computes again what the forward pass did, and several layers derive the
same masks and step-dependent scalars; merged, a value is one node of the graph to be partitioned.

Invariant: an equation is dropped only for an earlier one with the same primitive, parameters,
operands (in either order where it does not matter) and settings (``eqn.ctx``). Never for, or of:
equations with effects, barriers, copies, generators with hidden state. Nothing is shared across an
``optimization_barrier``: a value computed from its results has other operands by construction; one
computed from no input at all (a mask of ``iota``) is shared only between barriers, since sharing it
across would keep it in memory, which a recomputation is there to avoid.

    before  { lambda ; a:f32[8]. let
                b:f32[8] = exp a; c:f32[8] = exp a; d:f32[8] = add b c in (d,) }
    after   { lambda ; a:f32[8]. let
                b:f32[8] = exp a; d:f32[8] = add b b in (d,) }
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute

# By name, as several of them have no public object: equal operands do not make equal results, or
# being a separate value is the point.
_DISTINCT = frozenset(
    {
        "copy",
        "copy_p",
        "create_token",
        "after_all",
        "empty",
        "empty2",
        "new_ref",
        "empty_ref",
        "freeze",
        "infeed",
        "outfeed",
        "optimization_barrier",
        "pure_callback",
        "rng_uniform",
    }
)

# The same bits in either order.
_COMMUTATIVE = frozenset(
    {
        *(p.add_p, p.add_jaxvals_p, p.mul_p, p.max_p, p.min_p),
        *(p.and_p, p.or_p, p.xor_p, p.eq_p, p.ne_p),
    }
)


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Merges equal equations of ``jaxpr``, and of each body within itself."""
    body = once(lambda inner: _run(inner, body))
    return _run(jaxpr, body)


def _run(jaxpr: Jaxpr, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    env: dict[Var, Atom] = {}
    eqns: list[JaxprEqn] = []
    known: dict[Hashable, JaxprEqn] = {}
    # Variables that depend on an input, or lie behind a barrier.
    dependent = {*jaxpr.invars, *jaxpr.constvars}
    segment = 0
    for old in jaxpr.eqns:
        eqn = map_bodies(substitute(env, old), body)
        is_barrier = eqn.primitive is lax.optimization_barrier_p
        segment += is_barrier
        from_input = is_barrier or any(isinstance(a, Var) and a in dependent for a in eqn.invars)
        if from_input:
            dependent.update(eqn.outvars)
        key = _key(eqn, None if from_input else segment)
        earlier = known.get(key) if key is not None else None
        if earlier is not None and _same_results(earlier, eqn):
            env.update(zip(eqn.outvars, earlier.outvars, strict=True))
            continue
        if key is not None:
            known[key] = eqn
        eqns.append(eqn)
    return rebuild(jaxpr, eqns, env)


def _key(eqn: JaxprEqn, segment: int | None) -> Hashable | None:
    """Equal for equal computations; None for an equation that must not be merged."""
    if eqn.effects or eqn.primitive.name in _DISTINCT:
        return None
    operands: Any = tuple(_literal_key(a) if isinstance(a, Literal) else a for a in eqn.invars)
    if eqn.primitive in _COMMUTATIVE:
        operands = frozenset(operands)  # of two: one alone is meant twice
    key = (eqn.primitive, operands, tuple(sorted(eqn.params.items())), eqn.ctx, segment)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _literal_key(literal: Literal) -> Hashable:
    """Value and type of a literal; -0.0 is not 0.0, and a NaN is the same NaN."""
    aval: Any = literal.aval
    if getattr(aval, "shape", None) != ():
        return id(literal.val)
    return np.asarray(literal.val).tobytes(), type(literal.val), aval


def _same_results(earlier: JaxprEqn, eqn: JaxprEqn) -> bool:
    """Whether every result that is read exists in the earlier equation, with the same type."""
    return all(
        isinstance(b, DropVar) or (not isinstance(a, DropVar) and a.aval == b.aval)
        for a, b in zip(earlier.outvars, eqn.outvars, strict=True)
    )
