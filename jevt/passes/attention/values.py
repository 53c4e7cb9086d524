"""The values of equations on random numbers, on named axes.

Axes that run together have one name (``labels.py``), after which views say nothing and the result
does not depend on sizes: equations are evaluated in float64, with a few elements a name, whatever
the sizes and types of the program are.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jax.extend.core import Literal, Primitive, Var

from jevt._jaxpr import Atom
from jevt.lowering.axes import Factor
from jevt.passes._facts import kind
from jevt.passes.attention.labels import Labels
from jevt.passes.attention.operations import REDUCTIONS, VIEWS, Array, NoMatch, pointwise
from jevt.passes.attention.region import Program


@dataclasses.dataclass(frozen=True)
class Named:
    """An array whose axes have names."""

    names: tuple[Factor, ...]
    array: Array

    def along(self, names: Sequence[Factor]) -> Array:
        """The array with these axes, of size 1 where it has not the name."""
        own = [name for name in names if name in self.names]
        array = self.array.transpose([self.names.index(name) for name in own])
        sizes = iter(array.shape)
        return array.reshape([next(sizes) if name in self.names else 1 for name in names])


class Values(abc.ABC):
    """The values of a program's equations.

    Attributes:
      program: whose equations.
      labels: the names of their axes.
      values: those that are known.
    """

    def __init__(self, program: Program, labels: Labels) -> None:
        self.program = program
        self.labels = labels
        self.values: dict[Var, Named] = {}
        self._random = np.random.default_rng(0)
        self._sizes: dict[Factor, int] = {}

    @abc.abstractmethod
    def new_size(self, name: Factor, known: int) -> int:
        """How many elements a name gets, when as many names as ``known`` have got theirs."""

    @abc.abstractmethod
    def given(self, var: Var) -> Named:
        """A value that no equation has made."""

    def size(self, name: Factor) -> int:
        """The number of elements of a name."""
        if name not in self._sizes:
            self._sizes[name] = self.new_size(name, len(self._sizes))
        return self._sizes[name]

    def names(self, atom: Atom) -> tuple[Factor, ...]:
        """The axes of a value in row-major order.

        Raises:
          NoMatch: nothing relates it to the others.
        """
        if isinstance(atom, Var) and atom not in self.labels.axes:
            raise NoMatch("a value that nothing relates to the others")
        return tuple(self.labels.of(atom))

    def draw(self, names: Iterable[Factor]) -> Named:
        """Random numbers along these names.

        Raises:
          NoMatch: a name comes twice.
        """
        names = distinct(names)
        return Named(names, self._random.standard_normal([self.size(name) for name in names]))

    def value(self, atom: Atom) -> Named:
        """A value of the program.

        Raises:
          NoMatch: it has no value at other sizes.
        """
        if isinstance(atom, Literal):
            if np.ndim(atom.val):
                raise NoMatch("an array among the numbers of the program")
            return Named((), np.asarray(atom.val, bool if kind(atom.aval) == "b" else np.float64))
        if atom not in self.values:
            self.values[atom] = self.given(atom)
        return self.values[atom]

    def evaluate(self, position: int) -> None:
        """Computes the result of an equation that is no product.

        Raises:
          NoMatch: it has no value on named axes.
        """
        eqn = self.program.eqns[position]
        (out,) = eqn.outvars
        names = distinct(self.names(out))
        operands = [self.value(atom) for atom in eqn.invars]
        if eqn.primitive in VIEWS:
            array = operands[0].along(names)
        elif eqn.primitive in REDUCTIONS:
            array = self.reduced(eqn.primitive, operands[0], names).along(names)
        else:
            array = pointwise(eqn)(*(operand.along(names) for operand in operands))
        shape = [self.size(name) for name in names]
        self.values[out] = Named(names, np.broadcast_to(array, shape))

    def reduced(self, primitive: Primitive, value: Named, names: Sequence[Factor]) -> Named:
        """A value reduced along all names but these."""
        gone = tuple(i for i, name in enumerate(value.names) if name not in names)
        rest = tuple(name for name in value.names if name in names)
        return Named(rest, REDUCTIONS[primitive](value.array, axis=gone))


def distinct(names: Iterable[Factor]) -> tuple[Factor, ...]:
    """The names, all different; raises :class:`NoMatch` where one comes twice."""
    names = tuple(names)
    if len(set(names)) != len(names):
        raise NoMatch("a diagonal of an array")
    return names
