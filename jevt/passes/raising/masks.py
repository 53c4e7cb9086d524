"""The masks of exponentials (``where=``): which elements of a row count for a softmax.

    total = Σ where(mask, exp(y - maximum), 0)      maximum = max x,  x = where(mask, y, -inf)

The masks of a softmax are booleans, each with the value for which it keeps an element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jax.extend.core import JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt.passes.attention.region import Program, number
from jevt.passes.attention.values import Named
from jevt.passes.raising.cones import Cone
from jevt.passes.raising.small import Evaluation


def choices(program: Program, eqn: JaxprEqn, dropped: float) -> Iterator[tuple[Var, bool]]:
    """The mask of a choice between values and a number, and its value where it keeps them."""
    which, *cases = eqn.invars
    if len(cases) != 2 or not isinstance(which, Var):
        return
    for keeps, other in ((True, cases[0]), (False, cases[1])):
        if number(program, other) == dropped:
            yield which, keeps


def operand(program: Program, cone: Cone, masks: Mapping[Var, bool]) -> Var | None:
    """What the maximum is taken of, if a mask drops elements of that as it does exponentials."""
    for position in cone.positions:
        eqn = program.eqns[position]
        if eqn.primitive is not p.reduce_max_p:
            continue
        chosen = program.definition(eqn.invars[0])
        if chosen is None or chosen.primitive is not p.select_n_p:
            continue
        if masks.items() <= dict(choices(program, chosen, -np.inf)).items():
            return chosen.outvars[0]
    return None


def draw(run: Evaluation, masks: Mapping[Var, bool]) -> None:
    """Gives masks random values that keep something of every row, and of some not all."""
    for mask, keeps in masks.items():
        drawn = run.draw(run.names(mask))
        kept = np.asarray(drawn.array > -0.5)
        kept[(slice(0, 1),) * kept.ndim] = kept.ndim == 0
        for axis in range(kept.ndim):  # the last of every row, whichever axes it runs along
            np.moveaxis(kept, axis, 0)[-1] = True
        run.values[mask] = Named(drawn.names, kept if keeps else ~kept)


def drop(run: Evaluation, masks: Mapping[Var, bool]) -> None:
    """Gives masks values that keep nothing."""
    for mask, keeps in masks.items():
        names = run.names(mask)
        run.values[mask] = Named(names, np.full([run.size(n) for n in names], not keeps))
