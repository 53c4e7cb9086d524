"""Masks of edges, which ``jnp.where`` spells after a lookup, become masks of the lookup's indices.

Purpose: graphs are padded with edges that must not count, and ``where(mask[:, None], h[src], 0)``
is neither rows of a table nor a product with a number an edge. A lookup beyond the table gives a
row of 0, and that the kernels of sums of segments know.

    where(m, t[i], 0)        = t[where(m, i, beyond)]                  beyond: filled up with 0
    where(m, x·w, 0)         = where(m, x, 0)·where(m, w, 0)           w: one number an edge
    where(m, x / w, 0)       = where(m, x, 0) / where(m, w, 1)

Invariant: the same values, bit for bit, NaN and infinities included: what is masked is 0. Left
alone is a mask that varies along a row.

    before  { lambda ; a:f32[9,4] b:i32[50,1] c:bool[50]. let
                d:f32[50,4] = gather[CLIP] a b; e:bool[50,4] = broadcast_in_dim c
                f:f32[50,4] = select_n e 0.0 d in (f,) }
    after   { lambda ; a:f32[9,4] b:i32[50,1] c:bool[50]. let
                d:i32[50,1] = select_n (reshape c) -1 (min (max b 0) 8)
                f:f32[50,4] = gather[FILL_OR_DROP fill_value=0] a d in (f,) }
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p
from jax.lax import GatherScatterMode as Mode

from jevt._jaxpr import Atom
from jevt.passes import _rows
from jevt.passes._facts import is_float, kind, shape_of
from jevt.passes._rules import Graph, Rule
from jevt.passes.reductions.tools import Expression, constant_along, spread

#: Products and casts between a lookup and its mask.
_DEPTH = 8


def rule(smallest: int) -> Rule:
    """The rule for ``select_n``, for arrays from so many elements on."""

    def select(eqn: JaxprEqn, graph: Graph) -> Atom | None:
        which, *cases = eqn.invars
        shape = shape_of(eqn.outvars[0])
        if len(cases) != 2 or math.prod(shape) < smallest or not is_float(eqn.outvars[0].aval):
            return None
        for position in (1, 0):
            value, other = cases[position], cases[1 - position]
            if shape_of(value) == shape and graph.constant(other) == 0:
                found = _Mask(which, position == 1, shape, graph).of(value)
                return None if found is None else found.write()
        return None

    return select


@dataclasses.dataclass(frozen=True)
class _Masked:
    """Something that can be masked.

    Attributes:
      inner: its axes along which the mask does not vary: those of a row.
      write: emits it, masked.
    """

    inner: tuple[int, ...]
    write: Expression


class _Mask:
    """A mask of an array.

    Args:
      which: the mask.
      keeps: its value for which an element counts.
      shape: of the array.
      graph: of both.
    """

    def __init__(self, which: Atom, keeps: bool, shape: tuple[int, ...], graph: Graph) -> None:
        self.which = which
        self.keeps = keeps
        self.shape = shape
        self.graph = graph

    def of(self, value: Atom, depth: int = _DEPTH) -> _Masked | None:
        """A value of the array's shape, masked; None if it is not made of a lookup of rows."""
        eqn = self.graph.definition(value)
        if eqn is None or depth == 0 or shape_of(value) != self.shape:
            return None
        if eqn.primitive is p.gather_p:
            return self._lookup(eqn)
        if eqn.primitive is p.convert_element_type_p and is_float(eqn.invars[0].aval):
            return self._then(eqn, self.of(eqn.invars[0], depth - 1))
        if eqn.primitive is p.neg_p:
            return self._then(eqn, self.of(eqn.invars[0], depth - 1))
        if eqn.primitive is p.div_p:
            return self._scaled(eqn, 0, depth)
        if eqn.primitive is p.mul_p and eqn.params.get("out_dtype") is None:
            return self._scaled(eqn, 0, depth) or self._scaled(eqn, 1, depth)
        return None

    def _then(self, eqn: JaxprEqn, masked: _Masked | None) -> _Masked | None:
        if masked is None:
            return None
        emit, write = self.graph.emit, masked.write
        return _Masked(masked.inner, lambda: emit(eqn.primitive, write(), **eqn.params))

    def _scaled(self, eqn: JaxprEqn, position: int, depth: int) -> _Masked | None:
        """A product or quotient whose operand at a position is made of a lookup."""
        rows = self.of(eqn.invars[position], depth - 1)
        if rows is None:
            return None
        other = self.of(eqn.invars[1 - position], depth - 1)
        if other is not None and (other.inner != rows.inner or eqn.primitive is p.div_p):
            return None
        factor = self._factor(eqn, position, rows.inner) if other is None else other.write
        if factor is None:
            return None

        def write() -> Atom:
            operands = [rows.write(), factor()]
            ordered = operands if position == 0 else operands[::-1]
            return self.graph.emit(eqn.primitive, *ordered, **eqn.params)

        return _Masked(rows.inner, write)

    def _factor(self, eqn: JaxprEqn, position: int, inner: tuple[int, ...]) -> Expression | None:
        """The other operand, one number an edge, where it is masked 0, or 1 as a divisor."""
        graph, factor = self.graph, eqn.invars[1 - position]
        value = graph.constant(factor)
        if value is not None:
            divides_by_zero = eqn.primitive is p.div_p and value == 0
            return None if not np.isfinite(value) or divides_by_zero else lambda: factor
        part = constant_along(factor, self.shape, inner, graph)
        mask = self._along(inner)
        if part is None or mask is None:
            return None
        neutral = graph.literal(1.0 if eqn.primitive is p.div_p else 0.0, factor.aval)

        def write() -> Atom:
            rest = [a for a in range(len(self.shape)) if a not in inner]
            kept = tuple(self.shape[a] for a in rest)
            masked = self._choose(mask(), spread(part(), kept, graph), graph.full(neutral, kept))
            return graph.broadcast(masked, self.shape, rest)

        return write

    def _lookup(self, eqn: JaxprEqn) -> _Masked | None:
        """Rows of a table, whose indices are beyond it where they are masked."""
        graph = self.graph
        table, indices = eqn.invars
        access, mode, aval = _rows.of_gather(eqn), _rows.mode_of(eqn), indices.aval
        if access is None or access.column is not None or mode not in _rows.MODES:
            return None
        if mode == Mode.FILL_OR_DROP and eqn.params["fill_value"] != 0:
            return None
        beyond = _beyond(aval, access.rows)
        inner = tuple(sorted((*access.window, *access.single)))
        mask = self._along(inner)
        if beyond is None or mask is None or not access.indices:
            return None

        def write() -> Atom:
            index: Atom = indices
            if mode == Mode.CLIP:
                nearest = min(access.rows - 1, int(np.iinfo(aval.dtype).max))  # type: ignore[attr-defined]
                last, first = (graph.literal(n, aval) for n in (nearest, 0))
                index = graph.emit(p.min_p, graph.emit(p.max_p, index, first), last)
            shape = shape_of(indices)
            which = graph.reshape(spread(mask(), access.indices, graph), shape)
            nowhere = graph.full(graph.literal(beyond, aval), shape)
            params = {**eqn.params, "mode": Mode.FILL_OR_DROP, "fill_value": 0}
            params |= {"indices_are_sorted": False, "unique_indices": False}
            return graph.emit(p.gather_p, table, self._choose(which, index, nowhere), **params)

        return _Masked(inner, write)

    def _along(self, inner: tuple[int, ...]) -> Expression | None:
        """The mask without the axes of a row; None if it varies along them."""
        part = constant_along(self.which, self.shape, inner, self.graph)
        kept = tuple(n for a, n in enumerate(self.shape) if a not in inner)
        return None if part is None else lambda: spread(part(), kept, self.graph)

    def _choose(self, which: Atom, value: Atom, masked: Atom) -> Atom:
        cases = (masked, value) if self.keeps else (value, masked)
        return self.graph.emit(p.select_n_p, which, *cases)


def _beyond(aval: Any, rows: int) -> int | None:
    """An index of this type that is no row, None if there is none."""
    if kind(aval) != "i":
        return None
    limits = np.iinfo(aval.dtype)
    if limits.min < 0:
        return -1
    return int(limits.max) if limits.max >= rows else None
