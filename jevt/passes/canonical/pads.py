"""Canonical form of a sum of padded pieces: their concatenation.

The gradient of ``split``, and of several slices of one array, pads each piece with zeros to the
whole and adds up: passes over the whole for each piece, where the result is the pieces side by
side.

    add (pad a, low=0, high=4) (pad b, low=2, high=2) = pad (concatenate a b), high=2

Only pieces that touch are joined, padded along one axis, with zeros. The result differs from the
sum in the sign of a zero at most: -0.0 stays, where -0.0 + 0.0 is 0.0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph, Rules


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a zero-padded array holds.

    Attributes:
      operand: the array without padding.
      axis: that is padded.
      low, high: number of zeros before and after it.
      zero: the padding value.
    """

    operand: Atom
    axis: int
    low: int
    high: int
    zero: Atom


def _side_by_side(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    first, second = (_piece(atom, graph) for atom in eqn.invars)
    if first is None or second is None or first.axis != second.axis:
        return None
    if first.low > second.low:
        first, second = second, first
    axis = first.axis
    whole = shape_of(eqn.outvars[0])[axis]
    if whole - first.high != second.low:
        return None
    operands = [*_parts(first.operand, axis, graph), *_parts(second.operand, axis, graph)]
    joined = graph.emit(p.concatenate_p, *operands, dimension=axis)
    if not first.low and not second.high:
        return joined
    config = [(0, 0, 0)] * len(shape_of(joined))
    config[axis] = (first.low, second.high, 0)
    return graph.emit(p.pad_p, joined, first.zero, padding_config=tuple(config))


def _piece(atom: Atom, graph: Graph) -> _Piece | None:
    pad = graph.definition(atom, p.pad_p)
    if pad is None or graph.constant(pad.invars[1]) != 0:
        return None
    config: Any = pad.params["padding_config"]
    padded = [axis for axis, amounts in enumerate(config) if amounts != (0, 0, 0)]
    if len(padded) != 1:
        return None
    (axis,) = padded
    low, high, interior = config[axis]
    if interior or low < 0 or high < 0 or not shape_of(pad.invars[0])[axis]:
        return None
    return _Piece(pad.invars[0], axis, low, high, pad.invars[1])


def _parts(atom: Atom, axis: int, graph: Graph) -> list[Atom]:
    inner = graph.definition(atom, p.concatenate_p)
    if inner is None or inner.params["dimension"] != axis:
        return [atom]
    return list(inner.invars)


RULES: Rules = {p.add_p: (_side_by_side,)}
