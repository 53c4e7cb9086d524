"""Products of which some rows are not read, without these; and gradients without their padding.

The loss of ``logits[:, :-1]`` reads all but one row of each sequence, and the gradient of the
logits is padded with zeros there. Without:

    slice (dot_general h w)      =  dot_general (slice h) w
    dot_general (pad dz) w       =  pad (dot_general dz w)            rows are not contracted
    dot_general h (pad dz)       =  dot_general (slice h) dz          they are
    reduce_sum (pad dz)          =  reduce_sum dz

with casts and a bias between product and slice, casts and factors between padding and readers.
Zeros that are left out are not multiplied with an infinity in the other operand either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import rebuild, substitute
from jevt.passes._rules import Graph
from jevt.passes.chunks.rows import ELEMENTWISE

#: Bounds of a slice: start and limit, for each axis.
type Bounds = Sequence[tuple[int, int]]

#: Equations between two values, from the last to the first, and which operand leads on.
type Steps = list[tuple[JaxprEqn, int]]


def run(jaxpr: Jaxpr, is_large: Callable[[Atom], bool]) -> Jaxpr:
    """Rewrites ``jaxpr``, without its bodies.

    Args:
      jaxpr: the program.
      is_large: of which products and gradients.
    """

    def only(rule: Callable[[JaxprEqn, Graph], Atom | None]) -> Any:
        def guarded(eqn: JaxprEqn, graph: Graph) -> Atom | None:
            return rule(eqn, graph) if any(map(is_large, eqn.invars)) else None

        return (guarded,)

    rules = {
        p.slice_p: only(_slice),
        p.dot_general_p: only(_product),
        p.reduce_sum_p: only(_sum),
    }
    if not any(e.primitive in (p.slice_p, p.pad_p) and is_large(e.invars[0]) for e in jaxpr.eqns):
        return jaxpr
    graph = Graph(jaxpr, rules)
    for eqn in jaxpr.eqns:
        graph.add(substitute(graph.env, eqn))
    return rebuild(jaxpr, graph.eqns, graph.env)


def _slice(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """The product of the rows that a slice takes of one."""
    params = eqn.params
    if params["strides"] is not None and any(stride != 1 for stride in params["strides"]):
        return None
    bounds = list(zip(params["start_indices"], params["limit_indices"], strict=True))
    shape = shape_of(eqn.invars[0])
    cut = [axis for axis, n in enumerate(shape) if bounds[axis] != (0, n)]
    steps: Steps = []
    atom = eqn.invars[0]
    while graph.readers(atom) == 1:
        maker = graph.definition(atom)
        if maker is not None and maker.primitive is p.dot_general_p:
            product = _cut_product(maker, bounds, cut, graph)
            return None if product is None else _again(steps, product, graph)
        index = _leading(maker, cut) if maker is not None else None
        if maker is None or index is None:
            return None
        steps.append((maker, index))
        atom = maker.invars[index]
    return None


def _leading(eqn: JaxprEqn, cut: Sequence[int]) -> int | None:
    """Which operand an elementwise equation reads in full, if the others repeat along ``cut``."""
    shape = shape_of(eqn.outvars[0])
    full = [i for i, a in enumerate(eqn.invars) if shape_of(a) == shape]
    others = [shape_of(a) for a in eqn.invars if shape_of(a) != shape]
    if eqn.primitive not in ELEMENTWISE or len(full) != 1:
        return None
    return full[0] if all(not s or all(s[axis] == 1 for axis in cut) for s in others) else None


def _again(steps: Steps, atom: Atom, graph: Graph) -> Atom:
    """The equations once more, applied to another value."""
    for eqn, index in reversed(steps):
        operands = [atom if i == index else a for i, a in enumerate(eqn.invars)]
        atom = graph.emit(eqn.primitive, *operands, **eqn.params)
    return atom


def _cut_product(eqn: JaxprEqn, bounds: Bounds, cut: Sequence[int], graph: Graph) -> Atom | None:
    contracted, batch = eqn.params["dimension_numbers"]
    places: list[tuple[int, int]] = []  # operand and axis of each axis of the result
    for side, atom in enumerate(eqn.invars):
        taken = {*contracted[side], *batch[side]}
        places += [(side, axis) for axis in range(len(shape_of(atom))) if axis not in taken]
    if any(axis < len(batch[0]) for axis in cut):
        return None
    operands = list(eqn.invars)
    for axis in cut:
        side, place = places[axis - len(batch[0])]
        operands[side] = _part(operands[side], place, bounds[axis], graph)
    return graph.emit(p.dot_general_p, *operands, **eqn.params)


def _part(atom: Atom, axis: int, bounds: tuple[int, int], graph: Graph) -> Atom:
    """A slice along one axis."""
    shape = shape_of(atom)
    starts = tuple(bounds[0] if a == axis else 0 for a in range(len(shape)))
    limits = tuple(bounds[1] if a == axis else n for a, n in enumerate(shape))
    return graph.emit(p.slice_p, atom, start_indices=starts, limit_indices=limits, strides=None)


def _unpadded(atom: Atom, graph: Graph) -> tuple[Atom, Bounds] | None:
    """A zero-padded value without the zeros, and where it lies in the whole."""
    shape = shape_of(atom)
    steps: Steps = []
    while (maker := graph.definition(atom)) is not None:
        if maker.primitive is p.pad_p:
            config = maker.params["padding_config"]
            if graph.constant(maker.invars[1]) != 0 or any(
                low < 0 or high < 0 or interior for low, high, interior in config
            ):
                return None
            bounds = [(low, n - high) for n, (low, high, _) in zip(shape, config, strict=True)]
            return _again(steps, maker.invars[0], graph), bounds
        index = _keeping_zeros(maker)
        if index is None:
            return None
        steps.append((maker, index))
        atom = maker.invars[index]
    return None


def _keeping_zeros(eqn: JaxprEqn) -> int | None:
    """The operand of which an equation's result has the zeros."""
    if eqn.primitive in (p.convert_element_type_p, p.neg_p):
        return 0
    if eqn.primitive is p.mul_p:
        numbers = [isinstance(a, Literal) and np.isfinite(a.val) for a in eqn.invars]
        return numbers.index(False) if numbers.count(True) == 1 else None
    return None


