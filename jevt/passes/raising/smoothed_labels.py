"""Smoothed labels: arrays of two numbers, one where a mask is true and one elsewhere.

``0.9·one_hot + 0.1/n`` is ``select(hot, 0.1/n, 0.9 + 0.1/n)``, the same bits. A choice is made
again from the mask wherever it or a multiple is needed, as by a gradient; as arithmetic an array of
a row's length would be kept from the loss to its gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.extend.core import Primitive, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph
from jevt.passes.attention.region import Program, number
from jevt.passes.raising.write import number as literal

#: Equations between a mask and the labels.
_DEPTH = 6

_ARITHMETIC: Mapping[Primitive, Callable[[Any, Any], Any]] = {
    p.add_p: np.add,
    p.sub_p: np.subtract,
    p.mul_p: np.multiply,
    p.div_p: np.divide,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """An array of two numbers.

    Attributes:
      mask: a boolean of the array's shape.
      off, on: the numbers where it is false and true, of the array's type.
    """

    mask: Atom
    off: Any
    on: Any

    def write(self, like: Atom, graph: Graph) -> Atom:
        """The array as a choice; ``like`` it are its type and the mesh axes it varies over."""
        shape = shape_of(self.mask)
        cases = [
            graph.broadcast(literal(value, like, graph), shape, ()) for value in (self.off, self.on)
        ]
        return graph.emit(p.select_n_p, read(graph.env, self.mask), *cases)


def find(program: Program, atom: Atom, depth: int = _DEPTH) -> Choice | None:
    """The choice that an array is; None if it is not known to be one."""
    eqn = program.definition(atom)
    aval: Any = atom.aval
    if eqn is None or depth == 0 or kind(aval) != "f" or aval.dtype.itemsize < 4:
        return None
    if eqn.primitive is p.convert_element_type_p:
        (source,) = eqn.invars
        if kind(source.aval) == "b":
            return Choice(source, aval.dtype.type(0), aval.dtype.type(1))
        return None
    operation = _ARITHMETIC.get(eqn.primitive)
    if operation is None or eqn.params.get("out_dtype") is not None:
        return None
    for position, part in enumerate(eqn.invars):
        value = number(program, eqn.invars[1 - position])
        inner = None if value is None else find(program, part, depth - 1)
        if inner is None or value is None or shape_of(part) != shape_of(atom):
            continue
        with np.errstate(all="ignore"):
            ends = [
                operation(*((end, aval.dtype.type(value))[:: 1 if position == 0 else -1]))
                for end in (inner.off, inner.on)
            ]
        return Choice(inner.mask, *ends)
    return None


def multiples(program: Program, labels: Atom) -> Iterator[tuple[int, Choice]]:
    """The multiples of a choice that the program makes, with the positions of their equations."""
    readers = program.readers.get(labels, ()) if isinstance(labels, Var) else ()
    for position in readers:
        choice = find(program, program.eqns[position].outvars[0])
        if choice is not None:
            yield position, choice
