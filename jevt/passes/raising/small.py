"""The values of equations at small sizes, on named axes.

Numbers of the program may depend on the true sizes: a mean is a sum times a literal. So a sum
counts each of the few elements of a name as often as the true axis is longer: what is evaluated is
the program at its true size on an array that repeats itself, and 1/n means what it meant.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Primitive, Var
from jax.extend.core import primitives as p

from jevt.lowering.axes import Factor, flat, unify
from jevt.lowering.errors import NotFusible
from jevt.passes._facts import kind
from jevt.passes.attention.labels import Labels, atoms, name_result
from jevt.passes.attention.operations import Array, NoMatch
from jevt.passes.attention.region import Program
from jevt.passes.attention.values import Named, Values

#: Literals are rounded to float32.
TOLERANCE = 2e-6


class Evaluation(Values):
    """The values of equations on random numbers; what is read and not made gets some, too.

    Args:
      program: whose equations.
      positions: which, ascending.
      alike: values of one shape that are added up, so that their axes are the same.

    Raises:
      NoMatch: they cannot be evaluated on named axes.
    """

    def __init__(
        self, program: Program, positions: Iterable[int], alike: Sequence[Var] = ()
    ) -> None:
        super().__init__(program, Labels({}, {}))
        self.positions = tuple(positions)
        try:
            for position in self.positions:
                name_result(program.eqns[position], self.labels)
            for var in alike:
                self.names(var)
            for first, other in itertools.pairwise(alike):
                unify(flat(self.labels.axes[first]), flat(self.labels.axes[other]), "sum")
        except NotFusible as error:
            raise NoMatch(str(error)) from None

    def run(self) -> None:
        """Computes every value."""
        with np.errstate(all="ignore"):
            for position in self.positions:
                self.evaluate(position)

    def made(self) -> set[Var]:
        """The values that the equations make; the others are given."""
        return {v for i in self.positions for v in self.program.eqns[i].outvars}

    def axes(self, var: Var) -> list[list[Factor]]:
        """The names of each dimension of a value."""
        self.names(var)
        return [atoms((axis,)) for axis in self.labels.axes[var]]

    def count(self, names: Iterable[Factor]) -> float:
        """The number of true elements along some axes."""
        return float(np.prod([float(name.size) for name in names]))

    def sum(self, value: Named, over: Iterable[Factor]) -> Named:
        """The sum that the program at its true size has."""
        gone = [name for name in value.names if name in set(over)]
        places = tuple(value.names.index(name) for name in gone)
        weight = self.count(gone) / float(np.prod([self.size(name) for name in gone]))
        rest = tuple(name for name in value.names if name not in gone)
        return Named(rest, weight * value.array.sum(places))

    def new_size(self, name: Factor, known: int) -> int:
        """Four and five by turns, so that axes that are taken for one another are noticed.

        Two elements would not do: normalised, they are always -1 and 1.
        """
        return min(name.size, (4 if known < 4 else 2) + known % 2)

    def given(self, var: Var) -> Named:
        names = self.names(var)
        if kind(var.aval) not in ("f", "b"):
            raise NoMatch(f"{var.aval.str_short()} among the values")
        array = self.draw(names).array + 0.25
        return Named(names, array < 0.5 if kind(var.aval) == "b" else array)

    def reduced(self, primitive: Primitive, value: Named, names: Sequence[Factor]) -> Named:
        if primitive is p.reduce_sum_p:
            return self.sum(value, [name for name in value.names if name not in names])
        return super().reduced(primitive, value, names)


def times(*factors: Named) -> Named:
    """The product, over all names of the first that has most."""
    names = tuple(dict.fromkeys(name for factor in factors for name in factor.names))
    array: Any = 1.0
    for factor in factors:
        array = array * factor.along(names)
    return Named(names, np.asarray(array))


def same(got: Named, want: Named, tolerance: float = TOLERANCE) -> bool:
    """Whether two values agree, each along the same names."""
    if set(got.names) != set(want.names):
        return False
    expected = want.along(got.names)
    error = np.abs(got.array - expected).max(initial=0.0)
    return bool(error <= tolerance * np.abs(expected).max(initial=0.0))


def ratio(got: Named, of: Named) -> float | None:
    """The number c of ``got = c·of``, None if there is none.

    Any two numbers have one. So of a single row it has to be a count of elements, or 1 by one, as
    between a sum and its mean.
    """
    if set(got.names) != set(of.names) or got.array.dtype == bool:
        return None
    base: Array = of.along(got.names)
    norm = float((base * base).sum())
    if norm == 0.0:
        return None
    c = float((got.array * base).sum()) / norm
    close = np.abs(got.array - c * base).max(initial=0.0) <= TOLERANCE * np.abs(c * base).max()
    if not c or not close or (base.size == 1 and not (_is_whole(c) or _is_whole(1 / c))):
        return None
    return c


def _is_whole(value: float) -> bool:
    return value >= 0.5 and abs(value - round(value)) <= 1e-9 * value


def dimensions(names: Sequence[Factor], axes: Sequence[Sequence[Factor]]) -> list[int] | None:
    """The dimensions whose names these are, in order; None if they are not whole ones in order."""
    rest, found = list(names), []
    for position, axis in enumerate(axes):
        if axis and rest[: len(axis)] == list(axis):
            del rest[: len(axis)]
            found.append(position)
    return None if rest else found
