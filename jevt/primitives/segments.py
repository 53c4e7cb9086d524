"""Sums of segments: adding rows to the rows that indices name, without atomic additions.

    segment_order:   indices [E]                     -> order int32[E]
    segment_bounds:  indices [E] [order]             -> bounds int32[R + 1]
    segment_blocks:  bounds                          -> blocks int32[2, E // BLOCK]
    segment_sum:     bounds blocks columns[E] table[M, F] [weights[E] or [E, H]] -> [R, F]

``order`` sorts the indices, equal ones in their own order; positions ``bounds[r]`` to
``bounds[r + 1]`` of it are those whose index is r. An index below 0 or beyond R belongs to no row.
With ``columns`` in that order, row r of the result is Σ weights[e] · table[columns[e]], summed in
float32 and rounded once. Weights [E, H] are one for each of H equal parts of a row. ``blocks`` are
the positions that programs of their own add up where a row is long.

A pass puts them in the place of ``scatter-add``. On CUDA the sum is a kernel of
``jevt_kernels.segment_sum`` and the bounds are one of ``jevt_kernels.row_bounds``; the others, and
all elsewhere, are equations of JAX. They come after differentiation and batching, so they have no
rules for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from jevt import _jax_internals as internals
from jevt.primitives._define import compile_ahead, composite
from jevt_kernels import launch
from jevt_kernels.ops import compute_dtype
from jevt_kernels.row_bounds import row_bounds
from jevt_kernels.segment_sum import BLOCK, block_sums
from jevt_kernels.segment_sum import segment_sum as kernel
from jevt_kernels.spec import KernelSpec, TensorType

_INT32 = np.dtype("int32")

#: Fewest positions whose long rows are split: with fewer, no row is long for long.
SPLIT_FROM = 1 << 14

# A sum with its epilogue, see ``segment_epilogue.py``.
fused_segment_sum_p = Primitive("fused_segment_sum")
fused_segment_sum_p.multiple_results = True


def _order_type(indices: Any) -> Any:
    return internals.array_like(indices, indices.shape, _INT32)


def _bounds_type(indices: Any, *order: Any, rows: int, capability: int = 0) -> Any:
    del order, capability
    return internals.array_like(indices, (rows + 1,), _INT32)


def _blocks_type(bounds: Any, *, edges: int) -> Any:
    count = edges // BLOCK if edges >= SPLIT_FROM else 0
    return internals.array_like(bounds, (2, count), _INT32)


def sum_type(
    bounds: Any,
    blocks: Any,
    columns: Any,
    table: Any,
    *weights: Any,
    dtype: Any,
    fills: bool,
    capability: int,
) -> Any:
    """The type of a sum.

    Raises:
      ValueError: operands that do not belong together.
    """
    del blocks, fills, capability
    if (
        columns.ndim != 1
        or table.ndim != 2
        or any(w.shape[:1] != columns.shape or w.ndim > 2 for w in weights)
        or any(w.ndim == 2 and table.shape[1] % w.shape[1] for w in weights)
    ):
        raise ValueError(
            "segment_sum: expected columns [E], a table [M, F] and weights [E] or [E, H] if any, H"
            f" a divisor of F, got {columns}, {table} and {weights}"
        )
    return internals.array_like(table, (bounds.shape[0] - 1, table.shape[1]), np.dtype(dtype))


def order(indices: jax.Array) -> jax.Array:
    """Positions of the indices in ascending order, equal ones as they come."""
    return _sorted(indices)[1]


def _sorted(indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The indices in ascending order, and their positions."""
    positions = jnp.arange(indices.shape[0], dtype=_INT32)
    ascending, positions = jax.lax.sort_key_val(indices, positions, is_stable=True)
    return ascending, positions


def bounds(indices: jax.Array, *order: jax.Array, rows: int, capability: int = 0) -> jax.Array:
    """Where the positions of each row begin, and where the last row's end.

    Args:
      indices: ``[E]``.
      *order: what sorts them; nothing if they are sorted.
      rows: R.
      capability: not used.
    """
    del capability
    numbers = jnp.arange(rows + 1, dtype=indices.dtype)
    # A loop's steps are three kernels and two copies each.
    found = jnp.searchsorted(_ascending(indices, order), numbers, method="scan_unrolled")
    return found.astype(_INT32)


def _ascending(indices: jax.Array, order: Sequence[jax.Array]) -> jax.Array:
    """The indices, sorted: what sorts them has done so, and XLA makes one of both sorts."""
    return _sorted(indices)[0] if order else indices


def _bounds_kernel(
    indices: jax.Array, *order: jax.Array, rows: int, capability: int = 0
) -> jax.Array:
    if indices.dtype == _INT32 and indices.size > 0:
        spec = row_bounds(indices.size, rows)
        if compile_ahead((spec,), capability, "a search for rows runs through XLA: its kernel"):
            ascending = _ascending(indices, order)
            return launch.call(spec, ascending, compute_capability=capability or None)[0]
    return bounds(indices, *order, rows=rows)


