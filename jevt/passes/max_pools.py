"""Gradients of maximum pooling become arithmetic on shifted arrays. For GPUs.

Purpose: XLA finds the largest element of each window with its coordinates, four numbers and more a
window, and adds the gradients to an array of zeros with atomics. As :mod:`jevt.primitives.pools`
has it, XLA makes two fusions that read and write little more than they must.

Invariant: the element that ``select_and_scatter_add`` selects, which is the first of equal ones,
window by window in the order of memory; beyond the array there is −∞. Gradients are added in
float32 and in a fixed order. Left alone: large windows, small arrays, pools of integers and of
8-bit floats, and those on a mesh of devices.

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
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._rules import Graph, rewrite
from jevt.primitives.pools import pool_gradient_p

#: Elements of a window at most, and of an array at least.
_LARGEST, _SMALLEST = 32, 1 << 16


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Rewrites the gradients of pools, in ``jaxpr`` and in its bodies."""
    return rewrite(jaxpr, {p.select_and_scatter_add_p: (_gradient,)})


def _gradient(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    params = eqn.params
    dy, x = (_aval(atom) for atom in eqn.invars)
    taken = (
        params["select_prim"] in (p.ge_p, p.le_p)
        and 1 < math.prod(params["window_dimensions"]) <= _LARGEST
        and dy.dtype == x.dtype
        and jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.itemsize > 1
        and dy.sharding.mesh.empty
        and x.sharding.mesh.empty
        and x.size >= _SMALLEST
        and dy.size > 0
        and all(low >= 0 and high >= 0 for low, high in params["padding"])
    )
    if not taken:
        return None
    return graph.emit(
        pool_gradient_p,
        *eqn.invars,
        largest=params["select_prim"] is p.ge_p,
        window_dimensions=tuple(params["window_dimensions"]),
        window_strides=tuple(params["window_strides"]),
        padding=tuple(map(tuple, params["padding"])),
    )


def _aval(atom: Atom) -> Any:
    return atom.aval
