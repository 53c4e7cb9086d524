"""What the terms of a sum of segments are made of: rows of a table, times weights.

The terms are followed back through products with one number an edge (or one an edge and head),
quotients, outer products and casts to the lookup of rows that they began with. Where that succeeds,
nothing of the size of the terms needs to be made: they are computed where they are added up.
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
from jevt.passes._facts import is_float, shape_of
from jevt.passes._rows import Access, Layout, transposed
from jevt.passes._rules import Graph
from jevt_kernels.ops import compute_dtype

#: Products and casts between a lookup and its sum.
_DEPTH = 8

_NOWHERE = -1


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of a sum, one a position.

    Attributes:
      table: ``[M, W]``.
      columns: the table's row of each term, ``int32[E]``; None: the table is the terms.
      weight: ``[E]``, or ``[E, H]`` for H equal parts of a row; None without.
      fills: columns that are no row of the table count as a row of 0.
      reason: why the terms are made, where they are.
    """

    table: Atom
    columns: Atom | None = None
    weight: Atom | None = None
    fills: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Factor:
    """What rows are multiplied with.

    Attributes:
      atom: the factor.
      places: for each of its axes, the axis of the terms.
      inverse: whether they are divided by it.
    """

    atom: Atom
    places: tuple[int, ...]
    inverse: bool = False


type _Found = tuple[JaxprEqn, tuple[Factor, ...], tuple[Any, ...]]


class _Search:
    """The way back from terms to a lookup; remembers why it ended where it did."""

    def __init__(self, layout: Layout, shape: tuple[int, ...], graph: Graph) -> None:
        self.layout = layout
        self.shape = shape
        self.graph = graph
        self.reason = "they are not looked up in a table"

    def find(
        self,
        rows: Atom,
        places: tuple[int, ...],
        factors: tuple[Factor, ...],
        casts: tuple[Any, ...],
        depth: int = _DEPTH,
    ) -> _Found | None:
        """The lookup, the factors and the casts on the way, the last one first.

        ``places`` are the axes of the terms that the axes of ``rows`` are.
        """
        eqn = self.graph.definition(rows)
        if eqn is None or depth == 0:
            return None
        if eqn.primitive is p.gather_p:
            return (eqn, factors, casts) if self._looks_up(eqn, places) else None
        if eqn.primitive is p.convert_element_type_p and is_float(eqn.invars[0].aval):
            casts = (*casts, eqn.params["new_dtype"])
            return self.find(eqn.invars[0], places, factors, casts, depth - 1)
        if eqn.primitive is p.neg_p:
            negative = Factor(self.graph.literal(-1, eqn.outvars[0].aval), ())
            return self.find(eqn.invars[0], places, (*factors, negative), casts, depth - 1)
        if (before := before_view(eqn, places)) is not None:
            return self.find(eqn.invars[0], before, factors, casts, depth - 1)
        for inner, factor in self._readings(eqn, places):
            if shape_of(inner) == shape_of(rows) and self._is_weight(factor):
                found = self.find(inner, places, (*factors, factor), casts, depth - 1)
                if found is not None:
                    return found
        return None

    def _readings(self, eqn: JaxprEqn, places: tuple[int, ...]) -> list[tuple[Atom, Factor]]:
        """The ways to read an equation as rows times, or divided by, a factor."""
        if eqn.primitive is p.mul_p and eqn.params.get("out_dtype") is None:
            x, y = eqn.invars
            return [
                (rows, Factor(factor, places[: len(shape_of(factor))]))
                for rows, factor in ((x, y), (y, x))
            ]
        if eqn.primitive is p.div_p:
            x, y = eqn.invars
            return [(x, Factor(y, places[: len(shape_of(y))], inverse=True))]
        if eqn.primitive is p.dot_general_p:
            return self._outer(eqn, places)
        return []

    def _outer(self, eqn: JaxprEqn, places: tuple[int, ...]) -> list[tuple[Atom, Factor]]:
        (contracted, _), batch = eqn.params["dimension_numbers"]
        if contracted:
            return []
        start, own = len(batch[0]), []
        for x, b in zip(eqn.invars, batch, strict=True):
            free = [a for a in range(len(shape_of(x))) if a not in b]
            at = {a: i for i, a in enumerate(b)} | {a: start + i for i, a in enumerate(free)}
            own.append(tuple(at[a] for a in range(len(shape_of(x)))))
            start += len(free)
        x, y = eqn.invars
        ways = ((x, own[0], y, own[1]), (y, own[1], x, own[0]))
        return [
            (rows, Factor(factor, tuple(places[a] for a in where)))
            for rows, at_rows, factor, where in ways
            if at_rows == tuple(range(len(places)))
        ]

    def _looks_up(self, eqn: JaxprEqn, places: tuple[int, ...]) -> bool:
        found = _rows.of_gather(eqn)
        if found is None or found.layout(places) != self.layout:
            self.reason = "their lookup is not one of whole rows, along the axes of the sum"
            return False
        if found.tables * found.rows >= 2**31:
            self.reason = "their table has too many rows"
            return False
        if eqn.params["mode"] == Mode.FILL_OR_DROP and eqn.params["fill_value"] != 0:
            self.reason = "what they look up beyond the table is not 0"
            return False
        return eqn.params["mode"] in _rows.MODES

    def _is_weight(self, factor: Factor) -> bool:
        try:
            axes_of(factor, self.layout, self.shape, self.graph)
        except TooFine as error:
            self.reason = str(error)
            return False
        return True


class TooFine(Exception):
    """A factor is not one number an edge, or an edge and head."""


