"""Constants of loops and branches are made where they are read.

Purpose: tracing moves what a loop's body computes from no input out of the loop: masks of
positions, arrays of one number, numbers. Inside, they are then arrays like any other, which are
read from memory in each iteration, and of which nothing is known. Made in the body, they cost a
kernel no operand, and a mask can be seen to be causal.

Invariant: the same values. What is repeated is arithmetic on numbers and positions, of at most
``MAX_EQUATIONS`` equations. Operands that the bodies read no more are left to dead-code
elimination.

    before  { lambda ; a:f32[4,8]. let
                b:f32[8] = broadcast_in_dim 0.5
                c:f32[4,8] = scan[jaxpr={ lambda ; d:f32[8] e:f32[8]. let
                                    f:f32[8] = mul d e in (f,) }] b a in (c,) }
    after   { lambda ; a:f32[4,8]. let
                b:f32[8] = broadcast_in_dim 0.5
                c:f32[4,8] = scan[jaxpr={ lambda ; d:f32[8] e:f32[8]. let
                                    g:f32[8] = broadcast_in_dim 0.5
                                    f:f32[8] = mul g e in (f,) }] b a in (c,) }
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.passes._rewrite import map_bodies, read, rebuild
from jevt.passes.fold_constants import FOLDABLE

#: Longest computation that is repeated.
MAX_EQUATIONS = 16

type Definitions = Mapping[Var, JaxprEqn]


def _scan(eqn: JaxprEqn) -> Iterator[tuple[str, int, range]]:
    yield "jaxpr", 0, range(internals.scan_operands(eqn)[0])


def _while(eqn: JaxprEqn) -> Iterator[tuple[str, int, range]]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    yield "cond_jaxpr", 0, range(first)
    yield "body_jaxpr", first, range(second)


def _cond(eqn: JaxprEqn) -> Iterator[tuple[str, int, range]]:
    yield "branches", 1, range(len(eqn.invars) - 1)


# For each body: its parameter, which operand is its first input, and which inputs keep their value.
_CARRIERS: Mapping[Primitive, Callable[[JaxprEqn], Iterator[tuple[str, int, range]]]] = {
    p.scan_p: _scan,
    p.while_p: _while,
    p.cond_p: _cond,
}


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Repeats constants in the bodies of ``jaxpr``'s loops and branches, inner ones included."""
    definitions: dict[Var, JaxprEqn] = {}
    eqns = []
    for eqn in jaxpr.eqns:
        carrier = _CARRIERS.get(eqn.primitive)
        if carrier is not None:
            eqn = _sunk(eqn, carrier, definitions)
        eqns.append(map_bodies(eqn, run))
        definitions.update((v, eqn) for v in eqn.outvars)
    return rebuild(jaxpr, eqns, {})


def _sunk(
    eqn: JaxprEqn,
    carrier: Callable[[JaxprEqn], Iterator[tuple[str, int, range]]],
    definitions: Definitions,
) -> JaxprEqn:
    changed: dict[str, Any] = {}
    for parameter, first, inputs in carrier(eqn):
        found = {}
        for i in inputs:
            operand = eqn.invars[first + i]
            equations = _constant(operand, definitions)
            if equations is not None:
                found[i] = operand, equations
        if found:
            value = eqn.params[parameter]
            bodies = (value,) if isinstance(value, Jaxpr) else value
            new = tuple(_with(body, found) for body in bodies)
            if any(a is not b for a, b in zip(new, bodies, strict=True)):
                changed[parameter] = new[0] if isinstance(value, Jaxpr) else new
    return eqn.replace(params={**eqn.params, **changed}) if changed else eqn


def _constant(atom: Atom, definitions: Definitions) -> list[JaxprEqn] | None:
    """The equations that compute a value from no input; None if there are none, or too many.

    No equation at all for a number.
    """
    found: dict[Var, JaxprEqn] = {}
    stack: list[Atom] = [atom]
    while stack:
        var = stack.pop()
        if isinstance(var, Literal) or var in found:
            continue
        eqn = definitions.get(var)
        if eqn is None or eqn.primitive not in FOLDABLE or len(found) >= MAX_EQUATIONS:
            return None
        found[var] = eqn
        stack.extend(eqn.invars)
    order = {var: position for position, var in enumerate(definitions)}
    return [found[var] for var in sorted(found, key=order.__getitem__)]


def _is_same(var: Var, constant: Atom) -> bool:
    """Whether a constant can stand for an input: a number has no weak type, and no mesh axes."""
    have: Any = constant.aval
    want: Any = var.aval
    same: bool = have == want or (isinstance(constant, Literal) and have.strip_weak_type() == want)
    return same


def _with(body: Jaxpr, constants: Mapping[int, tuple[Atom, list[JaxprEqn]]]) -> Jaxpr:
    """A body that computes some of its inputs."""
    env: dict[Var, Atom] = {}
    eqns: list[JaxprEqn] = []
    readers = {v for eqn in body.eqns for v in eqn.invars if isinstance(v, Var)}
    for i, (constant, equations) in constants.items():
        if body.invars[i] not in readers or not _is_same(body.invars[i], constant):
            continue
        made: dict[Var, Atom] = {}
        for eqn in equations:
            out = Var(eqn.outvars[0].aval)
            invars = [read(made, atom) for atom in eqn.invars]
            eqns.append(eqn.replace(invars=invars, outvars=[out]))
            made[eqn.outvars[0]] = out
        env[body.invars[i]] = read(made, constant)
    if not env:
        return body
    eqns += [
        eqn.replace(invars=[read(env, atom) for atom in eqn.invars])
        if any(isinstance(a, Var) and a in env for a in eqn.invars)
        else eqn
        for eqn in body.eqns
    ]
    return body.replace(eqns=eqns)
