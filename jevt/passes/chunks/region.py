"""The equations around the logits that can run on some rows at a time.

From the product that gives the logits, whatever reads a value of their size is inside, and so on
until all that leaves has a few numbers a row (the loss, the gradient of the hidden states, a
prediction) or is a sum over all rows (the gradients of weights and bias). What is between two
equations that are inside is inside too. Values of that size that do not depend on the logits, such
as masks of the target, are made inside again rather than read.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterator, Mapping

from jax.extend import source_info_util
from jax.extend.core import DropVar, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes.attention.region import Program
from jevt.passes.chunks.rows import (
    ELEMENTWISE,
    RULES,
    Span,
    Unfit,
    closes,
    closing_operand,
    extent,
    is_row_by_row,
    trimmed,
)


class Obstacle(Exception):
    """Why the logits have to be there as a whole."""


class Waiting(Obstacle):
    """The gradient needs a value that depends on the logits of other rows.

    Attributes:
      value: it.
    """

    def __init__(self, value: Var, why: str) -> None:
        super().__init__(f"what they are computed into waits for {why}")
        self.value = value


class Repeating(Obstacle):
    """A value repeats within the rows, as one number a sequence does for its tokens.

    Attributes:
      position: of the equation that reads it.
      index: which of the operands it is.
      span: where the rows are in the results.
    """

    def __init__(self, eqn: JaxprEqn, position: int, index: int, span: Span) -> None:
        super().__init__(f"{eqn.primitive.name} repeats values within the rows")
        self.position = position
        self.index = index
        self.span = span


@dataclasses.dataclass(frozen=True)
class Head:
    """A product whose result is normalised by a softmax.

    Attributes:
      program: whose equation it is.
      product: its position.
      span: where the rows are in its result.
    """

    program: Program
    product: int
    span: Span

    @property
    def eqn(self) -> JaxprEqn:
        return self.program.eqns[self.product]

    @property
    def logits(self) -> Var:
        return self.eqn.outvars[0]

    @property
    def rows(self) -> int:
        return extent(shape_of(self.logits), self.span)


@dataclasses.dataclass(frozen=True)
class Region:
    """What runs on some rows at a time.

    Attributes:
      head: whose logits they are.
      inside: positions of the equations, ascending.
      copied: those of them that depend on no logits, and may have readers outside.
      sums: those of them that sum over all rows.
      spans: where the rows are in the operands of the equation at a position.
      results: where they are in its results, but for sums.
      rowed: values with rows that others read.
    """

    head: Head
    inside: tuple[int, ...]
    copied: frozenset[int]
    sums: tuple[int, ...]
    spans: Mapping[int, tuple[Span | None, ...]]
    results: Mapping[int, Span]
    rowed: tuple[Var, ...]

    @property
    def program(self) -> Program:
        return self.head.program

    def leaves(self) -> Iterator[tuple[Var, Span | None]]:
        """What is read from outside, each once: with rows, or as a whole."""
        made = {v for at in self.inside for v in self.program.eqns[at].outvars}
        yield from dict.fromkeys(
            (atom, span)
            for at in self.inside
            for atom, span in zip(self.program.eqns[at].invars, self.spans[at], strict=True)
            if isinstance(atom, Var) and atom not in made
        )

    def stored(self) -> list[Var]:
        """Values of the logits' size that products write or read: they pass through memory."""
        made = {v for at in self.results for v in self.program.eqns[at].outvars}
        products = (self.program.eqns[at] for at in self.inside)
        atoms = (
            atom
            for eqn in products
            if eqn.primitive is p.dot_general_p
            for atom in (*eqn.outvars, *eqn.invars)
        )
        large = (a for a in atoms if isinstance(a, Var) and a in made and is_large(a, self.head))
        return list(dict.fromkeys(large))


def can_repeat(head: Head, obstacle: Repeating) -> bool:
    """Whether a value may be repeated for each row of its own: it is not as large as the logits."""
    eqn = head.program.eqns[obstacle.position]
    if eqn.primitive is not p.broadcast_in_dim_p and eqn.primitive not in ELEMENTWISE:
        return False
    shape = shape_of(eqn.outvars[0])
    rows, atom = extent(shape, obstacle.span), eqn.invars[obstacle.index]
    return 2 * rows * size(atom) < size(head.logits)


def size(atom: Atom) -> int:
    """The number of elements."""
    return math.prod(shape_of(atom))


def is_large(atom: Atom, head: Head) -> bool:
    """Whether a value is about as large as the logits; padding of the vocabulary may be cut off."""
    return 2 * size(atom) >= size(head.logits)


