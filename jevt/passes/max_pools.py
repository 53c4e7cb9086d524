"""Maximum pooling that has a gradient becomes arithmetic on shifted arrays. For GPUs.

Purpose: XLA finds the largest element of each window with its coordinates, four numbers and more a
window, and adds the gradients to an array of zeros with atomics. As :mod:`jevt.primitives.pools`
has it, XLA makes two fusions that read and write little more than they must, of which the first
makes the pool, too: it reads the same elements.

Invariant: the element that ``select_and_scatter_add`` selects, which is the first of equal ones,
window by window in the order of memory; beyond the array there is −∞. Gradients are added in
float32 and in a fixed order. Left alone: large windows and steps, small arrays, pools of integers
and of 8-bit floats, and those on a mesh of devices.

    before  { lambda ; a:f32[64,64] b:f32[64,256]. let
                c:f32[64,256] = select_and_scatter_add[
                  select_prim=ge window_dimensions=(1, 4) window_strides=(1, 4) padding=…
                ] a b in (c,) }
    after   { lambda ; a:f32[64,64] b:f32[64,256]. let
                c:f32[64,256] = pool_gradient[
                  largest=True window_dimensions=(1, 4) window_strides=(1, 4) padding=…
                ] a b in (c,) }
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, subjaxprs
from jevt.passes._rules import Graph, rewrite
from jevt.primitives.pools import pool_gradient_p, pool_p

#: Elements of a window, and from one window to the next, at most; elements of an array at least.
_LARGEST, _SMALLEST = 32, 1 << 16


_SELECTED_BY: dict[Primitive, Primitive] = {
    p.reduce_window_max_p: p.ge_p,
    p.reduce_window_min_p: p.le_p,
}


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Rewrites pools that have a gradient, and the gradients, in ``jaxpr`` and in its bodies."""
    trained = {_key(eqn.invars[1], _window(eqn)) for eqn in _gradients(jaxpr)}

    def pool(eqn: JaxprEqn, graph: Graph) -> Atom | None:
        params = eqn.params
        plain = {*params["base_dilation"], *params["window_dilation"]} <= {1}
        window = _window(eqn)
        if not plain or _key(eqn.invars[0], window) not in trained:
            return None
        return graph.emit(pool_p, eqn.invars[0], **window)

    rules = {p.select_and_scatter_add_p: (_gradient,), **dict.fromkeys(_SELECTED_BY, (pool,))}
    return rewrite(jaxpr, rules)


def _gradients(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The gradients of pools that are rewritten, those of bodies too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is p.select_and_scatter_add_p and _is_taken(eqn):
            yield eqn
        for _, _, body in subjaxprs(eqn):
            yield from _gradients(body)


def _key(x: Atom, window: Mapping[str, Any]) -> Hashable:
    return x, *window.values()


def _window(eqn: JaxprEqn) -> dict[str, Any]:
    """The parameters of the primitives that a pool, or a gradient, becomes."""
    params = eqn.params
    return {
        "largest": _SELECTED_BY.get(eqn.primitive, params.get("select_prim")) is p.ge_p,
        "window_dimensions": tuple(params["window_dimensions"]),
        "window_strides": tuple(params["window_strides"]),
        "padding": tuple(map(tuple, params["padding"])),
    }


def _gradient(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    return graph.emit(pool_gradient_p, *eqn.invars, **_window(eqn)) if _is_taken(eqn) else None


def _is_taken(eqn: JaxprEqn) -> bool:
    params = eqn.params
    dy, x = (_aval(atom) for atom in eqn.invars)
    return bool(
        params["select_prim"] in (p.ge_p, p.le_p)
        and 1 < math.prod(params["window_dimensions"]) <= _LARGEST
        and math.prod(params["window_strides"]) <= _LARGEST
        and dy.dtype == x.dtype
        and jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.itemsize > 1
        and dy.sharding.mesh.empty
        and x.sharding.mesh.empty
        and x.size >= _SMALLEST
        and dy.size > 0
        and all(low >= 0 and high >= 0 for low, high in params["padding"])
    )


def _aval(atom: Atom) -> Any:
    return atom.aval
