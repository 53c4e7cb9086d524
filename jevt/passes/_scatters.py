"""What rules about scatters of rows have in common."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p
from jax.lax import GatherScatterMode as Mode

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph


def adds_rows(eqn: JaxprEqn) -> bool:
    """Whether each index selects a row, and the updates' leading axes are those of the indices."""
    _, indices, updates = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    leading = len(shape_of(indices)) - 1
    return (
        numbers.inserted_window_dims == (0,)
        and numbers.scatter_dims_to_operand_dims == (0,)
        and not numbers.operand_batching_dims
        and shape_of(indices)[-1] == 1
        and tuple(numbers.update_window_dims) == tuple(range(leading, len(shape_of(updates))))
        and shape_of(updates)[leading:] == shape_of(eqn.outvars[0])[1:]
    )


def row_numbers(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """The indices of a scatter of rows as one axis of at least 32 bits, clipped where it clips."""
    indices, rows = eqn.invars[1], shape_of(eqn.outvars[0])[0]
    index = graph.reshape(indices, (math.prod(shape_of(indices)[:-1]),))
    aval: Any = index.aval
    if np.dtype(aval.dtype).itemsize < 4:  # a row's number may not fit
        index = graph.emit(
            p.convert_element_type_p,
            index,
            new_dtype=np.dtype("int32"),
            weak_type=False,
            sharding=None,
        )
        aval = index.aval
    mode = eqn.params["mode"]
    if mode == Mode.CLIP:
        return graph.emit(p.clamp_p, graph.literal(0, aval), index, graph.literal(rows - 1, aval))
    return index if mode in (Mode.FILL_OR_DROP, Mode.PROMISE_IN_BOUNDS) else None
