"""Random bits become arithmetic: ``random_bits`` of a threefry key, by its definition.

Purpose: the bits of a dropout mask are a function of their position, so they can be computed in the
kernel that uses them and need no memory. ``random_bits`` hides that function; ``threefry2x32`` of
an ``iota`` shows it.

Invariant: the same bits. The equations are obtained by tracing the generator's own definition. Left
alone: other generators (``rbg``), arrays below ``MIN_SIZE`` elements, the older generation that is
not a function of the position (``jax_threefry_partitionable=False``), and positions beyond 32 bits.

    before  { lambda ; a:key<fry>[]. let
                b:u32[64,32] = random_bits[bit_width=32 shape=(64, 32)] a in (b,) }
    after   { lambda ; a:key<fry>[]. let
                c:u32[2] = random_unwrap a
                d:u32[] e:u32[] = unstack[axis=0] c
                f:u32[64,32] = broadcast_in_dim[shape=(64, 32)] 0:u32[]
                g:u32[2048] = iota[dimension=0 dtype=uint32 shape=(2048,)]
                h:u32[64,32] = reshape[new_sizes=(64, 32)] g
                i:u32[64,32] j:u32[64,32] = threefry2x32 d e f h
                b:u32[64,32] = xor i j
              in (b,) }

A ``random_unwrap`` of a ``random_wrap`` is its operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p
from jax.extend.random import threefry_prng_impl

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes.inline import splice

MIN_SIZE = 1024


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Expands the random bits of ``jaxpr`` and of its bodies."""
    body = once(lambda inner: _run(inner, body))
    return _run(jaxpr, body)


def _run(jaxpr: Jaxpr, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    env: dict[Var, Atom] = {}
    eqns: list[JaxprEqn] = []
    bases: dict[Var, Atom] = {}  # keys -> the array that they wrap
    for old in jaxpr.eqns:
        eqn = map_bodies(substitute(env, old), body)
        definition = _definition(eqn)
        if definition is None:
            spliced = [eqn]
        else:
            spliced = []
            (bits,) = splice(definition, eqn.invars, eqn.source_info.name_stack, spliced)
            env[eqn.outvars[0]] = bits
            spliced = [new.replace(source_info=eqn.source_info) for new in spliced]
        for new in spliced:
            if new.primitive is internals.random_wrap_p:
                bases[new.outvars[0]] = new.invars[0]
            if new.primitive is internals.random_unwrap_p and new.invars[0] in bases:
                env[new.outvars[0]] = bases[new.invars[0]]
            elif definition is not None and new.primitive is internals.iota_2x32_shape_p:
                eqns.extend(_explicit_iota(new))
            else:
                eqns.append(substitute(env, new))
    return rebuild(jaxpr, eqns, env)


def _definition(eqn: JaxprEqn) -> Jaxpr | None:
    """The bits of a ``random_bits`` equation as a function of its keys, None to leave it alone."""
    if eqn.primitive is not p.random_bits_p or not eqn.ctx.threefry_partitionable:
        return None
    keys: Any = eqn.invars[0].aval
    bit_width, shape = eqn.params["bit_width"], eqn.params["shape"]
    size = math.prod(shape)
    if not internals.is_threefry(keys) or size * math.prod(keys.shape) < MIN_SIZE or size >= 2**32:
        return None

    def bits(key: jax.Array) -> jax.Array:
        return threefry_prng_impl.random_bits(jax.random.key_data(key), bit_width, shape)

    for _ in keys.shape:
        bits = jax.vmap(bits)
    with eqn.ctx.manager:
        definition = jax.make_jaxpr(bits)(keys)
    # Inside `shard_map` a type also says over which axes a value varies.
    same_type = definition.out_avals == [eqn.outvars[0].aval]
    return definition if same_type and not definition.consts else None


def _explicit_iota(eqn: JaxprEqn) -> list[JaxprEqn]:
    """The high and low words of the position, for sizes whose high word is zero."""
    shape = eqn.params["shape"]
    with eqn.ctx.manager:
        words = jax.make_jaxpr(
            lambda: (
                lax.full(shape, jnp.uint32(0)),
                lax.reshape(lax.iota(jnp.uint32, math.prod(shape)), shape),
            )
        )()
    eqns: list[JaxprEqn] = []
    results = splice(words, [], eqn.source_info.name_stack, eqns)
    named = dict(zip((v for v in results if isinstance(v, Var)), eqn.outvars, strict=True))
    return [
        new.replace(outvars=[named.get(v, v) for v in new.outvars], source_info=eqn.source_info)
        for new in eqns
    ]
