"""Gradients of cross entropies of which no loss is computed.

    (k / total)·exp(x - maximum) - g·target        k = g·Σ target, and what a z-loss adds

That is left of a lazy loss, and of a gradient alone. Another function of a logsumexp and of the
target's x is told by its k, in which there is no g.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes.attention.region import Program, number
from jevt.passes.raising import smoothed_labels
from jevt.passes.raising.cross_entropies import (
    ADDITIONS,
    Logits,
    Rewrite,
    label_of,
    mask_of,
    write_choice,
)

#: A number times a value, or the number alone.
type _Term = tuple[Atom | None, float]

#: Equations from a row's multiple back to its terms.
_DEPTH = 8


def is_alone(logits: Logits) -> bool:
    """Whether a multiple of the softmax meets a multiple of labels, by the same numbers a row."""
    for position in logits.readers_of_multiples():
        addends = list(_addends(logits.program, _whole_sum(logits.program, position)))
        found = [(logits.multiple(addend), sign) for addend, sign in addends]
        ks = [(multiple[0], sign) for multiple, sign in found if multiple is not None]
        if any(
            _is_of_labels(logits, addend, -sign, k, sign_of_k)
            for addend, sign in addends
            for k, sign_of_k in ks
        ):
            return True
    return False


def multiples_of_labels(logits: Logits) -> Iterator[Rewrite]:
    """The rewrites of multiples of smoothed labels that are added to those of the softmax."""
    program = logits.program
    for position in logits.readers_of_multiples():
        for addend, _ in _addends(program, _whole_sum(program, position)):
            eqn, choice = program.definition(addend), smoothed_labels.find(program, addend)
            if eqn is None or choice is None or label_of(logits, choice.mask) is None:
                continue
            if eqn.primitive is not p.convert_element_type_p:
                write = functools.partial(write_choice, eqn, choice)
                yield Rewrite(program.maker[eqn.outvars[0]], write)


def _whole_sum(program: Program, position: int) -> Atom:
    """The sum to which an addition belongs."""
    (total,) = program.eqns[position].outvars
    for _ in range(_DEPTH):
        readers = program.readers.get(total, ())
        if total in program.outputs or len(readers) != 1:
            break
        eqn = program.eqns[next(iter(readers))]
        if eqn.primitive not in ADDITIONS:
            break
        (total,) = eqn.outvars
    return total


def _addends(
    program: Program, atom: Atom, sign: float = 1.0, depth: int = 2 * _DEPTH
) -> Iterator[tuple[Atom, float]]:
    """What is added up, and with which sign."""
    eqn = program.definition(atom)
    if eqn is not None and depth and eqn.primitive in ADDITIONS:
        last = -sign if eqn.primitive is p.sub_p else sign
        yield from _addends(program, eqn.invars[0], sign, depth - 1)
        yield from _addends(program, eqn.invars[1], last, depth - 1)
    elif eqn is not None and depth and eqn.primitive is p.neg_p:
        yield from _addends(program, eqn.invars[0], -sign, depth - 1)
    else:
        yield atom, sign


def _is_of_labels(logits: Logits, atom: Atom, sign: float, k: Atom, sign_of_k: float) -> bool:
    """Whether an array is a g times labels, and the g with that sign is in k with its own."""
    program = logits.program
    eqn = program.definition(atom)
    if eqn is None:
        return False
    if eqn.primitive is p.select_n_p:
        if label_of(logits, mask_of(program, eqn, 2)) is None:
            return False
        return not _terms(logits, eqn.invars[2], sign).isdisjoint(_terms(logits, k, sign_of_k))
    if eqn.primitive is not p.mul_p:
        return False
    return any(
        not _terms(logits, g, sign).isdisjoint(_weights(logits, labels, k, sign_of_k))
        for labels, g in (eqn.invars, eqn.invars[::-1])
    )


def _weights(logits: Logits, labels: Atom, k: Atom, sign: float) -> set[_Term]:
    """What k may be the sum of ``labels`` times."""
    program = logits.program
    eqn = program.definition(logits.behind(k))
    if shape_of(labels) != shape_of(logits.x):
        return set()
    choice = smoothed_labels.find(program, labels)
    if choice is not None and label_of(logits, choice.mask) is not None:
        factors = eqn.invars if eqn is not None and eqn.primitive is p.mul_p else ()
        return set().union(*(_terms(logits, a, sign) for a in (k, *factors)))
    if eqn is None or eqn.primitive is not p.reduce_sum_p or eqn.params["axes"] != logits.axes:
        return set()
    product = program.definition(eqn.invars[0])
    if product is None or product.primitive is not p.mul_p or labels not in product.invars:
        return set()
    return set().union(*(_terms(logits, a, sign) for a in product.invars if a is not labels))


def _terms(logits: Logits, atom: Atom, factor: float = 1.0, depth: int = _DEPTH) -> set[_Term]:
    """The terms of a row's number, whatever it is where labels are ignored or outside."""
    program = logits.program
    value = number(program, atom)
    if value is not None:
        return {(None, factor * value)}
    atom = logits.behind(atom)
    eqn = program.definition(atom)
    if eqn is None or depth == 0:
        return {(atom, factor)}
    if eqn.primitive is p.neg_p:
        return _terms(logits, eqn.invars[0], -factor, depth - 1)
    if eqn.primitive in (p.add_p, p.add_jaxvals_p):
        return set().union(*(_terms(logits, a, factor, depth - 1) for a in eqn.invars))
    if eqn.primitive is p.select_n_p:
        cases = [a for a in eqn.invars[1:] if number(program, a) != 0.0]
        return set().union(*(_terms(logits, a, factor, depth - 1) for a in cases))
    if eqn.primitive is p.mul_p:
        for a, b in (eqn.invars, eqn.invars[::-1]):
            times = number(program, a)
            if times is not None:
                return _terms(logits, b, factor * times, depth - 1)
            maker = program.definition(logits.behind(a))
            is_cast = maker is not None and maker.primitive is p.convert_element_type_p
            if maker is not None and is_cast and kind(maker.invars[0].aval) == "b":
                return _terms(logits, b, factor, depth - 1)
    return {(atom, factor)}
