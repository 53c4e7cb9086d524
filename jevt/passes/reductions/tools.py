"""What the rules on reductions share: axes, constants along them, and numbers of a type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rules import Graph

# Emits an expression and returns its result: nothing is emitted before all of it is known to exist.
type Expression = Callable[[], Atom]

# The sum of an array over axes, looking back so many equations; None if it is not known.
type Known = Callable[[Atom, tuple[int, ...], Graph, int], Expression | None]


def constant_along(
    atom: Atom, shape: tuple[int, ...], axes: tuple[int, ...], graph: Graph
) -> Expression | None:
    """What is left of ``atom`` without ``axes``, None if it is not constant along them.

    ``atom`` is an operand of an equation whose result has this shape. The result broadcasts
    against an array of the kept axes, or is a scalar.
    """
    if shape_of(atom) == ():
        return lambda: atom
    if (value := graph.uniform(atom)) is not None:
        return lambda: value
    kept = tuple(axis for axis in range(len(shape)) if axis not in axes)
    if len(shape_of(atom)) == len(shape) and all(shape_of(atom)[axis] == 1 for axis in axes):
        return lambda: graph.reshape(atom, [shape_of(atom)[axis] for axis in kept])
    eqn = graph.definition(atom, p.broadcast_in_dim_p)
    if eqn is None or len(eqn.invars) > 1 or eqn.params["sharding"] is not None:
        return None
    source = eqn.invars[0]
    dimensions = [int(d) for d in eqn.params["broadcast_dimensions"]]
    if any(d in axes and shape_of(source)[i] != 1 for i, d in enumerate(dimensions)):
        return None
    stays = [i for i, d in enumerate(dimensions) if d not in axes]
    target = [shape_of(atom)[axis] for axis in kept]

    def expression() -> Atom:
        y = graph.reshape(source, [shape_of(source)[i] for i in stays])
        return graph.broadcast(y, target, [kept.index(dimensions[i]) for i in stays])

    return expression


def factor(eqn: JaxprEqn, axes: tuple[int, ...], graph: Graph) -> tuple[Atom, Expression] | None:
    """(x, c) of a product ``c·x`` or quotient ``x/c``; x has the shape of the result."""
    shape = shape_of(eqn.outvars[0])
    orders = [(0, 1)] if eqn.primitive is p.div_p else [(0, 1), (1, 0)]
    for i, j in orders:
        x, c = eqn.invars[i], eqn.invars[j]
        if shape_of(x) == shape and (scale := constant_along(c, shape, axes, graph)) is not None:
            return x, scale
    return None


def is_of_kept(view: JaxprEqn, shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether a view sees an array of the kept axes, in order, against an array of this shape.

    A mean over other axes would have another shape, unless axes of the same size are exchanged.
    """
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    if not view.invars or shape_of(view.invars[0]) != tuple(shape[axis] for axis in kept):
        return False
    if view.primitive is p.reshape_p:
        placed = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        return bool(view.params["new_sizes"] == placed) and view.params["dimensions"] is None
    if view.primitive is p.broadcast_in_dim_p:
        return list(map(int, view.params["broadcast_dimensions"])) == kept
    return False


def hot_index(which: Atom, axes: tuple[int, ...], graph: Graph) -> Atom | None:
    """The i of ``iota == i`` along the one axis of ``axes``, as the comparison sees it."""
    test = graph.definition(which, p.eq_p)
    if test is None or len(axes) != 1:
        return None
    (axis,), shape = axes, shape_of(which)
    for counter, index in (test.invars, test.invars[::-1]):
        iota = graph.definition(counter, p.iota_p)
        if iota is None or iota.params["dimension"] != axis or len(shape_of(counter)) != len(shape):
            continue
        aval: Any = counter.aval
        counts = kind(aval) == "i" and shape[axis] - 1 <= jax.numpy.iinfo(aval.dtype).max
        if counts and aval.shape[axis] == shape[axis]:
            return index
    return None


def spread(atom: Atom, shape: tuple[int, ...], graph: Graph) -> Atom:
    """A scalar, or an array with axes of size 1, as an array of this shape."""
    if shape_of(atom) == shape:
        return atom
    if isinstance(atom, Literal):
        return graph.full(atom, shape)
    return graph.broadcast(atom, shape, range(len(shape_of(atom))))


def axes_of(eqn: JaxprEqn) -> tuple[int, ...]:
    """The axes that a reduction removes."""
    return tuple(int(axis) for axis in eqn.params["axes"])


def without(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of the axes that are not in ``axes``."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def is_wide(atom: Atom) -> bool:
    """Whether the type is the one in which sums accumulate."""
    aval: Any = atom.aval
    return aval.dtype in (np.float32, np.float64)


def multiple(value: Any, count: int) -> Any:
    """``count·value``, None if that is not exact up to one rounding."""
    if kind(value) == "i":
        info = jax.numpy.iinfo(value.dtype)
        total = int(value) * count
        return value.dtype.type(total) if info.min <= total <= info.max else None
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.float64(value) * count).astype(value.dtype)[()]


def number(count: int, like: Any, graph: Graph) -> Literal | None:
    """``count`` as a literal, None if the type does not hold it."""
    if kind(like) == "i":
        fits = count <= jax.numpy.iinfo(like.dtype).max
    else:
        with np.errstate(over="ignore"):
            fits = kind(like) == "f" and float(np.asarray(count, like.dtype)) == count
    return graph.literal(count, like) if fits else None
