"""Arrays that are seen in factors of their axes, and parts that are ranges of some of these.

Along reshapes and transpositions, each axis of each value consists of *factors*
(:mod:`jevt.lowering.axes`). What is a range of one of them stays one, whatever axis it is in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from jax.extend.core import JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.lowering.axes import Axes, Axis, Factor, flat, fresh, unify
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph

type Range = tuple[int, int, int]  # start, limit and step


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What a part has of the factors that it does not have whole."""

    taken: Mapping[Factor, Range]

    def of(self, factor: Factor) -> Range:
        return self.taken.get(factor, (0, factor.size, 1))

    def count(self, factor: Factor) -> int:
        """The number of elements that the part has of a factor."""
        return len(range(*self.of(factor)))

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """The shape of the part of an array of these axes."""
        return tuple(math.prod(map(self.count, axis)) for axis in axes)

    def order(self, axes: Axes) -> list[Factor]:
        """The factors of the part of an array, in the order of memory."""
        return [f for f in flat(axes) if self.count(f) > 1]

    def like(self, atom: Atom, axes: Axes) -> Var:
        """A variable of its own for the part of an array, to ask what it costs."""
        return Var(aval(atom).update(shape=self.shape(axes)))

    def part(self, atom: Atom, axes: Axes, graph: Graph) -> Atom:
        """The part of an array of these axes, in slices."""
        if all(f not in self.taken for f in flat(axes)):
            return atom
        if not all(self._is_range(axis) for axis in axes):
            factors = tuple((f,) for f in flat(axes))
            split = graph.reshape(atom, [f.size for f in flat(axes)])
            return graph.reshape(self.part(split, factors, graph), self.shape(axes))
        ranges = []
        for axis in axes:
            start, limit, step = self.of(axis[0]) if axis else (0, 1, 1)
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
        return len(axis) < 2 or self.of(axis[0])[2] == 1


def is_view(eqn: JaxprEqn) -> bool:
    """Whether an equation gives elements other positions and leaves none out."""
    if eqn.primitive is p.reshape_p:
        return eqn.params["dimensions"] is None and eqn.params["sharding"] is None
    return eqn.primitive in (p.transpose_p, p.squeeze_p)


def seen(eqn: JaxprEqn, axes: Axes) -> Axes:
    """The axes of the result of a view or of a pointwise equation.

    Raises:
      NotFusible: a reshape cuts axes differently.
    """
    if eqn.primitive is p.transpose_p:
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if not is_view(eqn):
        return axes
    result = fresh(shape_of(eqn.outvars[0]))
    unify(flat(axes), flat(result), "reshape")
    return result


def unsplit(axes: Axes) -> Axes:
    """The axes in factors that are not split further."""
    return tuple(tuple(atom for f in axis for atom in f.atoms()) for axis in axes)


def free_axes(product: JaxprEqn, side: int) -> list[int]:
    """The axes of an operand that the result has from it alone."""
    contracted, batch = (pair[side] for pair in product.params["dimension_numbers"])
    rank = len(shape_of(product.invars[side]))
    return [d for d in range(rank) if d not in contracted and d not in batch]


def factors_of(axes: Axes, chosen: Iterable[int]) -> list[Factor]:
    """The factors of some axes."""
    return [f for d in chosen for f in axes[d]]
