"""Where a gradient ends: its terms, and the sum in which they meet.

Differentiation leaves the gradient of what is normalised as a sum of terms: one that follows the
cotangent, and one or two that repeat a sum of the row. They meet in a chain of additions, together
with gradients that come by other ways (a residual connection's), in whatever order.

    mixed sums ─▶ arithmetic on rows ─▶ repeated to the full size ─▶ ×, +, - ─▶ root
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jax.extend.core import JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import is_float
from jevt.passes.attention.operations import VIEWS, is_known
from jevt.passes.attention.region import Program, number
from jevt.passes.raising.cones import Kind, Origins, size

_ADDITIONS = frozenset({p.add_p, p.add_jaxvals_p, p.sub_p})
_SCALINGS = frozenset({p.mul_p, p.div_p})
_PASSING = frozenset({*VIEWS, p.neg_p, p.convert_element_type_p})

#: Values that are looked at when something is followed to its readers.
_MANY = 200


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum of which some terms belong to the gradient.

    Attributes:
      root: the value.
      terms: those of the gradient, each with 1 or -1.
      others: the other terms.
      positions: the equations that add them up.
    """

    root: Var
    terms: tuple[tuple[int, Var], ...]
    others: tuple[tuple[int, Var], ...]
    positions: frozenset[int]


def find(program: Program, origins: Origins, statistics: list[Var]) -> Iterator[Sum]:
    """The sums in which a gradient of the source may end.

    Args:
      program: whose.
      origins: of the source.
      statistics: of the source.
    """
    roots: dict[Var, set[Var]] = {}
    for start in _repeated(program, origins, statistics):
        chain = _climb(program, origins, start)
        if chain:
            roots.setdefault(chain[-1], set()).update(chain)
    # A term that a sum has twice ends a chain of its own.
    twice = {root for root in roots if _is_only_added(program, root)}
    for root, chain_values in roots.items():
        found = _flatten(program, origins, root, chain_values | twice)
        if found is not None:
            yield found


def _is_only_added(program: Program, var: Var) -> bool:
    readers = program.readers.get(var, ())
    return len(readers) > 1 and all(program.eqns[r].primitive in _ADDITIONS for r in readers)


def _repeated(program: Program, origins: Origins, statistics: list[Var]) -> Iterator[Var]:
    """Values of the full size that repeat a row's value of the backward pass."""
    mixed = dict.fromkeys(_mixed(program, origins, statistics))
    stack = list(mixed)
    while stack and len(mixed) < _MANY:
        for position in program.readers.get(stack.pop(), ()):
            eqn = program.eqns[position]
            if not is_known(eqn):
                continue
            (out,) = eqn.outvars
            if size(out) >= origins.full:
                yield out
            elif out not in mixed:
                mixed[out] = None
                stack.append(out)


def _mixed(program: Program, origins: Origins, statistics: list[Var]) -> Iterator[Var]:
    """Values a row that depend on the normalised rows and on something else."""
    derived = dict.fromkeys((origins.source, *statistics))
    stack = list(derived)
    while stack and len(derived) < _MANY:
        for position in program.readers.get(stack.pop(), ()):
            eqn = program.eqns[position]
            if not is_known(eqn):
                continue
            (out,) = eqn.outvars
            kind = origins.kind(out)
            if kind is Kind.OTHER and size(out) >= origins.full:
                yield from _summed(program, out)
            elif kind is Kind.OTHER:
                yield out
            elif kind is not Kind.FREE and out not in derived:
                derived[out] = None
                stack.append(out)


def _summed(program: Program, var: Var) -> Iterator[Var]:
    """Sums of a value, perhaps times something."""
    stack = [(var, 0)]
    while stack:
        var, depth = stack.pop()
        for position in program.readers.get(var, ()):
            eqn = program.eqns[position]
            if not is_known(eqn):
                continue
            (out,) = eqn.outvars
            if eqn.primitive is p.reduce_sum_p:
                yield out
            elif depth < 3 and size(out) == size(var):
                stack.append((out, depth + 1))


