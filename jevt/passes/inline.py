"""Inlining: calls become the equations that they call.

Purpose: one flat jaxpr, so that later passes and the partitioner see across calls.

Invariant: equations keep their order, sources and settings (``eqn.ctx``); name scopes are prefixed
as JAX's own lowering prefixes them. A body of control flow stays a body, inlined within itself.

    before  { lambda ; a:f32[8]. let
                b:f32[8] = jit[name=relu jaxpr={ lambda ; c:f32[8]. let
                    d:f32[8] = custom_jvp_call[call_jaxpr={ lambda ; e:f32[8]. let
                        f:f32[8] = max e 0.0:f32[] in (f,) } …] c in (d,) }] a
              in (b,) }
    after   { lambda ; a:f32[8]. let b:f32[8] = max a 0.0:f32[] in (b,) }

``jax.checkpoint`` is inlined behind the same barrier with which JAX lowers it: the operands that
``prevent_cse`` names pass through an ``optimization_barrier`` when the body is a recomputation in a
backward pass, so that nothing computed from them is shared with the forward pass.

Equations that only speak to transformations (``stop_gradient``, the ``name`` of
``checkpoint_name``) or to the caller (``jevt.lazy``) are their operands. Kept as calls: a ``jit``
with shardings, layouts or compiler options of its own.

A choice that is made already is its branch: a ``cond`` of a known index, above all the one with
which JAX asks for the platform (``jnp.diagonal``, for one) where all of them get the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Literal, Primitive, Var, new_jaxpr_eqn
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt._lazy import lazy_p
from jevt.passes._rewrite import map_bodies, once, read, rebuild, substitute


def _jit(eqn: JaxprEqn) -> Jaxpr | None:
    return eqn.params["jaxpr"] if internals.is_plain_jit(eqn) else None


def _parameter(name: str) -> Callable[[JaxprEqn], Jaxpr | None]:
    return lambda eqn: eqn.params[name]


# The jaxpr that an equation calls, None where it has to stay a call. By name for jevt's own
# primitive, whose module imports the pipeline.
_CALLS: Mapping[Primitive, Callable[[JaxprEqn], Jaxpr | None]] = {
    p.jit_p: _jit,
    p.closed_call_p: _parameter("call_jaxpr"),
    p.custom_jvp_call_p: _parameter("call_jaxpr"),
    p.custom_vjp_call_p: _parameter("call_jaxpr"),
    internals.remat_p: _parameter("jaxpr"),
    internals.custom_vmap_call_p: _parameter("call"),
    internals.remat_opt_p: _parameter("fwd_jaxpr"),
}

# For which a program may be compiled, as JAX calls them.
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# Nothing but their operand, once nothing is differentiated any more.
IDENTITIES = frozenset({p.stop_gradient_p, p.name_p, lazy_p})


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Inlines the calls of ``jaxpr`` and of its bodies.

    Constants of called jaxprs become constants of the result; those of calls inside bodies do not
    leave them, such a call is kept.
    """
    body = once(lambda inner: _run(inner, None, body))
    return _run(jaxpr, _Constants(), body)


def splice(jaxpr: Jaxpr, operands: Sequence[Atom], scope: Any, eqns: list[JaxprEqn]) -> list[Atom]:
    """Appends the equations of ``jaxpr``, named in ``scope``; returns its results."""
    env: dict[Var, Atom] = dict(zip(jaxpr.invars, operands, strict=True))
    _inline(jaxpr, env, eqns, scope, None, lambda inner: _run(inner, None, lambda j: j))
    return [read(env, a) for a in jaxpr.outvars]


type _Body = Callable[[Jaxpr], Jaxpr]


def _run(jaxpr: Jaxpr, constants: _Constants | None, body: _Body) -> Jaxpr:
    env: dict[Var, Atom] = {}
    eqns: list[JaxprEqn] = []
    _inline(jaxpr, env, eqns, None, constants, body)
    return rebuild(jaxpr, eqns, env, () if constants is None else constants.items())


