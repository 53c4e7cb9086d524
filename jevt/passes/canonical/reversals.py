"""Canonical forms of reversals: only along axes that have something to reverse, and once.

The gradient of a convolution by its input is a convolution with the weights reversed along the
window. Where the window has one element, there is nothing to reverse.

    rev[axes] x = rev[axes of more than one element] x         rev[] x = x
    rev[A] (rev[B] x) = rev[A xor B] x
    rev[axes] B(x) = rev[axes that B does not repeat along] B(x)

All of these move values and change none.
"""

from __future__ import annotations

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph, Rules


def _rev(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    (x,), axes = eqn.invars, {int(axis) for axis in eqn.params["dimensions"]}
    inner = graph.definition(x, p.rev_p)
    if inner is not None:
        (x,), axes = inner.invars, axes ^ {int(axis) for axis in inner.params["dimensions"]}
    kept = tuple(axis for axis in sorted(axes) if _differs_along(x, axis, graph))
    if not kept:
        return x
    if inner is None and kept == tuple(eqn.params["dimensions"]):
        return None
    return graph.emit(p.rev_p, x, dimensions=kept)


def _differs_along(x: Atom, axis: int, graph: Graph) -> bool:
    """Whether elements along the axis may differ."""
    if shape_of(x)[axis] <= 1 or graph.uniform(x) is not None:
        return False
    view = graph.definition(x, p.broadcast_in_dim_p)
    if view is None:
        return True
    dimensions = [int(d) for d in view.params["broadcast_dimensions"]]
    return axis in dimensions and shape_of(view.invars[0])[dimensions.index(axis)] > 1


RULES: Rules = {p.rev_p: (_rev,)}
