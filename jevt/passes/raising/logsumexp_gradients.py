"""The gradients of a logsumexp and of the logarithm of a softmax: ``k·p``, k a number a row.

Differentiation leaves ``(k / total)·exp(…)``: one division a row, and one product an element. That
is the best spelling, too; it is found to be written with the statistics of the composite, and to be
counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jax.extend.core import Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes.attention.operations import NoMatch, is_known
from jevt.passes.raising.cones import size
from jevt.passes.raising.norms import same_mesh
from jevt.passes.raising.small import Evaluation, times
from jevt.passes.raising.softmaxes import Softmax, agree, forms

#: Equations between k and its product with the softmax.
_MANY = 10


@dataclasses.dataclass(frozen=True)
class Multiple:
    """A value ``k·p`` of the program, found.

    Attributes:
      value: it.
      k: a number a row, or for all, in the shape of the program's total or its view.
      inside: the equations from k to it.
    """

    value: Var
    k: Atom
    inside: frozenset[int]


def find(softmax: Softmax) -> Iterator[Multiple]:
    """The multiples of a softmax by numbers a row, made of its exponential."""
    program = softmax.program
    forward = (*softmax.cone.positions, *softmax.after)
    made = [v for i in forward for v in program.eqns[i].outvars]
    for exponential in (v for v in made if size(v) == size(softmax.x)):
        for position in program.readers.get(exponential, ()):
            eqn = program.eqns[position]
            if eqn.primitive is not p.mul_p or eqn.invars[0] is eqn.invars[1]:
                continue
            if eqn.outvars[0] in softmax.results:
                continue
            (row,) = (a for a in eqn.invars if a is not exponential)
            inside = {position}
            k = _numerator(softmax, set(made), row, inside)
            if k is None or not _is_multiple(softmax, {*forward, *inside}, eqn.outvars[0], k):
                continue
            yield Multiple(eqn.outvars[0], k, frozenset(inside))


def _numerator(softmax: Softmax, made: set[Var], row: Atom, inside: set[int]) -> Atom | None:
    """What in a row is divided by a total, if nothing else is in it; adds the equations on the way.

    Guards that chose among k / total and -k / total may be on the way.
    """
    program = softmax.program
    found: list[Atom] = []
    stack = [row]
    while stack:
        atom = stack.pop()
        if not isinstance(atom, Var) or program.maker.get(atom) in softmax.cone.positions:
            continue
        if atom in softmax.masks:
            continue
        eqn = program.definition(atom)
        if eqn is None or not is_known(eqn) or len(inside) == _MANY:
            return None
        inside.add(program.maker[atom])
        if eqn.primitive is p.div_p and isinstance(eqn.invars[1], Var) and eqn.invars[1] in made:
            found.append(eqn.invars[0])
        else:
            stack.extend(eqn.invars)
    # A guard reads the quotient twice.
    k = found[0] if found and all(a is found[0] for a in found) else None
    return None if isinstance(k, Var) and k in made else k


def _is_multiple(softmax: Softmax, positions: set[int], value: Var, k: Atom) -> bool:
    try:
        run = Evaluation(softmax.program, sorted(positions))
        softmax.draw_masks(run)
        run.run()
        if run.names(value) != run.names(softmax.x) or not same_mesh(value, softmax.x, k):
            return False
        over = [name for name in run.names(softmax.x) if name not in run.names(softmax.total)]
        known = forms(run, run.value(softmax.x), over, guarded=softmax.guarded)
        return agree(run.value(value), times(known["softmax"], run.value(k)))
    except NoMatch:
        return False