class _Constants:
    """Variables for constants that are hoisted out of calls, one for each array."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[Var, Any]] = {}

    def variable(self, var: Var, value: Any) -> Var:
        return self._by_id.setdefault(id(value), (Var(var.aval), value))[0]

    def items(self) -> Iterator[tuple[Var, Any]]:
        return iter(self._by_id.values())


def _inline(
    jaxpr: Jaxpr,
    env: dict[Var, Atom],
    eqns: list[JaxprEqn],
    prefix: Any,
    constants: _Constants | None,
    body: _Body,
) -> None:
    """Appends the equations of ``jaxpr`` to ``eqns``.

    Args:
      jaxpr: the top, or what an equation calls.
      env: its inputs, and receives its variables. At the top (no ``prefix``) variables stay what
        they are; a called jaxpr may be called again, so its variables are replaced by new ones.
      eqns: the equations so far.
      prefix: name stack of the call, None at the top.
      constants: where constants of called jaxprs go, None to keep calls that have any.
      body: inlines a body.
    """
    for eqn in jaxpr.eqns:
        if (index := _platform_index(eqn)) is not None:
            env[eqn.outvars[0]] = index
            continue
        operands = [read(env, a) for a in eqn.invars]
        called = called_jaxpr(eqn)
        if (branch := _known_branch(eqn, operands)) is not None:
            called, operands = branch, operands[1:]
        if called is not None and (not called.consts or constants is not None):
            scope = _scope(eqn, prefix)
            if eqn.primitive is internals.remat_p:
                operands = _barrier(eqn, operands, scope, eqns)
            inner: dict[Var, Atom] = dict(zip(called.invars, operands, strict=True))
            for var, value in zip(called.constvars, called.consts, strict=True):
                assert constants is not None
                inner[var] = constants.variable(var, value)
            _inline(called, inner, eqns, scope, constants, body)
            env.update(zip(eqn.outvars, (read(inner, a) for a in called.outvars), strict=True))
            continue
        if eqn.primitive in IDENTITIES and eqn.invars[0].aval == eqn.outvars[0].aval:
            env[eqn.outvars[0]] = read(env, eqn.invars[0])
            continue
        new = substitute(env, map_bodies(eqn, body))
        if prefix is not None:
            outvars = [v if isinstance(v, DropVar) else Var(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outvars, strict=True))
            source = eqn.source_info
            new = new.replace(
                outvars=outvars, source_info=source.replace(name_stack=prefix + source.name_stack)
            )
        eqns.append(new)


def called_jaxpr(eqn: JaxprEqn) -> Jaxpr | None:
    """The jaxpr to put in the equation's place."""
    if eqn.primitive.name == "jevt_call":
        called = eqn.params["call_jaxpr"]
    else:
        rule = _CALLS.get(eqn.primitive)
        called = rule(eqn) if rule is not None else None
    # An effect on a mutable array names the variable it acts on; renaming that is not worth it, as
    # JAX turns these into values before it lowers.
    return None if called is None or internals.touches_refs([eqn]) else called


def _platform_index(eqn: JaxprEqn) -> Literal | None:
    """The answer to the question for the platform, None if not all of them get the same."""
    if eqn.primitive is not internals.platform_index_p:
        return None
    choices = [
        next((i for i, names in enumerate(eqn.params["platforms"]) if _serves(names, name)), None)
        for name in _PLATFORMS
    ]
    if choices[0] is None or len(set(choices)) > 1:
        return None
    return Literal(np.int32(choices[0]), eqn.outvars[0].aval)


def _serves(names: Sequence[str] | None, name: str) -> bool:
    return names is None or name in names


def _known_branch(eqn: JaxprEqn, operands: Sequence[Atom]) -> Jaxpr | None:
    """The branch of a ``cond`` whose index is a number; one out of range means the last."""
    if eqn.primitive is not p.cond_p or not isinstance(operands[0], Literal):
        return None
    if internals.touches_refs([eqn]):
        return None
    branches: Sequence[Jaxpr] = eqn.params["branches"]
    position = int(operands[0].val)
    return branches[position if 0 <= position < len(branches) else -1]


def _scope(eqn: JaxprEqn, prefix: Any) -> Any:
    """Name stack of a call's equations, as JAX's lowering of the call gives it."""
    stack = eqn.source_info.name_stack
    if prefix is not None:
        stack = prefix + stack
    if eqn.primitive is p.jit_p:
        return stack.extend(f"jit({eqn.params['name']})")
    if eqn.primitive is internals.remat_p:
        return stack.extend("checkpoint")
    if eqn.primitive is p.cond_p:
        return stack.extend("cond")
    return stack


def _barrier(
    eqn: JaxprEqn, operands: Sequence[Atom], scope: Any, eqns: list[JaxprEqn]
) -> list[Atom]:
    """The operands of a ``checkpoint``, behind a barrier if it is a recomputation."""
    prevent = eqn.params["prevent_cse"]
    if isinstance(prevent, bool):
        prevent = (prevent,) * len(operands)
    guarded = [
        i
        for i, a in enumerate(operands)
        if eqn.params["differentiated"] and prevent[i] and isinstance(a, Var)
    ]
    result = list(operands)
    if guarded:
        for i in guarded:
            result[i] = Var(operands[i].aval)
        eqns.append(
            new_jaxpr_eqn(
                [operands[i] for i in guarded],
                [result[i] for i in guarded],
                lax.optimization_barrier_p,
                {},
                set(),
                eqn.source_info.replace(name_stack=scope),
                eqn.ctx,
            )
        )
    return result
