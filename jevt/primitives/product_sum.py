"""``product_sum``: several matrix products of one shape, added up.

    product_sum:   lhs₀ rhs₀ lhs₁ rhs₁ … -> Σ lhsᵢ · rhsᵢ

The gradient of what several layers read is such a sum. A kernel adds the products up where it
multiplies, and rounds once; left to XLA it is what the program said, a product after the other.

A pass puts it in, after differentiation and batching, so it has no rules for either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax import lax

from jevt import _jax_internals as internals
from jevt.primitives._define import composite

#: Of a ``dot_general``: the contracted axes of both operands, and the batch's.
type Dimensions = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


def _type(
    *operands: Any,
    dimension_numbers: tuple[Dimensions, ...],
    precision: Any,
    preferred_element_type: Any,
) -> Any:
    if len(operands) != 2 * len(dimension_numbers) or len(operands) < 4:
        raise ValueError(
            f"product_sum: expected two operands for each of {len(dimension_numbers)} products,"
            f" and two products at least, got {len(operands)} operands"
        )
    del precision
    results = [
        (_shape(lhs.shape, rhs.shape, dimensions), lhs.dtype, rhs.dtype)
        for lhs, rhs, dimensions in _terms(operands, dimension_numbers)
    ]
    if len(set(results)) > 1:
        raise TypeError(f"product_sum: expected products of one shape and type, got {results}")
    return internals.array_like(operands[0], results[0][0], preferred_element_type)


def _terms(
    operands: tuple[Any, ...], dimension_numbers: tuple[Dimensions, ...]
) -> Iterator[tuple[Any, Any, Dimensions]]:
    return zip(operands[::2], operands[1::2], dimension_numbers, strict=True)


def _shape(lhs: tuple[int, ...], rhs: tuple[int, ...], dimensions: Dimensions) -> tuple[int, ...]:
    (left, right), (batch, others) = dimensions
    return (
        *(lhs[d] for d in batch),
        *(size for d, size in enumerate(lhs) if d not in (*left, *batch)),
        *(size for d, size in enumerate(rhs) if d not in (*right, *others)),
    )


def reference(
    *operands: jax.Array,
    dimension_numbers: tuple[Dimensions, ...],
    precision: Any,
    preferred_element_type: Any,
) -> jax.Array:
    """The sum, in plain JAX.

    Args:
      *operands: the left and the right operand of each product, all of one type.
      dimension_numbers: of each product, as ``jax.lax.dot_general`` takes them.
      precision: of all of them.
      preferred_element_type: type of the products and of their sum.
    """
    total: jax.Array | None = None
    for lhs, rhs, dimensions in _terms(operands, dimension_numbers):
        product = lax.dot_general(
            lhs, rhs, dimensions, precision, preferred_element_type=preferred_element_type
        )
        # The product on the left: XLA has cuBLAS add the sum so far.
        total = product if total is None else product + total
    assert total is not None
    return total


product_sum_p = composite("product_sum", _type, reference, several=False)
