"""Counts the FLOPs and the bytes of a function from its jaxpr, for the roofline floor.

FLOPs are those of contractions and convolutions alone. Bytes are what is left when everything
pointwise, every normalisation and every reduction is fused into its neighbours: each argument
read once, each result written once, and each contraction, gather and scatter reading its
operands and writing its result. Tensors that an ideal kernel keeps on chip (attention scores,
say) are named by the workload and left out. Both counts are lower bounds as the step is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core


@dataclass(frozen=True)
class Work:
    """FLOPs (a multiply-add is two) and bytes of device memory traffic."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, n: int) -> Work:
        """The work done n times."""
        return Work(self.flops * n, self.bytes * n)


OnChip = Callable[[Any], bool]


def everything_in_memory(aval: Any) -> bool:
    """The default of ``on_chip``: every intermediate is written to memory."""
    del aval
    return False


def count_work(fun: Callable[..., Any], *args: Any, on_chip: OnChip = everything_in_memory) -> Work:
    """The work of ``fun(*args)``; the arguments may be ``jax.ShapeDtypeStruct``."""
    jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
    border = sum(_bytes(v.aval) for v in (*jaxpr.invars, *jaxpr.outvars))
    return _count_jaxpr(jaxpr, on_chip) + Work(bytes=border)


def _count_jaxpr(jaxpr: core.Jaxpr, on_chip: OnChip) -> Work:
    total = Work()
    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive.name)
        if rule is not None:
            total += rule(eqn, on_chip)
        else:
            inner = [_count_jaxpr(j, on_chip) for j in core.jaxprs_in_params(eqn.params)]
            total += sum(inner, Work())
    return total


def _dot_general(eqn: core.JaxprEqn, on_chip: OnChip) -> Work:
    (lhs_contract, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval
    depth = math.prod(lhs.shape[d] for d in lhs_contract)
    flops = 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    return Work(flops, _traffic(eqn, on_chip))


def _conv(eqn: core.JaxprEqn, on_chip: OnChip) -> Work:
    rhs, out = eqn.invars[1].aval, eqn.outvars[0].aval
    spec = eqn.params["dimension_numbers"].rhs_spec  # (out features, in features, *spatial)
    taps = math.prod(rhs.shape[d] for d in spec[1:])
    # A dilated left operand is mostly zeros; an ideal kernel skips them.
    zeros = math.prod(eqn.params["lhs_dilation"])
    return Work(2 * math.prod(out.shape) * taps / zeros, _traffic(eqn, on_chip))


def _sparse_dot(eqn: core.JaxprEqn, on_chip: OnChip) -> Work:
    return Work(bytes=_traffic(eqn, on_chip))


def _gather(eqn: core.JaxprEqn, on_chip: OnChip) -> Work:
    operand, indices = (v.aval for v in eqn.invars[:2])
    out = eqn.outvars[0].aval
    read = min(_bytes(operand), _bytes(out)) + _bytes(indices)
    return Work(bytes=read + (0 if on_chip(out) else _bytes(out)))


def _scatter(eqn: core.JaxprEqn, on_chip: OnChip) -> Work:
    _, indices, updates = (v.aval for v in eqn.invars[:3])
    out = eqn.outvars[0].aval
    read = _bytes(indices) + (0 if on_chip(updates) else _bytes(updates))
    return Work(bytes=read + (0 if on_chip(out) else _bytes(out)))


def _scan(eqn: core.JaxprEqn, on_chip: OnChip) -> Work:
    return _count_jaxpr(eqn.params["jaxpr"].jaxpr, on_chip).times(eqn.params["length"])


def _cond(eqn: core.JaxprEqn, on_chip: OnChip) -> Work:
    branches = [_count_jaxpr(b.jaxpr, on_chip) for b in eqn.params["branches"]]
    return max(branches, key=lambda w: (w.flops, w.bytes))


def _traffic(eqn: core.JaxprEqn, on_chip: OnChip) -> int:
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    return sum(_bytes(a) for a in avals if not on_chip(a))


def _bytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize


_Rule = Callable[[core.JaxprEqn, OnChip], Work]
_RULES: dict[str, _Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "bcoo_dot_general": _sparse_dot,
    "gather": _gather,
    "scatter-add": _scatter,
    "scatter": _scatter,
    "scan": _scan,
    "cond": _cond,
}