def heads_of(program: Program, statistics: int) -> Iterator[Head]:
    """The products that give what a softmax normalises, of each those with most rows first.

    There are several of one product, with fewer of its axes as rows: under ``vmap``, axes of the
    batch are not summed over.

    Args:
      program: whose equations they are.
      statistics: position of the statistics of a softmax.
    """
    eqn = program.eqns[statistics]
    (x,), axes = eqn.invars, eqn.params["axes"]
    path: dict[Atom, Atom | None] = {x: None}  # to the one of its readers that is nearer to x
    stack = [x]
    while stack:
        atom = stack.pop()
        maker = program.definition(atom)
        if maker is None or maker.primitive not in RULES or 2 * size(atom) < size(x):
            continue
        if maker.primitive is p.dot_general_p:
            (logits,) = maker.outvars
            starts = list(_starts(maker))
            ends = [_followed(program, logits, start, path) for start in starts]
            for start, end in zip(starts, ends, strict=True):
                # Where they get lost on the way, the search finds out why.
                if end is None or not set(range(*end)) & set(axes):
                    yield Head(program, program.maker[logits], start)
            continue
        for operand in maker.invars:
            if isinstance(operand, Var) and operand not in path:
                path[operand] = atom
                stack.append(operand)


def _starts(eqn: JaxprEqn) -> Iterator[Span]:
    """Where the rows may be in a product: they are those of an operand that is not as large."""
    out = shape_of(eqn.outvars[0])
    contracted, batch = eqn.params["dimension_numbers"]
    first = len(batch[0])
    for side, atom in enumerate(eqn.invars):
        end = first + len(shape_of(atom)) - len(contracted[side]) - len(batch[side])
        spans = (trimmed(out, start, end) for start in range(first, end))
        if 2 * size(atom) < size(eqn.outvars[0]):
            yield from dict.fromkeys(span for span in spans if span is not None)
        first = end


def _followed(
    program: Program, atom: Atom, start: Span, path: Mapping[Atom, Atom | None]
) -> Span | None:
    """Where the rows are at the end of a path."""
    span: Span | None = start
    while span is not None and (reader := path[atom]) is not None:
        eqn = program.definition(reader)
        assert eqn is not None
        index = next(i for i, a in enumerate(eqn.invars) if a is atom)
        span = RULES[eqn.primitive].result(eqn, index, span)
        if span is not None and not is_row_by_row(eqn, span):
            return None
        atom = reader
    return span


def find(head: Head) -> Region | None:
    """The region around a head; None if the softmax is an attention's.

    Then what is multiplied with its probabilities leads, through the rest of the network, to their
    gradient.

    Raises:
      Obstacle: the logits have to be there as a whole.
    """
    region = _Search(head).region()
    inner = {a for at in region.inside for a in head.program.eqns[at].invars if isinstance(a, Var)}
    products = (at for at in region.results if at != head.product and at not in region.copied)
    eqns = (head.program.eqns[at] for at in products)
    if any(eqn.primitive is p.dot_general_p and eqn.outvars[0] in inner for eqn in eqns):
        return None
    return region


