"""Which equations XLA leaves out of cuBLAS's calls, though a call could take them along.

What follows a product, as its bias, becomes part of the call only

* if the other operands are inputs of the program, or views of them: not a slice of one bias for
  queries, keys and values, nor one that is cast. On an H100 a ViT's three biases took 35 µs each.
  (Of programs compiled for an H100 with XLA of jaxlib 0.11.2. In a loop's body, whose inputs XLA
  does not see as such, more is left out than is assumed here.)
* if XLA does not multiply the product together with others (:mod:`.siblings`).
"""

from __future__ import annotations

from jax.extend.core import Jaxpr, Var

from jevt.partition import siblings

#: Views of an operand that cuBLAS's layouts stand for.
VIEWS = frozenset({"reshape", "squeeze", "transpose", "broadcast_in_dim"})


def apart(jaxpr: Jaxpr) -> frozenset[Var]:
    """The results of equations that no call takes along."""
    merged = siblings.merged(jaxpr)
    given: set[Var] = set(jaxpr.invars)
    result: set[Var] = set()
    for eqn in jaxpr.eqns:
        computed = [a for a in eqn.invars if isinstance(a, Var) and a not in given]
        if eqn.primitive.name in VIEWS and not computed:
            given.update(eqn.outvars)
        elif len(computed) > 1 or not merged.isdisjoint(computed):
            result.update(eqn.outvars)
    return frozenset(result)
