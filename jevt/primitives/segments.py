"""Sums of segments: adding rows to the rows that indices name, without atomic additions.

    segment_order:   indices [E]                            -> order int32[E]
    segment_bounds:  indices [E] order                      -> bounds int32[R + 1]
    segment_sum:     bounds columns[E] table[M, F] [weights[E]] -> [R, F]

``order`` sorts the indices, equal ones in their own order; positions ``bounds[r]`` to
``bounds[r + 1]`` of it are those whose index is r. An index below 0 or beyond R belongs to no row.
With ``columns`` in that order, row r of the result is Σ weights[e] · table[columns[e]], summed in
float32 and rounded once.

A pass puts them in the place of ``scatter-add``. On CUDA the sum is a kernel of
``jevt_kernels.segment_sum``; the others, and the sum elsewhere, are equations of JAX. They come
after differentiation and batching, so they have no rules for either.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jevt import _jax_internals as internals
from jevt.lowering.errors import JevtWarning
from jevt_kernels import launch
from jevt_kernels.ops import compute_dtype
from jevt_kernels.segment_sum import segment_sum as kernel
from jevt_kernels.spec import TensorType

_INT32 = np.dtype("int32")

segment_order_p = Primitive("segment_order")
segment_bounds_p = Primitive("segment_bounds")
segment_sum_p = Primitive("segment_sum")


@segment_order_p.def_abstract_eval
def _order_type(indices: Any) -> Any:
    return internals.array_like(indices, indices.shape, _INT32)


@segment_bounds_p.def_abstract_eval
def _bounds_type(indices: Any, order: Any, *, rows: int) -> Any:
    del order
    return internals.array_like(indices, (rows + 1,), _INT32)


@segment_sum_p.def_abstract_eval
def _sum_type(bounds: Any, columns: Any, table: Any, *weights: Any, capability: int) -> Any:
    del capability
    if columns.ndim != 1 or table.ndim != 2 or any(w.shape != columns.shape for w in weights):
        raise ValueError(
            "segment_sum: expected columns [E], a table [M, F] and weights [E] if any, got"
            f" {columns}, {table} and {weights}"
        )
    return internals.array_like(table, (bounds.shape[0] - 1, table.shape[1]), table.dtype)


def order(indices: jax.Array) -> jax.Array:
    """Positions of the indices in ascending order, equal ones as they come."""
    positions = jnp.arange(indices.shape[0], dtype=_INT32)
    return jax.lax.sort_key_val(indices, positions, is_stable=True)[1]


def bounds(indices: jax.Array, order: jax.Array, *, rows: int) -> jax.Array:
    """Where the positions of each row begin in ``order``, and where the last row's end."""
    numbers = jnp.arange(rows + 1, dtype=indices.dtype)
    return jnp.searchsorted(indices[order], numbers).astype(_INT32)


def reference(
    bounds: jax.Array,
    columns: jax.Array,
    table: jax.Array,
    *weights: jax.Array,
    capability: int = 0,
) -> jax.Array:
    """The sum in plain JAX.

    Args:
      bounds: ``int32[R + 1]``, ascending.
      columns: ``int32[E]``, rows of the table.
      table: ``[M, F]``, floating-point.
      *weights: nothing, or ``[E]``.
      capability: not used.

    Returns:
      ``[R, F]`` of the table's dtype.
    """
    del capability
    wide = compute_dtype(np.dtype(table.dtype))
    rows = bounds.shape[0] - 1
    terms = table[columns].astype(wide)
    for weight in weights:
        terms = terms * weight.astype(wide)[:, None]
    owner = jnp.searchsorted(bounds, jnp.arange(columns.shape[0]), side="right") - 1
    owner = jnp.where(owner < 0, rows, owner)  # in no row: dropped
    return jax.ops.segment_sum(terms, owner, num_segments=rows).astype(table.dtype)


def _kernel(
    bounds: jax.Array, columns: jax.Array, table: jax.Array, *weights: jax.Array, capability: int
) -> jax.Array:
    spec = kernel(
        bounds.shape[0] - 1,
        columns.shape[0],
        TensorType(table.shape, np.dtype(table.dtype)),
        weight=np.dtype(weights[0].dtype) if weights else None,
    )
    try:
        launch.precompile(spec, capability)
    except Exception as error:  # noqa: BLE001 - whatever the compiler stack raises, the program must still run
        first_line = (str(error).splitlines() or [""])[0]
        warnings.warn(
            "jevt: a sum of segments runs through XLA: its kernel did not compile:"
            f" {type(error).__name__}: {first_line}",
            JevtWarning,
            stacklevel=2,
        )
        return reference(bounds, columns, table, *weights)
    operands = (bounds, columns, table, *weights)
    (result,) = launch.call(spec, *operands, compute_capability=capability or None)
    return result


segment_order_p.def_impl(jax.jit(order))
segment_bounds_p.def_impl(jax.jit(bounds, static_argnames="rows"))
segment_sum_p.def_impl(jax.jit(reference, static_argnames="capability"))

mlir.register_lowering(segment_order_p, mlir.lower_fun(order, multiple_results=False))
mlir.register_lowering(segment_bounds_p, mlir.lower_fun(bounds, multiple_results=False))
mlir.register_lowering(segment_sum_p, mlir.lower_fun(reference, multiple_results=False))
mlir.register_lowering(
    segment_sum_p, mlir.lower_fun(_kernel, multiple_results=False), platform="cuda"
)
