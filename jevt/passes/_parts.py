"""A part of a matrix product: the way from the product to a slice of it, and the part by itself.

On the way, the product is seen otherwise (reshaped, transposed), a bias is added, its type changes.
Each axis of each value on the way consists of *factors* (:mod:`jevt.lowering.axes`). The slice
takes a range of some; where all of these are columns of one operand, the same equations on that
range of the operand's columns give the part.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.lowering.axes import Axes, Axis, Factor, flat, fresh
from jevt.lowering.errors import NotFusible
from jevt.passes._facts import shape_of
from jevt.passes._ranges import Range, Ranges, factors_of, free_axes, is_view, seen, unsplit
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph

type Cut = tuple[int, int, int]  # axis, start and limit


@dataclasses.dataclass(frozen=True)
class Part:
    """A slice of a product.

    Attributes:
      chain: the equations from the product to the slice, both included.
      axes: of the result of each equation of ``chain`` but the slice, in factors that are not split
        further.
      side: the operand of the product whose columns it has a part of.
      operand: this operand's axes.
      ranges: what the product of its own has of the factors that it does not have whole.
      cut: axis, start and limit of a slice at the end, if that product has more than the part.
    """

    chain: tuple[JaxprEqn, ...]
    axes: tuple[Axes, ...]
    side: int
    operand: Axes
    ranges: Ranges
    cut: Cut | None = None

    @property
    def product(self) -> JaxprEqn:
        return self.chain[0]

    @property
    def slice(self) -> JaxprEqn:
        return self.chain[-1]

    @property
    def all_columns(self) -> int:
        """The number of the operand's columns."""
        return math.prod(shape_of(self.product.invars[self.side])[d] for d in self._columns())

    def columns(self) -> np.ndarray:
        """Numbers of the columns that its product has."""
        factors = self._factors()
        numbers = np.arange(self.all_columns).reshape([f.size for f in factors])
        return numbers[tuple(slice(*self.ranges.of(f)) for f in factors)].ravel()

    def within(self, start: int, limit: int) -> Part | None:
        """The same slice, of a product of these columns; None if the chain sees them apart."""
        first, *others = self._factors()
        inner = math.prod(f.size for f in others)
        low, high, step = self.ranges.of(first)
        if self.ranges.taken.keys() != {first} or step != 1 or start % inner or limit % inner:
            return None
        begin = start // inner
        axis = next(i for i, axis in enumerate(self.axes[-1]) if first in axis)
        each = math.prod(f.size for f in self.axes[-1][axis][1:])
        cut = (axis, (low - begin) * each, (high - begin) * each)
        ranges = Ranges({first: (begin, limit // inner, 1)})
        return dataclasses.replace(self, ranges=ranges, cut=cut)

    def alone(self) -> JaxprEqn:
        """The product of these columns, of variables of its own, to ask what it costs."""
        operands = list(self.product.invars)
        operands[self.side] = self.ranges.like(operands[self.side], self.operand)
        (out,) = self.product.outvars
        return self.product.replace(invars=operands, outvars=[self.ranges.like(out, self.axes[0])])

    def is_in_order(self) -> bool:
        """Whether the slice lies in memory as the product of its columns does."""
        return self.ranges.order(self.axes[0]) == self.ranges.order(self.axes[-1])

    def is_one_piece(self) -> bool:
        """Whether the slice is one piece of the whole product's memory."""
        first, last = flat(self.axes[0]), flat(self.axes[-1])
        outermost = len(self.ranges.taken) == 1 and first[0] in self.ranges.taken
        return first == last and outermost and self.ranges.of(first[0])[2] == 1

    def emit(self, graph: Graph) -> Atom:
        """What stands for the slice: the chain from a product of its own."""
        graph.place(self.product)
        operands = [read(graph.env, atom) for atom in self.product.invars]
        operands[self.side] = self.ranges.part(operands[self.side], self.operand, graph)
        value = graph.emit(p.dot_general_p, *operands, **self.product.params)
        for (before, eqn), axes in zip(
            itertools.pairwise(self.chain[:-1]), self.axes[1:], strict=True
        ):
            graph.place(eqn)
            if eqn.primitive is p.transpose_p:
                value = graph.emit(p.transpose_p, value, **eqn.params)
            elif is_view(eqn):
                value = graph.reshape(value, self.ranges.shape(axes))
            else:
                (whole,) = before.outvars
                operands = [
                    value if a is whole else self._beside(read(graph.env, a), axes, graph)
                    for a in eqn.invars
                ]
                value = graph.emit(eqn.primitive, *operands, **eqn.params)
        return value if self.cut is None else _cut(value, self.cut, graph)

    def _beside(self, atom: Atom, axes: Axes, graph: Graph) -> Atom:
        """The part that meets this one, of another operand of a pointwise equation.

        It is taken of what the operand repeats or only has more axes of size 1 than.
        """
        shape = shape_of(atom)
        if not shape:
            return atom
        own = _present(axes, shape)
        view = graph.definition(atom)
        source = view.invars[0] if view is not None and view.invars else atom
        if view is not None and view.primitive is p.broadcast_in_dim_p:
            places = view.params["broadcast_dimensions"]
            small = _present([own[place] for place in places], shape_of(source))
            return graph.broadcast(
                self.ranges.part(source, small, graph), self.ranges.shape(own), places
            )
        if view is not None and is_view(view) and _only_units(view):
            small = _spread([axis for axis in own if axis], shape_of(source))
            return graph.reshape(self.ranges.part(source, small, graph), self.ranges.shape(own))
        return self.ranges.part(atom, own, graph)

    def _factors(self) -> list[Factor]:
        """The factors of the columns."""
        return factors_of(self.operand, self._columns())

    def _columns(self) -> list[int]:
        return free_axes(self.product, self.side)


def follow(chain: Sequence[JaxprEqn]) -> Part | None:
    """The part at the end of a chain of a product, views, pointwise equations and a slice.

    None if it is not a range of columns of one operand.
    """
    product, *way, last = chain
    axes = [fresh(shape_of(product.outvars[0]))]
    try:
        for eqn in way:
            axes.append(seen(eqn, axes[-1]))
    except NotFusible:  # reshapes that cut axes differently
        return None
    found = tuple(map(unsplit, axes))
    taken = _taken(last, found[-1])
    if not taken:
        return None
    for side in (0, 1):
        operand = _operand(product, side, found[0])
        if taken.keys() <= set(factors_of(operand, free_axes(product, side))):
            return Part(tuple(chain), found, side, operand, Ranges(taken))
    return None


def _taken(eqn: JaxprEqn, axes: Axes) -> dict[Factor, Range] | None:
    """What a slice takes of the factors that it does not take whole; None if that is no range."""
    result: dict[Factor, Range] = {}
    steps = eqn.params["strides"] or (1,) * len(axes)
    bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], steps, strict=True)
    for axis, (start, limit, step) in zip(axes, bounds, strict=True):
        size = math.prod(f.size for f in axis)
        if (start, limit, step) == (0, size, 1):
            continue
        inner = math.prod(f.size for f in axis[1:])
        if not axis or start % inner or limit % inner or (step > 1 and len(axis) > 1):
            return None
        result[axis[0]] = (start // inner, limit // inner, step)
    return result


def _operand(product: JaxprEqn, side: int, result: Axes) -> Axes:
    """The axes of an operand, from those of the result; contracted ones are its own."""
    operand = list(fresh(shape_of(product.invars[side])))
    batch = product.params["dimension_numbers"][1][side]
    of_left = len(free_axes(product, 0)) if side else 0
    own = result[len(batch) + of_left :]
    for dimension, axis in zip(batch, result, strict=False):
        operand[dimension] = axis
    for dimension, axis in zip(free_axes(product, side), own, strict=False):
        operand[dimension] = axis
    return tuple(operand)


def _present(axes: Sequence[Axis], shape: Sequence[int]) -> Axes:
    """The axes, but without what an array of this shape has one of."""
    return tuple(axis if size != 1 else () for axis, size in zip(axes, shape, strict=True))


def _only_units(eqn: JaxprEqn) -> bool:
    """Whether a view only adds or drops axes of size 1."""
    before, after = (shape_of(v) for v in (eqn.invars[0], eqn.outvars[0]))
    return eqn.primitive is not p.transpose_p and [s for s in before if s != 1] == [
        s for s in after if s != 1
    ]


def _spread(axes: Sequence[Axis], shape: Sequence[int]) -> Axes:
    """The axes of an array of this shape that has these of more than one element."""
    rest = iter(axes)
    return tuple(next(rest) if size != 1 else () for size in shape)


def _cut(whole: Atom, cut: Cut, graph: Graph) -> Atom:
    axis, start, limit = cut
    starts, limits = [0] * len(shape_of(whole)), list(shape_of(whole))
    starts[axis], limits[axis] = start, limit
    return graph.emit(
        p.slice_p,
        whole,
        start_indices=tuple(starts),
        limit_indices=tuple(limits),
        strides=None,
    )