class _Search:
    """The search for one region."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.program = head.program
        # What depends on the logits: where its rows are, or which equation does not go by rows.
        self.derived: dict[Var, Span | str] = {head.logits: head.span}
        self.spans: dict[int, tuple[Span | None, ...]] = {}
        self.results: dict[int, Span] = {}
        self.sums: list[int] = []
        self.copied: set[int] = set()

    def region(self) -> Region:
        for position in range(self.head.product + 1, len(self.program.eqns)):
            self._derive(self.program.eqns[position])
        self._include(self.head.product)
        self._copy()
        return Region(
            self.head,
            tuple(sorted(self.spans)),
            frozenset(self.copied),
            tuple(sorted(self.sums)),
            self.spans,
            self.results,
            tuple(self._rowed()),
        )

    def _derive(self, eqn: JaxprEqn) -> None:
        """Tells where the rows are in what an equation computes from the logits."""
        known = {
            index: self.derived[atom]
            for index, atom in enumerate(eqn.invars)
            if isinstance(atom, Var) and atom in self.derived
        }
        if not known:
            return
        state = next((s for s in known.values() if isinstance(s, str)), None)
        self.derived.update(dict.fromkeys(eqn.outvars, state or self._result(eqn, known)))

    def _result(self, eqn: JaxprEqn, known: Mapping[int, Span | str]) -> Span | str:
        rule = RULES.get(eqn.primitive)
        if rule is not None and not eqn.effects:
            spans = {rule.result(eqn, i, s) for i, s in known.items() if not isinstance(s, str)}
            (span, *others) = spans
            if span is not None and not others and is_row_by_row(eqn, span):
                return span
        place = source_info_util.summarize(eqn.source_info) or "a line of no file"
        return f"{eqn.primitive.name} at {place}"

    def _include(self, position: int) -> None:
        """Takes in an equation, and what then has to be inside."""
        stack = [position]
        while stack:
            position = stack.pop()
            if position in self.spans:
                continue
            eqn = self.program.eqns[position]
            self._place(position)
            derived = (a for a in eqn.invars if isinstance(a, Var) and a in self.derived)
            stack.extend(self.program.maker[atom] for atom in derived)
            is_gradient = eqn.primitive is p.dot_general_p and position != self.head.product
            for var in eqn.outvars:
                if position in self.sums or is_gradient or not is_large(var, self.head):
                    continue
                if var in self.program.outputs:
                    raise Obstacle("values computed of them, as large, are a result")
                stack.extend(self.program.readers.get(var, ()))

    def _place(self, position: int) -> None:
        """Notes where the rows are around an equation that is to be inside."""
        eqn = self.program.eqns[position]
        for atom in eqn.invars:
            state = self.derived.get(atom) if isinstance(atom, Var) else None
            if isinstance(state, str) and isinstance(atom, Var):
                raise Waiting(atom, state)
        span = self.derived[eqn.outvars[0]]
        if isinstance(span, str):
            spans = tuple(self._closing(eqn, index) for index in range(len(eqn.invars)))
            if not closes(eqn, spans):
                raise Obstacle(f"{span} reads them, or values as large, and not row by row")
            self.sums.append(position)
            self.spans[position] = spans
            return
        spans = self._operands(position, span)
        for atom, wanted in zip(eqn.invars, spans, strict=True):
            if isinstance(atom, Var) and self.derived.get(atom, wanted) != wanted:
                raise Obstacle(f"{eqn.primitive.name} combines different rows of them")
        self.spans[position] = spans
        self.results[position] = span

    def _operands(self, position: int, span: Span) -> tuple[Span | None, ...]:
        eqn = self.program.eqns[position]
        rule, found = RULES[eqn.primitive], []
        for index, atom in enumerate(eqn.invars):
            try:
                is_number = isinstance(atom, Literal)
                found.append(None if is_number else rule.operand(eqn, index, span))
            except Unfit:
                raise Repeating(eqn, position, index, span) from None
        return tuple(found)

    def _closing(self, eqn: JaxprEqn, index: int) -> Span | None:
        """Where the rows are in an operand of an equation that may sum over all of them."""
        for other, atom in enumerate(eqn.invars):
            span = self.derived.get(atom) if isinstance(atom, Var) else None
            if span is not None and not isinstance(span, str):
                return closing_operand(eqn, other, span, index)
        return None

    def _copy(self) -> None:
        """Takes in what is as large as the logits, is read inside, and can be made there again."""
        wanted: dict[Var, Span] = {}
        heap: list[int] = []

        def want(position: int) -> None:
            eqn = self.program.eqns[position]
            for atom, span in zip(eqn.invars, self.spans[position], strict=True):
                if not isinstance(atom, Var) or span is None or atom in self.derived:
                    continue
                if wanted.setdefault(atom, span) != span:
                    raise Obstacle(f"{eqn.primitive.name} combines different rows of a value")
                if atom in self.program.maker:
                    heapq.heappush(heap, -self.program.maker[atom])

        for position in list(self.spans):
            want(position)
        # From the last to the first: the readers of a value come before the value.
        while heap:
            position = -heapq.heappop(heap)
            eqn = self.program.eqns[position]
            if position in self.spans or not self._can_be_copied(eqn):
                continue
            span, *others = {wanted[v] for v in eqn.outvars if v in wanted}
            if others or not is_row_by_row(eqn, span):
                continue
            try:
                self.spans[position] = self._operands(position, span)
            except Repeating as obstacle:
                if is_large(eqn.outvars[0], self.head) and can_repeat(self.head, obstacle):
                    raise
                continue
            self.results[position] = span
            self.copied.add(position)
            want(position)

    def _can_be_copied(self, eqn: JaxprEqn) -> bool:
        if eqn.primitive not in RULES or eqn.effects:
            return False
        if eqn.outvars[0] not in self._follows_large:
            return False
        # What is dear, or small enough to be read, only if it is not made outside any more.
        is_cheap = eqn.primitive is not p.dot_general_p and is_large(eqn.outvars[0], self.head)
        return is_cheap or not any(
            var in self.program.outputs
            or any(reader not in self.spans for reader in self.program.readers.get(var, ()))
            for var in eqn.outvars
        )

    @functools.cached_property
    def _follows_large(self) -> set[Var]:
        """Values as large as the logits, and what else is computed of them but products."""
        found: set[Var] = set()
        for eqn in self.program.eqns:
            large = any(is_large(var, self.head) for var in eqn.outvars)
            follows = any(
                is_large(atom, self.head) or atom in found
                for atom in eqn.invars
                if isinstance(atom, Var)
            )
            if large or (follows and eqn.primitive is not p.dot_general_p):
                found.update(eqn.outvars)
        return found

    def _rowed(self) -> Iterator[Var]:
        for position in sorted(self.results):
            if position in self.copied:
                continue
            for var in self.program.eqns[position].outvars:
                readers = self.program.readers.get(var, ())
                used = var in self.program.outputs or any(r not in self.spans for r in readers)
                if used and not isinstance(var, DropVar):
                    yield var
