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
from collections.abc import Mapping, Sequence

import numpy as np
from jax.extend.core import JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.lowering.axes import Axes, Axis, Factor, flat, fresh, unify
from jevt.lowering.errors import NotFusible
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph

type Range = tuple[int, int, int]  # start, limit and step
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
      taken: what the product of its own has of the factors that it does not have whole.
      cut: axis, start and limit of a slice at the end, if that product has more than the part.
    """

    chain: tuple[JaxprEqn, ...]
    axes: tuple[Axes, ...]
    side: int
    operand: Axes
    taken: Mapping[Factor, Range]
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
        return numbers[tuple(slice(*self._range(f)) for f in factors)].ravel()

    def within(self, start: int, limit: int) -> Part | None:
        """The same slice, of a product of these columns; None if the chain sees them apart."""
        first, *others = self._factors()
        inner = math.prod(f.size for f in others)
        low, high, step = self._range(first)
        if self.taken.keys() != {first} or step != 1 or start % inner or limit % inner:
            return None
        begin = start // inner
        axis = next(i for i, axis in enumerate(self.axes[-1]) if first in axis)
        each = math.prod(f.size for f in self.axes[-1][axis][1:])
        cut = (axis, (low - begin) * each, (high - begin) * each)
        taken = {first: (begin, limit // inner, 1)}
        return dataclasses.replace(self, taken=taken, cut=cut)

    def alone(self) -> JaxprEqn:
        """The product of these columns, of variables of its own, to ask what it costs."""
        operands = list(self.product.invars)
        operands[self.side] = self._like(operands[self.side], self.operand)
        (out,) = self.product.outvars
        return self.product.replace(invars=operands, outvars=[self._like(out, self.axes[0])])

    def is_in_order(self) -> bool:
        """Whether the slice lies in memory as the product of its columns does."""
        first, last = ([f for f in flat(a) if self._count(f) > 1] for a in self._ends())
        return first == last

    def is_one_piece(self) -> bool:
        """Whether the slice is one piece of the whole product's memory."""
        first, last = map(flat, self._ends())
        outermost = len(self.taken) == 1 and first[0] in self.taken
        return first == last and outermost and self._range(first[0])[2] == 1

    def emit(self, graph: Graph) -> Atom:
        """What stands for the slice: the chain from a product of its own."""
        graph.place(self.product)
        operands = [read(graph.env, atom) for atom in self.product.invars]
        operands[self.side] = self._part_of(operands[self.side], self.operand, graph)
        value = graph.emit(p.dot_general_p, *operands, **self.product.params)
        for (before, eqn), axes in zip(
            itertools.pairwise(self.chain[:-1]), self.axes[1:], strict=True
        ):
            graph.place(eqn)
            if eqn.primitive is p.transpose_p:
                value = graph.emit(p.transpose_p, value, **eqn.params)
            elif is_view(eqn):
                value = graph.reshape(value, self._shape(axes))
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
            return graph.broadcast(self._part_of(source, small, graph), self._shape(own), places)
        if view is not None and is_view(view) and _only_units(view):
            small = _spread([axis for axis in own if axis], shape_of(source))
            return graph.reshape(self._part_of(source, small, graph), self._shape(own))
        return self._part_of(atom, own, graph)

    def _part_of(self, atom: Atom, axes: Axes, graph: Graph) -> Atom:
        """The part of an array of these axes."""
        if all(f not in self.taken for f in flat(axes)):
            return atom
        if not all(self._is_range(axis) for axis in axes):
            factors = tuple((f,) for f in flat(axes))
            split = graph.reshape(atom, [f.size for f in flat(axes)])
            return graph.reshape(self._part_of(split, factors, graph), self._shape(axes))
        ranges = []
        for axis in axes:
            start, limit, step = self._range(axis[0]) if axis else (0, 1, 1)
            inner = math.prod(f.size for f in axis[1:])
            ranges.append((start * inner, limit * inner, step))
        starts, limits, steps = map(tuple, zip(*ranges, strict=True))
        return graph.emit(
            p.slice_p, atom, start_indices=starts, limit_indices=limits, strides=steps
        )

    def _is_range(self, axis: Axis) -> bool:
        """Whether the part has one range of an axis."""
        if any(f in self.taken for f in axis[1:]):
            return False
        return len(axis) < 2 or self._range(axis[0])[2] == 1

    def _range(self, factor: Factor) -> Range:
        return self.taken.get(factor, (0, factor.size, 1))

    def _count(self, factor: Factor) -> int:
        return len(range(*self._range(factor)))

    def _shape(self, axes: Axes) -> tuple[int, ...]:
        return tuple(math.prod(map(self._count, axis)) for axis in axes)

    def _like(self, atom: Atom, axes: Axes) -> Var:
        return Var(aval(atom).update(shape=self._shape(axes)))

    def _factors(self) -> list[Factor]:
        """The factors of the columns."""
        return [f for d in self._columns() for f in self.operand[d]]

    def _columns(self) -> list[int]:
        return _free(self.product, self.side)

    def _ends(self) -> tuple[Axes, Axes]:
        return self.axes[0], self.axes[-1]


def is_view(eqn: JaxprEqn) -> bool:
    """Whether an equation gives elements other positions and leaves none out."""
    if eqn.primitive is p.reshape_p:
        return eqn.params["dimensions"] is None and eqn.params["sharding"] is None
    return eqn.primitive in (p.transpose_p, p.squeeze_p)


def follow(chain: Sequence[JaxprEqn]) -> Part | None:
    """The part at the end of a chain of a product, views, pointwise equations and a slice.

    None if it is not a range of columns of one operand.
    """
    product, *way, last = chain
    axes = [fresh(shape_of(product.outvars[0]))]
    try:
        for eqn in way:
            axes.append(_result(eqn, axes[-1]))
    except NotFusible:  # reshapes that cut axes differently
        return None
    unsplit = tuple(
        tuple(tuple(atom for f in axis for atom in f.atoms()) for axis in value) for value in axes
    )
    taken = _taken(last, unsplit[-1])
    if not taken:
        return None
    for side in (0, 1):
        operand = _operand(product, side, unsplit[0])
        if taken.keys() <= {f for d in _free(product, side) for f in operand[d]}:
            return Part(tuple(chain), unsplit, side, operand, taken)
    return None


def _result(eqn: JaxprEqn, axes: Axes) -> Axes:
    if eqn.primitive is p.transpose_p:
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if not is_view(eqn):
        return axes
    result = fresh(shape_of(eqn.outvars[0]))
    unify(flat(axes), flat(result), "reshape")
    return result


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


def _free(product: JaxprEqn, side: int) -> list[int]:
    """The axes of an operand that the result has from it alone."""
    contracted, batch = (pair[side] for pair in product.params["dimension_numbers"])
    rank = len(shape_of(product.invars[side]))
    return [d for d in range(rank) if d not in contracted and d not in batch]


def _operand(product: JaxprEqn, side: int, result: Axes) -> Axes:
    """The axes of an operand, from those of the result; contracted ones are its own."""
    operand = list(fresh(shape_of(product.invars[side])))
    batch = product.params["dimension_numbers"][1][side]
    of_left = len(_free(product, 0)) if side else 0
    own = result[len(batch) + of_left :]
    for dimension, axis in zip(batch, result, strict=False):
        operand[dimension] = axis
    for dimension, axis in zip(_free(product, side), own, strict=False):
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
