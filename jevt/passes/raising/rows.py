"""The rows of a composite: where they are, and what is computed with their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax.extend.core import Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph
from jevt.passes.raising.write import cast, number
from jevt_kernels.mainloops.rowwise import MAX_WHOLE


def on_chip(shape: Sequence[int], axes: tuple[int, ...]) -> bool:
    """Whether a kernel holds whole rows, so that a second pass over one moves nothing."""
    rank, width = len(shape), math.prod(shape[axis] for axis in axes)
    is_row = axes == tuple(range(rank - len(axes), rank))
    size = math.prod(shape)
    return is_row and width <= MAX_WHOLE and not _few_and_long(size, size // max(1, width))


def _few_and_long(size: int, rows: int) -> bool:
    """Whether rows with so many elements in all would leave most of a GPU idle."""
    return 0 < rows < 64 and size > 1 << 17


def along(row: Atom, x: Atom, axes: tuple[int, ...], graph: Graph) -> Atom:
    """A row's values with axes of size 1 in the place of those of x that it has not."""
    return graph.reshape(row, [1 if i in axes else n for i, n in enumerate(shape_of(x))])


def exponential(x: Atom, maximum: Atom, axes: tuple[int, ...], graph: Graph) -> Atom:
    """``exp(x - maximum)`` with one maximum a row, as every reader of a softmax spells it."""
    shifted = graph.emit(p.sub_p, x, along(maximum, x, axes, graph))
    return graph.emit(p.exp_p, shifted, accuracy=None)


def of_row(k: Atom, row: Atom, graph: Graph) -> Atom:
    """A number a row, or one for all: in the type of ``row``, and in its shape or a scalar."""
    if isinstance(k, Literal):
        return number(k.val, row, graph)
    k = cast(k, row, graph)
    return graph.reshape(k, shape_of(row)) if shape_of(k) else k
