"""Parts of an array are slices of it, and parts make an array by ``concatenate``.

Purpose: ``split`` and ``unstack`` have several results, and are calls to the partitioner, as is
``stack``, their gradient; a slice is a view, which a kernel reads in place. And where an array is
transposed only to be taken apart, ``q, k, v = y.transpose(2, 0, 3, 1, 4)``, its parts are
transposed instead: so attention is seen to have operands that need no transposition, and what is
left of them is no copy of the whole. In the gradient, the parts of a concatenation likewise.

Invariant: the same values. Left alone: single elements (the words of a key), arrays of keys, arrays
that fall into more than ``MAX_PARTS``, and transpositions and concatenations that somebody else
reads whole.

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
from collections.abc import Callable, Sequence

from jax import lax
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.partition.graph import elements
from jevt.passes._facts import kind, shape_of
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes._rules import Abandon, Graph, Rules, merged
from jevt.passes.canonical import views
from jevt.passes.canonical.views import without_units

#: What takes an array apart along one axis.
_APART = (lax.split_p, lax.unstack_p)

#: Most parts; each is an equation more.
MAX_PARTS = 64


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Rewrites what takes arrays apart and joins them, in ``jaxpr`` and in its bodies.

    Args:
      jaxpr: canonical.
    """
    body = once(lambda inner: _run(inner, body))
    return _run(jaxpr, body)


def _run(jaxpr: Jaxpr, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    graph = Graph(jaxpr, _rules(_read_whole(jaxpr)))
    for original in jaxpr.eqns:
        eqn = map_bodies(substitute(graph.env, original), body)
        if eqn.primitive not in _APART or not _is_of_few(eqn.invars[0], eqn.outvars):
            graph.add(eqn)
            continue
        mark = len(graph.eqns)
        try:
            graph.env.update(_slices(eqn, graph))
        except Abandon:
            del graph.eqns[mark:]
            graph.add(eqn)
    return rebuild(jaxpr, graph.eqns, graph.env)


def _rules(whole: set[Atom]) -> Rules:
    """The rules, in a program that reads ``whole`` otherwise than in parts."""
    shared: set[Atom] = set()  # concatenations that stand for a ``stack`` with several readers

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

    def stack(eqn: JaxprEqn, graph: Graph) -> Atom | None:
        (out,), axis, shape = eqn.outvars, eqn.params["axis"], shape_of(eqn.invars[0])
        if not _is_of_few(out, eqn.invars):
            return None
        wider = [graph.reshape(a, (*shape[:axis], 1, *shape[axis:])) for a in eqn.invars]
        joined = graph.emit(p.concatenate_p, *wider, dimension=axis)
        if graph.readers(out) > 1:
            shared.add(joined)
        return joined

    def transpose_of_concatenate(eqn: JaxprEqn, graph: Graph) -> Atom | None:
        joined = graph.definition(eqn.invars[0], p.concatenate_p)
        if joined is None or joined.outvars[0] in shared or graph.readers(joined.outvars[0]) > 1:
            return None
        order = eqn.params["permutation"]
        parts = [_transposed(a, order, graph) for a in joined.invars]
        dimension = order.index(joined.params["dimension"])
        return graph.emit(p.concatenate_p, *parts, dimension=dimension)

    own: Rules = {
        p.slice_p: (slice_of_transpose,),
        p.transpose_p: (transpose_of_concatenate,),
        lax.stack_p: (stack,),
    }
    return merged(views.RULES, own)


def _is_of_few(whole: Atom, parts: Sequence[Atom]) -> bool:
    """Whether an array of numbers falls into few parts, which are arrays themselves."""
    is_number = kind(whole.aval) != ""
    return is_number and len(parts) <= MAX_PARTS and any(elements(a.aval) > 1 for a in parts)


def _transposed(part: Atom, order: Sequence[int], graph: Graph) -> Atom:
    """The transposition of a part, of what it was before it got axes of size 1."""
    shape = shape_of(part)
    view = graph.definition(part, p.reshape_p)
    if view is None or without_units(shape_of(view.invars[0])) != without_units(shape):
        return graph.emit(p.transpose_p, part, permutation=tuple(order))
    moved = [axis for axis in order if shape[axis] != 1]
    source = graph.reshape(view.invars[0], without_units(shape))
    if moved != sorted(moved):
        permutation = tuple(sorted(moved).index(axis) for axis in moved)
        source = graph.emit(p.transpose_p, source, permutation=permutation)
    return graph.reshape(source, [shape[axis] for axis in order])


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
