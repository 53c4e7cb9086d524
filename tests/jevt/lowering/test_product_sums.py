"""Sums of products are one kernel, with what is around them, and its terms keep their own k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from jax import lax

from jevt.lowering.errors import NotFusible
from jevt.primitives.product_sum import product_sum_p
from jevt_kernels import visitor

BFLOAT16 = contract.BFLOAT16


def added(*operands: Any, dimensions: Any = (((1,), (0,)), ((), ())), dtype: Any = None) -> Any:
    """The sum of the products of each two operands."""
    return product_sum_p.bind(
        *operands,
        dimension_numbers=(dimensions,) * (len(operands) // 2),
        precision=None,
        preferred_element_type=np.dtype(dtype or operands[0].dtype),
    )


def residual(r: Any, *operands: Any) -> Any:
    total = r + added(*operands)
    return total, total.astype(jnp.float32).sum(0)


def normalised(scale: Any, g: Any, a: Any, x: Any, b: Any) -> Any:
    return jnp.tanh(added(g * scale[:, None], a, x, b))


def heads(*operands: Any) -> Any:
    return added(*operands, dimensions=(((2, 3), (1, 2)), ((), ()))) * 2


def batched(*operands: Any) -> Any:
    return added(*operands, dimensions=(((2,), (2,)), ((0,), (0,))), dtype=np.float32) + 1


def transposed(*operands: Any) -> Any:
    """The result's rows are the right operand's."""
    return added(*operands).T * 0.5


def slices(w: Any, *others: Any) -> Any:
    """The right operands are parts of one weight."""
    third = w.shape[1] // len(others)
    parts = [w[:, i * third : (i + 1) * third].T for i in range(len(others))]
    return added(*(a for pair in zip(others, parts, strict=True) for a in pair))


def arrays(*shapes: tuple[int, ...], dtype: Any = BFLOAT16) -> tuple[np.ndarray, ...]:
    return tuple(contract.random(shape, dtype, seed) for seed, shape in enumerate(shapes))


GROUPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "plain": (added, arrays((33, 16), (16, 20), (33, 40), (40, 20), (33, 7), (7, 20))),
    "float16": (added, arrays((9, 5), (5, 4), (9, 6), (6, 4), dtype=np.float16)),
    "float32": (added, arrays((9, 5), (5, 4), (9, 6), (6, 4), dtype=np.float32)),
    "residual and sums": (residual, arrays((35, 24), (35, 16), (16, 24), (35, 48), (48, 24))),
    "prologue": (normalised, arrays((35,), (35, 16), (16, 24), (35, 8), (8, 24))),
    "heads": (heads, arrays(*[(2, 5, 3, 4), (7, 3, 4)] * 3)),
    "batched": (batched, arrays((3, 5, 8), (3, 6, 8), (3, 5, 4), (3, 6, 4))),
    "transposed": (transposed, arrays((35, 16), (16, 24), (35, 8), (8, 24))),
    "slices": (slices, arrays((24, 48), (35, 16), (35, 16), (35, 16))),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name: str) -> None:
    function, args = GROUPS[name]
    spec = contract.build(function, *args)
    assert spec.mainloop == "gemm"
    terms = [node for node in spec.tree if isinstance(node, visitor.Contract)]
    assert [node.over for node in terms] == ["k", "k1", "k2"][: len(terms)] and len(terms) > 1
    contract.same(contract.referred(spec, *args), expected(function, args), tolerance(args))


@pytest.mark.interpret
@pytest.mark.parametrize("name", GROUPS)
def test_kernels_of_groups(name: str) -> None:
    function, args = GROUPS[name]
    contract.check(function, *args, tolerance=tolerance(args))


def expected(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """In JAX sums so far are rounded; here only their total is."""
    return jax.tree.leaves(jax.jit(function)(*args))


def tolerance(args: tuple[Any, ...]) -> float | None:
    return None if args[-1].dtype == np.float32 else 1e-2


def test_one_operand_in_two_products() -> None:
    x, w, v = arrays((33, 16), (16, 20), (16, 20))
    function: Callable[..., Any] = lambda x, w, v: added(x, w, x, v)  # noqa: E731
    spec = contract.build(function, x, w, v)
    contract.same(contract.referred(spec, x, w, v), expected(function, (x, w, v)), 1e-2)


def test_a_product_beside_a_sum() -> None:
    x, w = arrays((16, 16), (16, 16))
    with pytest.raises(NotFusible, match="several matrix products"):
        contract.build(lambda x, w: added(x, w, w, x) + lax.dot(x, x), x, w)
