"""What XLA's matrix products read of what is stored anyway, they read from memory.

XLA computes the cheap operands of a product again inside of it, as the relu of a layer for the
gradient of the next one's weight. Where a kernel or a library's call reads the same value, so that
it is in memory, what the value is made from is then stored beside it. So the product reads the
value through a barrier, which XLA does not look through.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt.partition.fusions import relabels
from jevt.partition.graph import nbytes
from jevt.partition.plan import Group
from jevt.passes._rewrite import barrier, substitute

#: Kinds of groups that XLA makes fusions of.
_FUSED = frozenset({"pointwise", "rowwise", "columnwise"})

#: Bytes below which a value is not worth it.
_LEAST = 1 << 20


def behind_barriers(jaxpr: Jaxpr, groups: Sequence[Group]) -> frozenset[Var]:
    """What products read of values that XLA's fusions make and that kernels or calls read, too.

    Reshaped, a value is the same array.
    """
    source: dict[Var, Var] = {}
    for eqn in jaxpr.eqns:
        if relabels(eqn) and isinstance(operand := eqn.invars[0], Var):
            source[eqn.outvars[0]] = source.get(operand, operand)
    made = (v for g in groups if _is_fused(g) for v in g.jaxpr.outvars if isinstance(v, Var))
    arrays = {source.get(v, v) for g in groups if _is_call(g) for v in g.jaxpr.invars}
    products = dict.fromkeys(v for g in groups if is_product(g) for v in g.jaxpr.invars)
    stored = arrays.intersection(source.get(v, v) for v in made)
    return frozenset(v for v in products if source.get(v, v) in stored and nbytes(v.aval) >= _LEAST)


def is_product(group: Group) -> bool:
    """Whether XLA multiplies matrices for a group."""
    return group.target == "xla" and group.kind == "gemm"


def emit(
    eqns: Sequence[JaxprEqn], values: Collection[Var], known: dict[Var, Var]
) -> list[JaxprEqn]:
    """The equations of a product, which reads these values behind barriers.

    Args:
      eqns: of a group.
      values: that some group reads behind a barrier.
      known: those that are there already; new ones are added.
    """
    result: list[JaxprEqn] = []
    for eqn in eqns:
        for atom in eqn.invars:
            if isinstance(atom, Var) and atom in values and atom not in known:
                result.append(barrier([atom], eqn))
                (known[atom],) = result[-1].outvars
        result.append(substitute(known, eqn))
    return result


def _is_fused(group: Group) -> bool:
    return group.target == "xla" and group.kind in _FUSED


def _is_call(group: Group) -> bool:
    return group.target == "triton" or not (is_product(group) or _is_fused(group))
