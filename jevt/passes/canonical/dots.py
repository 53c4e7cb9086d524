"""Products of vectors: what a ``dot_general`` without a free axis is.

``einsum("bc,bc->b", x, y)`` and ``vdot`` are Σ x·y, which a kernel takes in with its neighbours and
the identities on sums know. In float32 and float64 alone: narrower products would be rounded before
they are added up.
"""

from __future__ import annotations

from typing import Any

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph, Rules


def _of_vectors(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``x·y = Σ x·y`` over the contracted axes, where each other axis is one of the batch."""
    (contracted, of_y), (batch, batch_of_y) = eqn.params["dimension_numbers"]
    x, y = eqn.invars
    free = len(shape_of(x)) - len(contracted) - len(batch)
    if free or len(shape_of(y)) != len(shape_of(x)) or not contracted:
        return None
    types: list[Any] = [a.aval for a in (x, y, *eqn.outvars)]
    if len({aval.dtype for aval in types}) > 1 or types[0].dtype not in ("float32", "float64"):
        return None
    if list(batch) != sorted(batch) or eqn.params.get("out_sharding") is not None:
        return None
    of = dict(zip((*contracted, *batch), (*of_y, *batch_of_y), strict=True))
    permutation = tuple(of[axis] for axis in range(len(of)))
    if permutation != tuple(range(len(of))):
        y = graph.emit(p.transpose_p, y, permutation=permutation)
    axes = tuple(sorted(int(axis) for axis in contracted))
    return graph.emit(p.reduce_sum_p, graph.mul(x, y), axes=axes, out_sharding=None)


RULES: Rules = {p.dot_general_p: (_of_vectors,)}