def read(updates: Atom, access: Access, dtype: Any, graph: Graph) -> Terms:
    """The terms of a sum.

    Args:
      updates: what a scatter adds.
      access: where it adds them.
      dtype: of the sum.
      graph: receives equations for table, columns and weights.
    """
    search = _Search(access.layout(), shape_of(updates), graph)
    found = search.find(updates, tuple(range(len(shape_of(updates)))), (), ())
    if found is None:
        return Terms(access.parts(updates, graph), reason=search.reason)
    lookup, factors, casts = found
    of_table = _rows.of_gather(lookup)
    assert of_table is not None
    array, indices = lookup.invars
    table = rounded(of_table.table(array, graph), casts, graph)
    mode = _rows.mode_of(lookup)
    return Terms(
        table,
        of_table.numbers(indices, mode, graph),
        weight_of(factors, access.layout(), shape_of(updates), dtype, graph),
        fills=mode == Mode.FILL_OR_DROP,
    )


def rounded(table: Atom, casts: tuple[Any, ...], graph: Graph) -> Atom:
    """A table whose rows are cast, the last cast first, after they are looked up.

    Casts to wider types are left to the kernel, which reads less without them.
    """
    aval: Any = table.aval
    sizes = [np.dtype(d).itemsize for d in (aval.dtype, *reversed(casts))]
    narrowing = [i for i in range(1, len(sizes)) if sizes[i] < sizes[i - 1]]
    for cast in tuple(reversed(casts))[: narrowing[-1] if narrowing else 0]:
        table = graph.convert(table, cast)  # the same numbers, rounded once a row of the table
    return table


def before_view(eqn: JaxprEqn, places: tuple[int, ...]) -> tuple[int, ...] | None:
    """``places`` of the axes of a view's result, for those of its operand.

    Views are transpositions, and reshapes that add or drop axes of one element (whose place is that
    of no axis). None for other equations.
    """
    if eqn.primitive is p.transpose_p:
        at = {a: places[i] for i, a in enumerate(eqn.params["permutation"])}
    elif eqn.primitive in (p.reshape_p, p.squeeze_p):
        before, after = (
            [(a, n) for a, n in enumerate(shape_of(x)) if n != 1]
            for x in (eqn.invars[0], eqn.outvars[0])
        )
        if [n for _, n in before] != [n for _, n in after]:
            return None
        at = {a: places[b] for (a, _), (b, _) in zip(before, after, strict=True)}
    else:
        return None
    return tuple(at.get(a, _NOWHERE) for a in range(len(shape_of(eqn.invars[0]))))


def axes_of(
    factor: Factor, layout: Layout, shape: tuple[int, ...], graph: Graph
) -> tuple[Atom, tuple[int, ...], int]:
    """A factor without its repetitions, where its axes are among the terms', and how many heads.

    Raises:
      TooFine: it has a number for each element, or none for an edge.
    """
    atom, places = _seen_through(factor, graph)
    varying = {a for a, n in zip(places, shape_of(atom), strict=True) if n > 1}
    inner = [i for i, a in enumerate(layout.window) if a in varying]
    kept = layout.window[: inner[-1] + 1] if inner else ()
    heads = math.prod(shape[a] for a in kept)
    if kept and (heads == layout.width or not varying.intersection(layout.positions)):
        raise TooFine("they are multiplied element by element")
    return atom, places, heads


def _seen_through(factor: Factor, graph: Graph) -> tuple[Atom, tuple[int, ...]]:
    """What a factor is a broadcast of, and where its axes are."""
    atom, places = factor.atom, factor.places
    for _ in range(_DEPTH):
        eqn = graph.definition(atom)
        if eqn is None:
            break
        if eqn.primitive is p.broadcast_in_dim_p:
            places = tuple(places[d] for d in eqn.params["broadcast_dimensions"])
        elif (before := before_view(eqn, places)) is not None:
            places = before
        else:
            break
        atom = eqn.invars[0]
    return atom, places


def weight_of(
    factors: tuple[Factor, ...], layout: Layout, shape: tuple[int, ...], dtype: Any, graph: Graph
) -> Atom | None:
    """All factors as one array ``[E]`` or ``[E, H]``."""
    wide = compute_dtype(np.dtype(dtype))
    several = len(factors) > 1
    found = [(f, *axes_of(f, layout, shape, graph)) for f in factors]
    heads = math.lcm(*(h for *_, h in found)) if found else 1
    kept: list[int] = []
    for a in layout.window:
        if math.prod(shape[b] for b in kept) == heads:
            break
        kept.append(a)
    target = (*layout.positions, *kept)
    sizes = tuple(shape[a] for a in target)
    total: Atom | None = None
    for factor, atom, places, _ in found:
        own = [(places[a], n) for a, n in enumerate(shape_of(atom)) if n > 1]
        dense = graph.reshape(atom, tuple(n for _, n in own))
        order = sorted(range(len(own)), key=lambda i: target.index(own[i][0]))
        dense = transposed(dense, order, graph)
        if several or factor.inverse:
            dense = graph.convert(dense, wide)
        if factor.inverse:
            one = graph.full(graph.literal(1, dense.aval), shape_of(dense))
            dense = graph.emit(p.div_p, one, dense)
        if shape_of(dense) != sizes:
            at = tuple(target.index(own[i][0]) for i in order)
            dense = graph.broadcast(dense, sizes, at)
        dense = graph.reshape(dense, (layout.count, heads) if heads > 1 else (layout.count,))
        total = dense if total is None else graph.mul(total, dense)
    return total