def blocks(bounds: jax.Array, *, edges: int) -> jax.Array:
    """Where the blocks of positions that lie within one row begin and end.

    Args:
      bounds: ``int32[R + 1]``.
      edges: E, number of positions.

    Returns:
      ``int32[2, E // BLOCK]``; a block that is not within one row ends where it begins. No blocks
      where there are fewer positions than ``SPLIT_FROM``.
    """
    count = edges // BLOCK if edges >= SPLIT_FROM else 0
    first = jnp.arange(count, dtype=_INT32) * BLOCK
    ends = jnp.stack([first, first + (BLOCK - 1)])
    # Of each block's first and last position: how many rows begin there or before.
    begun = jnp.searchsorted(bounds, ends, side="right", method="scan_unrolled")
    within = (begun[0] == begun[1]) & (begun[0] > 0) & (begun[0] < bounds.shape[0])
    return jnp.stack([first, jnp.where(within, first + BLOCK, first)])


def reference(
    bounds: jax.Array,
    blocks: jax.Array,
    columns: jax.Array,
    table: jax.Array,
    *weights: jax.Array,
    dtype: Any,
    fills: bool = False,
    capability: int = 0,
) -> jax.Array:
    """The sum in plain JAX.

    Args:
      bounds: ``int32[R + 1]``, ascending.
      blocks: not used.
      columns: ``int32[E]``, rows of the table.
      table: ``[M, F]``, floating-point.
      *weights: nothing, or one array ``[E]`` or ``[E, H]``.
      dtype: of the result.
      fills: columns that are no row count as a row of 0.
      capability: not used.

    Returns:
      ``[R, F]``.
    """
    del blocks, capability
    wide = compute_dtype(np.dtype(dtype))
    rows = bounds.shape[0] - 1
    terms = table[columns].astype(wide)
    if fills:
        inside = (columns >= 0) & (columns < table.shape[0])
        terms = jnp.where(inside[:, None], terms, 0)
    for weight in weights:
        heads = weight.reshape(weight.shape[0], -1).astype(wide)
        terms = terms * jnp.repeat(heads, terms.shape[1] // heads.shape[1], axis=1)
    owner = jnp.searchsorted(bounds, jnp.arange(columns.shape[0]), side="right") - 1
    owner = jnp.where(owner < 0, rows, owner)  # in no row: dropped
    return jax.ops.segment_sum(terms, owner, num_segments=rows).astype(dtype)


def type_of(array: Any) -> TensorType:
    """The kernel operand that an array is."""
    return TensorType(array.shape, np.dtype(array.dtype))


def spec_of(operands: Sequence[Any], *, dtype: Any, fills: bool) -> KernelSpec:
    """The kernel of a sum.

    Args:
      operands: arrays or their types: bounds, blocks, columns, table, and weights if any.
      dtype: of the result.
      fills: whether columns may be no row.
    """
    bounds, blocks, columns, table, *weights = operands
    return kernel(
        bounds.shape[0] - 1,
        columns.shape[0],
        type_of(table),
        weight=type_of(weights[0]) if weights else None,
        dtype=np.dtype(dtype),
        fills=fills,
        blocks=blocks.shape[1] > 0,
    )


def call(spec: KernelSpec, operands: Sequence[Any], rest: Sequence[Any], capability: int) -> Any:
    """The results of a sum's kernel, and of the one before it that adds up blocks.

    Args:
      spec: made by :func:`spec_of`, perhaps with an epilogue.
      operands: as there.
      rest: what the epilogue reads.
      capability: compute capability, 0 for the device's.

    Returns:
      One array for each output of ``spec``; None, with a warning, where a kernel does not compile.
    """
    bounds, blocks, *others = operands
    split = blocks.shape[1] > 0
    kernels = (spec, block_sums(spec)) if split else (spec,)
    if not compile_ahead(kernels, capability, "a sum of segments runs through XLA: its kernel"):
        return None
    device = capability or None
    sums = (
        launch.call(block_sums(spec), blocks, *others, compute_capability=device) if split else ()
    )
    return launch.call(spec, bounds, *others, *sums, *rest, compute_capability=device)


def _kernel(*operands: jax.Array, dtype: Any, fills: bool, capability: int) -> jax.Array:
    results = call(spec_of(operands, dtype=dtype, fills=fills), operands, (), capability)
    return reference(*operands, dtype=dtype, fills=fills) if results is None else results[0]


segment_order_p = composite("segment_order", _order_type, order, several=False)
segment_bounds_p = composite("segment_bounds", _bounds_type, bounds, _bounds_kernel, several=False)
segment_blocks_p = composite("segment_blocks", _blocks_type, blocks, several=False)
segment_sum_p = composite("segment_sum", sum_type, reference, _kernel, several=False)
