"""What the passes share: bodies to recurse into, and rebuilding a jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax import lax
from jax.extend.core import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    new_jaxpr_eqn,
    no_effects,
)
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom

# Equations with bodies that are ordinary jaxprs, and the parameters that hold them. Every other
# carrier of jaxprs (pallas_call, custom partitioning, a reduction's computation, …) gives them a
# meaning of its own and is left alone.
BODIES: Mapping[Primitive, tuple[str, ...]] = {
    p.scan_p: ("jaxpr",),
    p.while_p: ("cond_jaxpr", "body_jaxpr"),
    p.cond_p: ("branches",),
    p.jit_p: ("jaxpr",),
    internals.shard_map_p: ("jaxpr",),
}


def map_bodies(eqn: JaxprEqn, function: Callable[[Jaxpr], Jaxpr]) -> JaxprEqn:
    """The equation with ``function`` applied to its bodies; itself if nothing changed."""
    changed: dict[str, Any] = {}
    for key in BODIES.get(eqn.primitive, ()):
        value = eqn.params[key]
        if isinstance(value, Jaxpr):
            new = function(value)
            if new is not value:
                changed[key] = new
        else:
            news = tuple(map(function, value))
            if any(a is not b for a, b in zip(news, value, strict=True)):
                changed[key] = news
    return eqn.replace(params={**eqn.params, **changed}) if changed else eqn


def once(function: Callable[[Jaxpr], Jaxpr]) -> Callable[[Jaxpr], Jaxpr]:
    """``function``, applied once to each jaxpr: bodies that were shared stay shared."""
    done: dict[Jaxpr, Jaxpr] = {}

    def apply(jaxpr: Jaxpr) -> Jaxpr:
        if jaxpr not in done:
            done[jaxpr] = function(jaxpr)
        return done[jaxpr]

    return apply


def read(env: Mapping[Var, Atom], atom: Atom) -> Atom:
    """What stands for ``atom`` after substitution."""
    return env.get(atom, atom) if isinstance(atom, Var) else atom


def substitute(env: Mapping[Var, Atom], eqn: JaxprEqn) -> JaxprEqn:
    """The equation with its operands substituted; itself if none is."""
    if not any(isinstance(a, Var) and a in env for a in eqn.invars):
        return eqn
    return eqn.replace(invars=[read(env, a) for a in eqn.invars])


def rebuild(
    jaxpr: Jaxpr,
    eqns: Sequence[JaxprEqn],
    env: Mapping[Var, Atom],
    hoisted: Iterable[tuple[Var, object]] = (),
) -> Jaxpr:
    """``jaxpr`` with other equations; itself if nothing changed.

    Args:
      jaxpr: keeps its inputs, constants and debug information.
      eqns: the equations, substituted already.
      env: substitutions, applied to the outputs.
      hoisted: variables of new constants and their values.
    """
    outvars = [read(env, a) for a in jaxpr.outvars]
    hoisted = tuple(hoisted)
    if (
        not hoisted
        and len(eqns) == len(jaxpr.eqns)
        and all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True))
        and all(a is b for a, b in zip(outvars, jaxpr.outvars, strict=True))
    ):
        return jaxpr
    return jaxpr.replace(
        constvars=[*jaxpr.constvars, *(v for v, _ in hoisted)],
        consts=[*jaxpr.consts, *(c for _, c in hoisted)],
        outvars=outvars,
        eqns=list(eqns),
        effects=set().union(*(eqn.effects for eqn in eqns)),
        debug_info=jaxpr.debug_info,
    )


def barrier(values: Sequence[Atom], place: JaxprEqn) -> JaxprEqn:
    """An equation of the same values, through which XLA does not look.

    Args:
      values: whatever they are.
      place: gives the equation its place and settings.
    """
    results = [Var(value.aval) for value in values]
    return new_jaxpr_eqn(
        list(values),
        results,
        lax.optimization_barrier_p,
        {},
        no_effects,
        place.source_info,
        place.ctx,
    )


def is_scalar_literal(atom: Atom) -> bool:
    return isinstance(atom, Literal) and not getattr(atom.aval, "shape", ())
