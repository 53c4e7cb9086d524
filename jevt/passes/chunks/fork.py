"""Logits computed once more, for what has to be known of all tokens before their gradient.

Where a gradient depends on a sum over the loss of many tokens (a preference between two sequences,
an exponential of the mean), no loop over tokens can make logits and gradient at once. With a second
product, one loop makes the loss and a later one the gradient.

    before  z = h · w;  l = loss z;  s = sum l;  dz = gradient z s
    after   y = h · w;  l = loss y;  s = sum l;  z = h · w;  dz = gradient z s
"""

from __future__ import annotations

from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Var

from jevt._jaxpr import Atom
from jevt.passes._rewrite import rebuild, substitute
from jevt.passes.chunks.region import Head


def fork(head: Head, waited: Var) -> Jaxpr:
    """The program in which a value that depends on logits depends on logits of its own.

    Args:
      head: the product that gives the logits.
      waited: the value; whoever reads it reads the one of the copy.
    """
    program = head.program
    copied = _between(head, waited)
    copies: dict[Var, Atom] = {}
    env: dict[Var, Atom] = {}
    eqns: list[JaxprEqn] = []
    for position, eqn in enumerate(program.eqns):
        eqns.append(substitute(env, eqn))
        if position in copied:
            outvars = [v if isinstance(v, DropVar) else Var(v.aval) for v in eqn.outvars]
            eqns.append(substitute(copies, eqn).replace(outvars=outvars))
            copies.update(zip(eqn.outvars, outvars, strict=True))
            if waited in copies:
                env[waited] = copies[waited]
    return rebuild(program.jaxpr, eqns, env)


def _between(head: Head, waited: Var) -> set[int]:
    """Positions of the product and of what leads from it to a value."""
    program = head.program
    derived = {head.logits}
    for eqn in program.eqns[head.product + 1 :]:
        if any(isinstance(a, Var) and a in derived for a in eqn.invars):
            derived.update(eqn.outvars)
    found: set[int] = set()
    stack = [waited]
    while stack:
        position = program.maker[stack.pop()]
        if position not in found:
            found.add(position)
            operands = program.eqns[position].invars if position != head.product else ()
            stack.extend(a for a in operands if isinstance(a, Var) and a in derived)
    return found
