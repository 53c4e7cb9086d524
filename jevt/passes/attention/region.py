"""Which equations may be one attention: all that lies between products around a softmax.

Seen from the exponential of a softmax, with D a product (``dot_general``):

    scores = D(q, k) ─▶ … exp … ─▶ D(·, v) = out                     forward
                          │
                          ├──▶ D(·, d_out) = d_v                     backward
    D(d_out, v) ──────────┴──▶ … ─▶ D(·, k) = d_q, D(·, q) = d_k

A value is *derived* if it is computed from the scores without another product. The region holds the
equations that compute derived values, the products that read them, and those that lead from the
gradient's product ``D(d_out, v)`` to them. It can be replaced as a whole, if nobody else reads a
derived value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes.attention.operations import VIEWS, is_known

#: More equations than any spelling of forward and backward has.
MAX_EQUATIONS = 400


_KEEPS_NUMBERS = frozenset({p.convert_element_type_p, internals.pvary_p})


class Program:
    """A jaxpr with who makes and who reads each variable."""

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.jaxpr = jaxpr
        self.eqns = jaxpr.eqns
        self.maker = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
        self.readers: dict[Var, list[int]] = {}
        for position, eqn in enumerate(jaxpr.eqns):
            for var in dict.fromkeys(a for a in eqn.invars if isinstance(a, Var)):
                self.readers.setdefault(var, []).append(position)
        self.outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}

    def definition(self, atom: Atom) -> JaxprEqn | None:
        """The equation that computes an atom; None for inputs and literals."""
        position = self.maker.get(atom) if isinstance(atom, Var) else None
        return None if position is None else self.eqns[position]


@dataclasses.dataclass(frozen=True)
class Region:
    """Equations that may be one attention, by position.

    Attributes:
      program: whose equations they are.
      exp, total: the softmax's exponential and its sum.
      score: the product that gives the scores.
      inner: everything but products, ascending.
      products: products that read a derived value, ascending.
      gradients: products that lead to derived values besides ``score``: of d_out and v.
      derived: values computed from the scores.
      obstacles: why it cannot be replaced.
    """

    program: Program
    exp: int
    total: int
    score: int
    inner: tuple[int, ...]
    products: tuple[int, ...]
    gradients: tuple[int, ...]
    derived: frozenset[Var]
    obstacles: tuple[str, ...]

    def positions(self) -> list[int]:
        """All equations, ascending."""
        return sorted({self.score, *self.inner, *self.products, *self.gradients})

    def leaves(self) -> Iterator[Var]:
        """What is read from outside, products aside."""
        made = {v for i in self.positions() for v in self.program.eqns[i].outvars}
        read = (a for i in self.inner for a in self.program.eqns[i].invars)
        yield from dict.fromkeys(a for a in read if isinstance(a, Var) and a not in made)


def find(program: Program, exp: int) -> Iterator[Region]:
    """The regions around an exponential, one for each product that may give its scores."""
    operand = program.eqns[exp].invars[0]
    full = _size(operand)
    total = _total(program, exp)
    if total is None or full == 0:
        return
    rows = _size(program.eqns[total].outvars[0])
    if rows == full:
        return
    for score in _products_behind(program, operand, full):
        yield _Search(program, full, rows).region(exp, total, score)


def root(program: Program, atom: Atom) -> Atom:
    """What an operand of a product is a view of, or an exact cast from 16 bits."""
    while (eqn := program.definition(atom)) is not None and (is_renaming(eqn) or is_upcast(eqn)):
        atom = eqn.invars[0]
    return atom


def is_renaming(eqn: JaxprEqn) -> bool:
    """Whether the equation only gives its operand's elements other positions."""
    if eqn.primitive is p.reshape_p:
        return eqn.params["dimensions"] is None and eqn.params["sharding"] is None
    return eqn.primitive in (p.transpose_p, p.squeeze_p)


def is_upcast(eqn: JaxprEqn) -> bool:
    """Whether the equation casts a 16-bit floating-point type to a wider one."""
    if eqn.primitive is not p.convert_element_type_p:
        return False
    old, new = (_dtype(a) for a in (eqn.invars[0], eqn.outvars[0]))
    return old.name in ("bfloat16", "float16") and new.name in ("float32", "float64")


def _total(program: Program, exp: int) -> int | None:
    """The sum of an exponential over some axes, cast or seen differently before it."""
    stack = [program.eqns[exp].outvars[0]]
    while stack:
        for position in program.readers.get(stack.pop(), ()):
            eqn = program.eqns[position]
            if eqn.primitive is p.reduce_sum_p:
                return position
            if eqn.primitive is p.convert_element_type_p or is_renaming(eqn):
                stack.append(eqn.outvars[0])
    return None


def _products_behind(program: Program, atom: Atom, full: int) -> list[int]:
    """Products of the full size from which ``atom`` is computed without another product."""
    found: dict[int, None] = {}
    seen: set[Var] = set()
    stack = [atom]
    while stack and len(seen) < MAX_EQUATIONS:
        atom = stack.pop()
        if not isinstance(atom, Var) or atom in seen or _size(atom) != full:
            continue
        seen.add(atom)
        eqn = program.definition(atom)
        if eqn is None:
            continue
        if eqn.primitive is p.dot_general_p:
            found[program.maker[atom]] = None
        elif is_known(eqn):
            stack.extend(eqn.invars)
    return list(found)


