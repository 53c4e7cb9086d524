"""Arithmetic that bfloat16 allows to spare."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt.lowering import bfloat16
from jevt_kernels import interpreter, visitor
from jevt_kernels.index_map import IndexMap

BFLOAT16 = contract.BFLOAT16


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def gelu_gradient(x, g):
    return jax.vjp(gelu, x)[1](g)[0]


def tanh_gelu_gradient(x, g):
    return jax.vjp(jax.nn.gelu, x)[1](g)[0]


def scales(x, g):
    return 0.5 * (x * (g * 0.25)), 3 * (x * 0.7)


def shared(x, g):
    """Products and an erfc that more than one operation reads."""
    half, tail = 0.5 * x, jax.scipy.special.erfc(x * -0.75)
    return half * 0.25 * g, half * g, 0.5 * tail, tail


PROGRAMS = {
    "gelu": lambda x, g: gelu(x) * g,
    "gelu's gradient": gelu_gradient,
    "gradient of the approximation": tanh_gelu_gradient,
    "scales": scales,
    "shared": shared,
    "gaussian": lambda x, g: jnp.exp(-jnp.square(x * 0.7)) * g + jnp.exp(-(g * g)),
}


def ops_of(spec):
    return [node.op for node in spec.tree if isinstance(node, visitor.Compute)]


def values(dtype=BFLOAT16):
    x = np.concatenate([np.linspace(-9, 9, 1001), contract.random((500,)) * 3])
    return x.astype(dtype), contract.random(x.shape, dtype, seed=1)


@pytest.mark.interpret
@pytest.mark.parametrize("name", PROGRAMS)
def test_values(name: str) -> None:
    """Closer to float32 than what rounding each operation to bfloat16 gives."""
    operands = values()
    program = PROGRAMS[name]
    results = interpreter.run(contract.build(program, *operands), *operands)
    exact = jax.tree.leaves(jax.jit(program)(*(x.astype(np.float32) for x in operands)))
    rounded = jax.tree.leaves(program(*map(jnp.asarray, operands)))
    for got, want, other in zip(results, exact, rounded, strict=True):
        want = np.asarray(want, np.float64)
        error, others = (
            np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want)
            for x in (got, other)
        )
        assert error < 4e-3
        assert error <= others * 1.1


@pytest.mark.interpret
def test_tails_keep_their_digits() -> None:
    x = np.linspace(-8, -2, 301).astype(BFLOAT16)
    spec = contract.build(lambda x: jax.scipy.special.erfc(-x), x)
    (got,) = interpreter.run(spec, x)
    exact = jax.jit(jax.scipy.special.erfc)(-x.astype(np.float32))
    np.testing.assert_allclose(got.astype(np.float32), exact, rtol=5e-3)


@pytest.mark.interpret
def test_what_is_not_finite() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-38, -0.0], BFLOAT16)
    spec = contract.build(gelu, x)
    (got,) = interpreter.run(spec, x)
    np.testing.assert_array_equal(
        np.isnan(got.astype(np.float32)), np.isnan(jax.jit(gelu)(x).astype(np.float32))
    )
    np.testing.assert_array_equal(got[[0, 3]], x[[0, 3]])


LARGE = {
    "many constants": (lambda x, g: functools.reduce(lambda y, _: y * 250, range(18), x), 0.0, 1.0),
    "a large scale": (
        lambda x, g: jax.scipy.special.erfc(functools.reduce(lambda y, _: y * 250, range(18), x)),
        0.0,
        1.0,
    ),
    "a small scale": (
        lambda x, g: jax.scipy.special.erfc(functools.reduce(lambda y, _: y / 250, range(20), x)),
        1e31,
        1.0,
    ),
    "an erfc first": (lambda x, g: jax.lax.erfc(x) * x * 3 * x, 1e20, 1.0),
    "products within": (lambda x, g: (jax.lax.erfc(x) * g) * (x * 2), 3.0, 3e38),
    "large and small": (lambda x, g: 200 * (x * (g * 0.9)), 1e37, 1e-10),
    "halves": (lambda x, g: 0.5 * (x * (0.5 * g)), 3e38, 1.5),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", LARGE)
def test_nothing_overflows_on_the_way(name: str) -> None:
    function, x, g = LARGE[name]
    arguments = [np.full(3, value, BFLOAT16) for value in (x, g)]
    (got,) = interpreter.run(contract.build(function, *arguments), *arguments)
    want = jax.jit(function)(*arguments)
    np.testing.assert_allclose(got.astype(np.float64), np.asarray(want, np.float64), rtol=1e-2)


def test_a_gelu_is_two_operations() -> None:
    assert ops_of(contract.build(gelu, values()[0])) == ["scaled_erfc", "mul"]


def test_a_gradient_shares_its_exponential() -> None:
    ops = ops_of(contract.build(gelu_gradient, *values()))
    assert sorted(ops) == ["add", "gaussian", *["mul"] * 4, "neg", "scaled_erfc"]


def test_constants_are_multiplied_once() -> None:
    spec = contract.build(scales, *values())
    assert ops_of(spec).count("mul") == 3
    constants = [node.value for node in spec.tree if isinstance(node, visitor.Constant)]
    assert sorted(constants) == pytest.approx([0.125, 3 * float(BFLOAT16.type(0.7))])


def test_products_of_constants_alone() -> None:
    """Which the passes would have folded."""
    index = IndexMap((1,))
    nodes: list[visitor.Node] = [
        visitor.Load(0, index),
        visitor.Constant(0.5, BFLOAT16),
        visitor.Constant(0.25, BFLOAT16),
        visitor.Compute("mul", (1, 2), BFLOAT16),
        visitor.Compute("mul", (0, 3), BFLOAT16),
        visitor.Store(0, 4, index),
    ]
    *_, constant, product, store = bfloat16.shorten(nodes)
    assert constant == visitor.Constant(0.125, np.dtype("float32"))
    assert isinstance(product, visitor.Compute) and product.op == "mul"
    assert isinstance(store, visitor.Store)


def test_what_is_left_alone() -> None:
    """Float32 and float16, constants that might overflow a product, and shared products."""
    x, g = values(np.float32)
    assert "erfc" in ops_of(contract.build(gelu, x))
    assert "erfc" in ops_of(contract.build(gelu, x.astype(np.float16)))
    assert ops_of(contract.build(scales, x, g)).count("mul") >= 5

    def large(x, g):
        return 1e30 * (x * (g * 1e-30))

    assert ops_of(contract.build(large, *values())).count("mul") == 3
    ops = ops_of(contract.build(shared, *values()))
    assert ops.count("scaled_erfc") == 1
