"""One element a row, by position, as one-hot arithmetic: gathers and scatters become fusible.

Purpose: a cross entropy with integer labels reads one logit of each row and, differentiated, adds
to one. Spelled as a gather and a scatter it is two kernels and a pass over an array of zeros;
spelled as a comparison with the position it is part of the kernel that goes through the row anyway.

    h = (iota == i)      gather[r, i] = Σ_c (h ? x : 0)      scatter_add(0, i, u) = (h ? u : 0)

Invariant: the same elements, exactly, but that -0.0 is read as 0.0: a sum with one term that is
not zero is not rounded, and a NaN elsewhere in the row is not looked at. Positions outside of the
row give what JAX gives: under ``FILL_OR_DROP`` the fill value and no update, under ``CLIP`` the
nearest element; with ``PROMISE_IN_BOUNDS`` XLA's own behaviour, which clamps a gather and drops a
scatter. (Negative positions that count from the end are made positive by equations of their own.)
Left alone: an axis that is not the last one, several elements a row, and a gather from an array
that nothing else computes on or reads, of which it reads less than a row.

    before  { lambda ; a:f32[8,5] b:i32[8,1,1]. let
                c:f32[8,1] = gather[collapsed_slice_dims=(1,) mode=CLIP …] a b in (c,) }
    after   { lambda ; a:f32[8,5] b:i32[8,1,1]. let
                d:i32[8] = reshape b; e:i32[8] = clamp 0 d 4; f:i32[8,5] = iota[dimension=1]
                g:i32[8,5] = broadcast_in_dim[broadcast_dimensions=(0,)] e; h:bool[8,5] = eq f g
                i:f32[8,5] = select_n h 0.0… a; j:f32[8] = reduce_sum[axes=(1,)] i
                c:f32[8,1] = reshape j in (c,) }

A gather, or a ``scatter_add`` to zeros, at one constant position is a slice, or padding:
``x[..., 0]`` is written so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import primitives as p
from jax.lax import GatherScatterMode as Mode

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rules import Graph, merged, rewrite
from jevt.passes.canonical import views


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Rewrites the gathers and scatters of ``jaxpr`` and of its bodies that go row by row."""
    return rewrite(jaxpr, RULES)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where a gather or scatter reaches, in the words of both.

    Attributes:
      dropped: axes of the operand, along which a slice has one element and that the slice loses.
      indexed: axes of the operand that the components of an index select from, in order.
      batch: axes of the operand that go along with ``index_batch``, axes of the indices.
      window: axes of the slices in the result, or in the updates.
    """

    dropped: tuple[int, ...]
    indexed: tuple[int, ...]
    batch: tuple[int, ...]
    index_batch: tuple[int, ...]
    window: tuple[int, ...]


def _places(*axes: Iterable[Any]) -> _Places:
    return _Places(*(tuple(map(int, group)) for group in axes))


def _of_gather(eqn: JaxprEqn) -> _Places:
    d = eqn.params["dimension_numbers"]
    return _places(
        d.collapsed_slice_dims,
        d.start_index_map,
        d.operand_batching_dims,
        d.start_indices_batching_dims,
        d.offset_dims,
    )


def _of_scatter(eqn: JaxprEqn) -> _Places:
    d = eqn.params["dimension_numbers"]
    return _places(
        d.inserted_window_dims,
        d.scatter_dims_to_operand_dims,
        d.operand_batching_dims,
        d.scatter_indices_batching_dims,
        d.update_window_dims,
    )


def _rows(operand: Atom, indices: Atom, places: _Places, graph: Graph) -> Atom | None:
    """For each row of ``operand`` the position in it, None if there is not one for each row.

    Slices must have one element; axes of size 1 that they keep do not matter then.
    """
    shape, index_shape = shape_of(operand), shape_of(indices)
    rank, components = len(shape), index_shape[-1] if index_shape else 0
    last = rank - 1
    if last < 1 or math.prod(index_shape[:-1]) != math.prod(shape[:-1]):
        return None
    if 0 in shape or not jax.dtypes.issubdtype(indices.aval.dtype, np.integer):  # type: ignore[attr-defined]
        return None
    long = [axis for axis in range(last) if shape[axis] != 1]
    if places.indexed == (last,) and not {*places.dropped} & {*long} and components == 1:
        # The rows are batch axes of both, but that axes of size 1 are none.
        pairs = zip(places.batch, places.index_batch, strict=True)
        along = [(axis, other) for axis, other in pairs if axis in long]
        if [axis for axis, _ in along] != long or along != sorted(along, key=lambda p: p[1]):
            return None
        return graph.reshape(indices, shape[:-1])
    if places.indexed == places.dropped == tuple(range(rank)) and components == rank:
        # The rows are components of the index, each of which counts its axis.
        parts = graph.definition(indices, p.concatenate_p)
        if parts is None or parts.params["dimension"] != len(index_shape) - 1:
            return None
        if len(parts.invars) != rank or index_shape[:-1] != shape[:-1]:
            return None
        counted = all(_counts(part, axis, graph) for axis, part in enumerate(parts.invars[:-1]))
        return graph.reshape(parts.invars[-1], shape[:-1]) if counted else None
    return None


def _counts(atom: Atom, axis: int, graph: Graph) -> bool:
    """Whether ``atom`` is its own coordinate along ``axis``."""
    iota = graph.definition(atom, p.iota_p)
    if iota is not None:
        return bool(iota.params["dimension"] == axis)
    return shape_of(atom)[axis] == 1 and graph.constant(atom) == 0


def _widened(index: Atom, graph: Graph) -> Atom:
    """The positions in a type that holds every position of a row."""
    aval: Any = index.aval
    return index if aval.dtype.itemsize >= 4 else graph.convert(index, np.int32)


def _clamped(index: Atom, size: int, graph: Graph) -> Atom:
    low, high = graph.literal(0, index.aval), graph.literal(size - 1, index.aval)
    return graph.emit(p.clamp_p, low, index, high)


def _one_hot(index: Atom, shape: tuple[int, ...], graph: Graph) -> Atom:
    aval: Any = index.aval
    last = len(shape) - 1
    position = graph.emit(p.iota_p, dtype=aval.dtype, shape=shape, dimension=last, sharding=None)
    return graph.emit(p.eq_p, position, graph.broadcast(index, shape, range(last)))


def _gather(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """One element of each row."""
    x, indices = eqn.invars
    out: Any = eqn.outvars[0].aval
    shape, mode = shape_of(x), eqn.params["mode"]
    if kind(out) not in ("f", "i") or max(shape, default=0) >= 2**31:
        return None
    if not _is_read_anyway(x, graph) or any(size != 1 for size in eqn.params["slice_sizes"]):
        return None
    index = _rows(x, indices, _of_gather(eqn), graph)
    if index is None:
        return None
    size = shape[-1]
    if mode == Mode.FILL_OR_DROP:
        index = graph.convert(index, np.int32)  # as JAX does
    elif mode in (Mode.CLIP, Mode.PROMISE_IN_BOUNDS):
        index = _clamped(_widened(index, graph), size, graph)
    else:
        return None
    zeros = graph.full(graph.literal(0, out), shape)
    chosen = graph.emit(p.select_n_p, _one_hot(index, shape, graph), zeros, x)
    result = graph.emit(p.reduce_sum_p, chosen, axes=(len(shape) - 1,), out_sharding=None)
    if mode == Mode.FILL_OR_DROP:
        if eqn.params["fill_value"] is None:
            return None
        fill = graph.full(graph.literal(eqn.params["fill_value"], out), shape[:-1])
        result = graph.emit(p.select_n_p, is_inside(index, size, graph), fill, result)
    return graph.reshape(result, out.shape)


def is_inside(index: Atom, size: int, graph: Graph) -> Atom:
    """``0 ≤ index < size``."""
    low = graph.emit(p.ge_p, index, graph.literal(0, index.aval))
    high = graph.emit(p.le_p, index, graph.literal(size - 1, index.aval))
    return graph.emit(p.and_p, low, high)


def _is_read_anyway(x: Atom, graph: Graph) -> bool:
    """Whether a kernel has the rows at hand: someone computes them, or reads them as well."""
    made = graph.definition(x)
    return graph.readers(x) > 1 or (made is not None and made.primitive in views.POINTWISE)


def _scatter_add(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """One element to each row of zeros."""
    x, indices, updates = eqn.invars
    out: Any = eqn.outvars[0].aval
    mode = eqn.params["mode"]
    if kind(out) not in ("f", "i") or graph.constant(x) != 0:
        return None
    places = _of_scatter(eqn)
    index = _rows(x, indices, places, graph)
    if index is None or any(shape_of(updates)[axis] != 1 for axis in places.window):
        return None
    index = _widened(index, graph)
    if mode == Mode.CLIP:
        index = _clamped(index, out.shape[-1], graph)
    elif mode not in (Mode.FILL_OR_DROP, Mode.PROMISE_IN_BOUNDS):
        return None
    rows = graph.reshape(updates, out.shape[:-1])
    spread = graph.broadcast(rows, out.shape, range(len(out.shape) - 1))
    zeros = graph.full(graph.literal(0, out), out.shape)
    return graph.emit(p.select_n_p, _one_hot(index, out.shape, graph), zeros, spread)


def _window(
    shape: tuple[int, ...], indices: Atom, places: _Places, sizes: tuple[int, ...], graph: Graph
) -> tuple[int, ...] | None:
    """First corner of the slice that constant indices select, None if not known or not inside."""
    start = graph.constant(indices)
    if start is None or places.batch or math.prod(shape_of(indices)[:-1]) != 1:
        return None
    corner = tuple(int(start) if axis in places.indexed else 0 for axis in range(len(shape)))
    inside = all(0 <= c <= n - s for c, n, s in zip(corner, shape, sizes, strict=True))
    return corner if inside else None


def _constant_gather(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A gather at one constant position is a slice."""
    x, indices = eqn.invars
    sizes = tuple(eqn.params["slice_sizes"])
    corner = _window(shape_of(x), indices, _of_gather(eqn), sizes, graph)
    if corner is None:
        return None
    if sizes != shape_of(x):
        limits = tuple(c + s for c, s in zip(corner, sizes, strict=True))
        x = graph.emit(p.slice_p, x, start_indices=corner, limit_indices=limits, strides=None)
    return graph.reshape(x, shape_of(eqn.outvars[0]))


def _constant_scatter(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A ``scatter_add`` to zeros at one constant position is padding."""
    x, indices, updates = eqn.invars
    out: Any = eqn.outvars[0].aval
    if kind(out) not in ("f", "i", "c") or graph.constant(x) != 0:
        return None
    places, shape = _of_scatter(eqn), shape_of(x)
    window, dropped = iter(places.window), {*places.dropped, *places.batch}
    sizes = tuple(
        1 if axis in dropped else shape_of(updates)[next(window)] for axis in range(len(shape))
    )
    corner = _window(shape, indices, places, sizes, graph)
    if corner is None:
        return None
    result = graph.reshape(updates, sizes)
    if sizes != shape:
        padding = tuple((c, n - c - s, 0) for c, n, s in zip(corner, shape, sizes, strict=True))
        result = graph.emit(p.pad_p, result, graph.literal(0, out), padding_config=padding)
    return result


RULES = merged(
    {p.gather_p: (_constant_gather, _gather), p.scatter_add_p: (_constant_scatter, _scatter_add)},
    views.RULES,
)