class _Search:
    """The search for one region."""

    def __init__(self, program: Program, full: int, rows: int) -> None:
        self.program = program
        self.full = full
        self.rows = rows
        self.inner: set[int] = set()
        self.products: set[int] = set()
        self.gradients: set[int] = set()
        self.derived: set[Var] = set()
        self.obstacles: dict[str, None] = {}
        self._reaching: dict[Var, bool] = {}

    def region(self, exp: int, total: int, score: int) -> Region:
        self._derive(self.program.eqns[score].outvars[0])
        done: set[Var] = set()
        for position in sorted(self.inner):
            self._include(self.program.eqns[position].invars, done)
        return Region(
            self.program,
            exp,
            total,
            score,
            tuple(sorted(self.inner)),
            tuple(sorted(self.products)),
            tuple(sorted(self.gradients)),
            frozenset(self.derived),
            tuple(self.obstacles),
        )

    def _derive(self, scores: Var) -> None:
        """Follows what is computed from the scores."""
        self.derived.add(scores)
        stack = [scores]
        while stack:
            var = stack.pop()
            if var in self.program.outputs:
                self.obstacles[f"{_words(var)} computed from the scores are a result"] = None
            for position in self.program.readers.get(var, ()):
                eqn = self.program.eqns[position]
                if eqn.primitive is p.dot_general_p:
                    self.products.add(position)
                    continue
                if not is_known(eqn) or len(self.inner) > MAX_EQUATIONS:
                    name = eqn.primitive.name
                    self.obstacles[f"{name} reads {_words(var)} computed from the scores"] = None
                    continue
                if _size(eqn.outvars[0]) not in (self.full, self.rows):
                    words = f"{_words(var)} computed from the scores"
                    self.obstacles[f"{eqn.primitive.name} sums up {words}"] = None
                    continue
                if position not in self.inner:
                    self.inner.add(position)
                    self.derived.add(eqn.outvars[0])
                    stack.append(eqn.outvars[0])

    def _is_seen_through(self, eqn: JaxprEqn) -> bool:
        """Whether a leaf is better seen behind the equation: a view, a cast, a part of a mask."""
        if not is_known(eqn):
            return False
        if number(self.program, eqn.outvars[0]) is not None:
            return True
        if eqn.primitive in (p.and_p, p.or_p, p.not_p):
            return _dtype(eqn.outvars[0]) == np.dtype(bool)
        if eqn.primitive is p.select_n_p:
            return all(number(self.program, case) is not None for case in eqn.invars[1:])
        return eqn.primitive in (*VIEWS, internals.pvary_p) or (
            eqn.primitive is p.convert_element_type_p
            and (is_upcast(eqn) or self._is_choice(eqn.invars[0]))
        )

    def _is_choice(self, atom: Atom) -> bool:
        eqn = self.program.definition(atom)
        return eqn is not None and self._is_seen_through(eqn) and eqn.primitive is p.select_n_p

    def _include(self, atoms: Iterable[Atom], done: set[Var]) -> None:
        """Adds what leads from a product of the gradient, and views of leaves."""
        stack = [a for a in atoms if isinstance(a, Var)]
        while stack:
            var = stack.pop()
            eqn = self.program.definition(var)
            if var in self.derived or var in done or eqn is None:
                continue
            done.add(var)
            position = self.program.maker[var]
            if self._reaches(var):
                if eqn.primitive is p.dot_general_p:
                    self.gradients.add(position)
                    continue
            elif not self._is_seen_through(eqn):
                continue
            self.inner.add(position)
            stack.extend(a for a in eqn.invars if isinstance(a, Var))

    def _reaches(self, var: Var) -> bool:
        """Whether a value of the full size is computed from a product of that size."""
        if var not in self._reaching:
            self._reaching[var] = False
            eqn = self.program.definition(var)
            if eqn is not None and _size(var) == self.full and len(self._reaching) < MAX_EQUATIONS:
                self._reaching[var] = eqn.primitive is p.dot_general_p or (
                    is_known(eqn)
                    and any(self._reaches(a) for a in eqn.invars if isinstance(a, Var))
                )
        return self._reaching[var]


def _size(atom: Atom) -> int:
    return math.prod(shape_of(atom))


def _dtype(atom: Atom) -> np.dtype[Any]:
    aval: Any = atom.aval
    return np.dtype(aval.dtype)


def _words(atom: Atom) -> str:
    return f"values {atom.aval.str_short(short_dtypes=True)}"


def number(program: Program, atom: Atom) -> float | None:
    """The number that every element of ``atom`` is, None if that is not known."""
    while not isinstance(atom, Literal):
        eqn = program.definition(atom)
        if eqn is None or not eqn.invars:
            return None
        if eqn.primitive not in VIEWS and eqn.primitive not in _KEEPS_NUMBERS:
            return None
        atom = eqn.invars[0]
    return float(atom.val) if np.ndim(atom.val) == 0 else None
