"""Canonical forms of what is asked of an ``iota``: its values are known to be 0 … n-1.

Indexing brings positions into range: negative ones count from the end, others are clamped. Of
positions that count themselves (``x[jnp.arange(n), labels]``, ``jnp.diagonal``) that says nothing.

    convert iota = iota        of another type of integers, which holds n-1
    clamp low iota high = iota       where low ≤ 0 and high ≥ n-1
    iota < c = False, iota ≥ c = True      where c ≤ 0
    iota > c = False, iota ≤ c = True      where c ≥ n-1
    iota == c = False, iota ≠ c = True     where c is none of 0 … n-1
"""

from __future__ import annotations

import jax
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rules import Graph, Rules

# The comparison with its operands exchanged.
_EXCHANGED: dict[Primitive, Primitive] = {
    p.lt_p: p.gt_p,
    p.gt_p: p.lt_p,
    p.le_p: p.ge_p,
    p.ge_p: p.le_p,
    p.eq_p: p.eq_p,
    p.ne_p: p.ne_p,
}


def _last(atom: Atom, graph: Graph) -> int | None:
    """The largest value of an ``iota`` of integers, None of anything else."""
    iota = graph.definition(atom, p.iota_p)
    if iota is None or kind(atom.aval) != "i":
        return None
    return int(shape_of(atom)[iota.params["dimension"]]) - 1


def _convert(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    (x,), dtype = eqn.invars, eqn.params["new_dtype"]
    last, out = _last(x, graph), eqn.outvars[0]
    if last is None or kind(out.aval) != "i" or eqn.params["sharding"] is not None:
        return None
    iota = graph.definition(x, p.iota_p)
    if iota is None or iota.invars or last > int(jax.numpy.iinfo(dtype).max):
        return None
    return graph.emit(p.iota_p, **{**iota.params, "dtype": dtype})


def _clamp(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    low, x, high = eqn.invars
    last = _last(x, graph)
    bounds = graph.constant(low), graph.constant(high)
    if last is None or any(bound is None for bound in bounds):
        return None
    return x if int(bounds[0]) <= 0 and last <= int(bounds[1]) else None


def _compare(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    primitive, (x, y) = eqn.primitive, eqn.invars
    if _last(x, graph) is None:
        primitive, x, y = _EXCHANGED[primitive], y, x
    last, number = _last(x, graph), graph.constant(y)
    if last is None or number is None:
        return None
    known = _known(primitive, last, int(number))
    if known is None:
        return None
    return graph.full(graph.literal(known, eqn.outvars[0].aval), shape_of(eqn.outvars[0]))


def _known(primitive: Primitive, last: int, number: int) -> bool | None:
    """What a comparison of each of 0 … last with the number gives, None if not always the same."""
    if primitive in (p.lt_p, p.ge_p) and number <= 0:
        return primitive is p.ge_p
    if primitive in (p.gt_p, p.le_p) and number >= last:
        return primitive is p.le_p
    if primitive in (p.eq_p, p.ne_p) and not 0 <= number <= last:
        return primitive is p.ne_p
    return None


RULES: Rules = {
    p.convert_element_type_p: (_convert,),
    p.clamp_p: (_clamp,),
    **dict.fromkeys(_EXCHANGED, (_compare,)),
}
