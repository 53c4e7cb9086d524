"""Products of rows of two tables, which indices name: one sum an edge, or an edge and head.

    row_products:   i[E] j[E] a[M, H · D] b[N, H · D] -> [E, H]

    out[e, h] = Σ_d a[i[e], h, d] · b[j[e], h, d]

That is the gradient of the weights of a sum of segments, and of a sparse matrix's elements. Written
out, it looks up two arrays ``[E, H · D]`` first. On CUDA it is a kernel of
``jevt_kernels.row_products``, elsewhere equations of JAX. A pass puts it in, after differentiation
and batching, so it has no rules for either.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jevt import _jax_internals as internals
from jevt.primitives._define import compile_ahead, composite
from jevt.primitives.segments import type_of
from jevt_kernels import launch
from jevt_kernels.ops import compute_dtype
from jevt_kernels.row_products import row_products as kernel


def _type(
    i: Any,
    j: Any,
    a: Any,
    b: Any,
    *,
    heads: int,
    dtype: Any,
    fills: tuple[bool, bool],
    capability: int,
) -> Any:
    del fills, capability
    rows = i.ndim == 1 and i.shape == j.shape
    if not rows or a.ndim != 2 or a.shape[1:] != b.shape[1:] or a.shape[1] % heads:
        raise ValueError(
            "row_products: expected indices [E] and [E], and tables [M, F] and [N, F], F a multiple"
            f" of {heads}, got {i}, {j}, {a} and {b}"
        )
    return internals.array_like(a, (*i.shape, heads), np.dtype(dtype))


def reference(
    i: jax.Array,
    j: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    heads: int,
    dtype: Any,
    fills: tuple[bool, bool] = (False, False),
    capability: int = 0,
) -> jax.Array:
    """The products in plain JAX.

    Args:
      i: ``int32[E]``, rows of a.
      j: ``int32[E]``, rows of b.
      a: ``[M, F]``, floating-point.
      b: ``[N, F]``, floating-point.
      heads: H, parts of a row with a sum of their own.
      dtype: of the result.
      fills: whether rows may be beyond a, and beyond b; these count as rows of 0.
      capability: not used.

    Returns:
      ``[E, H]``.
    """
    del capability
    wide = compute_dtype(np.dtype(dtype))
    rows = []
    for index, table, may_miss in ((i, a, fills[0]), (j, b, fills[1])):
        found = table[index].astype(wide)
        if may_miss:
            inside = (index >= 0) & (index < table.shape[0])
            found = jnp.where(inside[:, None], found, 0)
        rows.append(found.reshape(-1, heads, table.shape[1] // heads))
    return (rows[0] * rows[1]).sum(2).astype(dtype)


def _kernel(
    *operands: jax.Array, heads: int, dtype: Any, fills: tuple[bool, bool], capability: int
) -> jax.Array:
    i, _, a, b = operands
    tables = (type_of(a), type_of(b))
    spec = kernel(i.shape[0], tables, heads=heads, dtype=np.dtype(dtype), fills=fills)
    if not compile_ahead([spec], capability, "products of rows run through XLA: their kernel"):
        return reference(*operands, heads=heads, dtype=dtype, fills=fills)
    (result,) = launch.call(spec, *operands, compute_capability=capability or None)
    return result


row_products_p = composite("row_products", _type, reference, _kernel, several=False)
