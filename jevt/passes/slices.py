"""Parts of an array are slices of it, of the array as it was before it was transposed.

Purpose: ``split`` and ``unstack`` have several results, and are calls to the partitioner; a slice
is a view, which a kernel reads in place. And of ``q, k, v = y.transpose(2, 0, 3, 1, 4)``, each
part is a transposition of its own then, so that attention is seen to have operands that need none.

Invariant: the same values. Left alone: single elements (the words of a key), arrays of keys, arrays
that fall into more than ``MAX_PARTS``, and transpositions that somebody reads whole.

    before  { lambda ; a:f32[8,2,4]. let
                b:f32[2,4,8] = transpose[permutation=(1, 2, 0)] a
                c:f32[4,8] d:f32[4,8] = unstack[axis=0] b in (c, d) }
    after   { lambda ; a:f32[8,2,4]. let
                e:f32[8,1,4] = slice[start_indices=(0, 0, 0) limit_indices=(8, 1, 4)] a
                f:f32[1,4,8] = transpose[permutation=(1, 2, 0)] e
                c:f32[4,8] = reshape f
                … in (c, d) }
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from jax import lax
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.partition.graph import elements
from jevt.passes._facts import kind, shape_of
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes._rules import Abandon, Graph

#: What takes an array apart along one axis.
_APART = (lax.split_p, lax.unstack_p)

#: Most parts; each is an equation more.
MAX_PARTS = 64


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Rewrites ``split`` and ``unstack``, and slices of transpositions, of ``jaxpr`` and bodies."""
    body = once(lambda inner: _run(inner, body))
    return _run(jaxpr, body)


def _run(jaxpr: Jaxpr, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    whole = _read_whole(jaxpr)

    def slice_of_transpose(eqn: JaxprEqn, graph: Graph) -> Atom | None:
        transpose = graph.definition(eqn.invars[0], p.transpose_p)
        if transpose is None or transpose.outvars[0] in whole:
            return None
        order = transpose.params["permutation"]
        places = sorted(range(len(order)), key=lambda axis: order[axis])
        params = {
            key: value and tuple(value[axis] for axis in places)
            for key, value in eqn.params.items()
        }
        part = graph.emit(p.slice_p, transpose.invars[0], **params)
        return graph.emit(p.transpose_p, part, permutation=order)

    graph = Graph(jaxpr, {p.slice_p: (slice_of_transpose,)})
    for original in jaxpr.eqns:
        eqn = map_bodies(substitute(graph.env, original), body)
        if eqn.primitive not in _APART or not _has_parts(eqn):
            graph.add(eqn)
            continue
        mark = len(graph.eqns)
        try:
            graph.env.update(_slices(eqn, graph))
        except Abandon:
            del graph.eqns[mark:]
            graph.add(eqn)
    return rebuild(jaxpr, graph.eqns, graph.env)


def _has_parts(eqn: JaxprEqn) -> bool:
    """Whether an array of numbers is taken apart into few arrays."""
    parts = [v.aval for v in eqn.outvars]
    return kind(parts[0]) != "" and len(parts) <= MAX_PARTS and any(elements(a) > 1 for a in parts)


def _slices(eqn: JaxprEqn, graph: Graph) -> dict[Var, Atom]:
    """What stands for the results of a ``split`` or ``unstack``."""
    (whole,) = eqn.invars
    axis, shape = eqn.params["axis"], shape_of(whole)
    sizes = [int(size) for size in eqn.params.get("sizes", (1,) * shape[axis])]
    graph.place(eqn)
    result: dict[Var, Atom] = {}
    for out, limit, size in zip(eqn.outvars, itertools.accumulate(sizes), sizes, strict=True):
        if isinstance(out, DropVar):
            continue
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = limit - size, limit
        part = graph.emit(
            p.slice_p,
            whole,
            start_indices=tuple(starts),
            limit_indices=tuple(limits),
            strides=None,
        )
        result[out] = graph.reshape(part, shape_of(out))
    return result


def _read_whole(jaxpr: Jaxpr) -> set[Atom]:
    """What something else reads than an equation that takes it apart."""
    parts = (p.slice_p, *_APART)
    read = [a for eqn in jaxpr.eqns if eqn.primitive not in parts for a in eqn.invars]
    return {a for a in (*read, *jaxpr.outvars) if isinstance(a, Var)}