def _climb(program: Program, origins: Origins, start: Var) -> list[Var]:
    """From a term to the last addition, or scaling by a statistic, that can be its gradient's."""
    chain, end = [start], 0
    eqn = program.definition(start)
    if eqn is not None and eqn.primitive in (*_ADDITIONS, *_SCALINGS):
        end = 1
    var = start
    while var not in program.outputs:
        readers = program.readers.get(var, ())
        if len(readers) != 1:
            break
        eqn = program.eqns[readers[0]]
        if not _is_linear(program, eqn, origins, var) or size(eqn.outvars[0]) != size(var):
            break
        (var,) = eqn.outvars
        chain.append(var)
        if eqn.primitive in _ADDITIONS or (
            eqn.primitive in _SCALINGS and _scales_by_statistic(eqn, origins)
        ):
            end = len(chain)
    return chain[:end]


def _is_linear(program: Program, eqn: JaxprEqn, origins: Origins, var: Var) -> bool:
    if not is_known(eqn) or not is_float(eqn.outvars[0].aval):
        return False
    if eqn.primitive in _ADDITIONS or eqn.primitive in _PASSING:
        return True
    if eqn.primitive is p.select_n_p and eqn.invars[0] in origins.masks:
        return all(a is var or number(program, a) == 0.0 for a in eqn.invars[1:])
    if eqn.primitive not in _SCALINGS:
        return False
    others = [a for a in eqn.invars if a is not var]
    return len(others) == 1 and origins.kind(others[0]) is not Kind.OTHER


def _scales_by_statistic(eqn: JaxprEqn, origins: Origins) -> bool:
    return any(origins.kind(a) in (Kind.STATISTIC, Kind.DATA) for a in eqn.invars)


def _flatten(program: Program, origins: Origins, root: Var, chain: set[Var]) -> Sum | None:
    """The terms of a sum, None if it cannot be taken apart."""
    terms: list[tuple[int, Var]] = []
    others: list[tuple[int, Var]] = []
    positions: set[int] = set()

    def visit(sign: int, atom: Atom) -> bool:
        """Adds a value's terms; whether that could be done."""
        if not isinstance(atom, Var):
            return False
        eqn = program.definition(atom)
        whole = atom is root or (
            len(program.readers.get(atom, ())) == 1 and atom not in program.outputs
        )
        if eqn is not None and whole and is_known(eqn):
            if eqn.primitive in _ADDITIONS and all(size(a) == size(root) for a in eqn.invars):
                positions.add(program.maker[atom])
                second = -sign if eqn.primitive is p.sub_p else sign
                return visit(sign, eqn.invars[0]) and visit(second, eqn.invars[1])
            if eqn.primitive in (p.neg_p, p.convert_element_type_p):
                # A conversion rounds: what it takes apart must be the gradient's alone.
                mark = len(others)
                inner = -sign if eqn.primitive is p.neg_p else sign
                positions.add(program.maker[atom])
                if not visit(inner, eqn.invars[0]):
                    return False
                if len(others) == mark or eqn.primitive is p.neg_p:
                    return True
                if len(others) == mark + 1 and others[-1][1] is eqn.invars[0]:
                    others[-1] = (sign, atom)
                    positions.discard(program.maker[atom])
                    return True
                return False
        belongs = atom in chain or _reads_statistic(program, origins, atom)
        (terms if belongs else others).append((sign, atom))
        return True

    if not visit(1, root) or not terms:
        return None
    if not any(_reads_statistic(program, origins, term) for _, term in terms):
        return None
    return Sum(root, tuple(terms), tuple(others), frozenset(positions))


def _reads_statistic(program: Program, origins: Origins, term: Var, depth: int = 6) -> bool:
    """Whether a term is multiplied by a statistic, or repeats one, within a few equations."""
    stack = [(term, depth)]
    while stack:
        var, left = stack.pop()
        kind = origins.kind(var)
        if kind is Kind.STATISTIC:
            return True
        eqn = program.definition(var)
        if kind is not Kind.OTHER or eqn is None or not is_known(eqn) or left == 0:
            continue
        stack.extend(
            (a, left - 1)
            for a in eqn.invars
            if isinstance(a, Var) and (size(a) >= origins.full or origins.kind(a) is not Kind.OTHER)
        )
    return False