def _product(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A product with a value without its padding."""
    contracted, batch = eqn.params["dimension_numbers"]
    first = len(batch[0])
    for side in (0, 1):
        free = len(shape_of(eqn.invars[side])) - len(contracted[side]) - first
        found = _unpadded(eqn.invars[side], graph)
        if found is not None:
            small, bounds = found
            padded = _padded(eqn.invars[side], bounds)
            if any(axis in batch[side] for axis in padded):
                return None
            operands = [small, small]
            operands[1 - side] = eqn.invars[1 - side]
            for own, other in zip(contracted[side], contracted[1 - side], strict=True):
                if own in padded:
                    part = _part(operands[1 - side], other, bounds[own], graph)
                    operands[1 - side] = part
            result = graph.emit(p.dot_general_p, *operands, **eqn.params)
            taken = {*contracted[side], *batch[side]}
            kept = [a for a in range(len(shape_of(small))) if a not in taken]
            start = first if side == 0 else len(shape_of(result)) - free
            outside = {start + kept.index(a): bounds[a] for a in padded if a in kept}
            return _pad(result, shape_of(eqn.outvars[0]), outside, graph)
    return None


def _sum(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A sum along axes without their padding."""
    found = _unpadded(eqn.invars[0], graph)
    if found is None or not set(_padded(eqn.invars[0], found[1])) <= set(eqn.params["axes"]):
        return None
    return graph.emit(p.reduce_sum_p, found[0], **eqn.params)


def _padded(atom: Atom, bounds: Bounds) -> list[int]:
    return [axis for axis, n in enumerate(shape_of(atom)) if tuple(bounds[axis]) != (0, n)]


def _pad(
    atom: Atom, shape: Sequence[int], bounds: dict[int, tuple[int, int]], graph: Graph
) -> Atom:
    """Zeros around a value, where it is shorter than ``shape``."""
    if not bounds:
        return atom
    config = [(0, 0, 0)] * len(shape)
    for axis, (low, limit) in bounds.items():
        config[axis] = (low, shape[axis] - limit, 0)
    zero = graph.literal(0, atom.aval)
    return graph.emit(p.pad_p, atom, zero, padding_config=tuple(config))
