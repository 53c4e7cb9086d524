"""Groups to kernels: views, broadcasts, masks and reductions, never a wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
import random_groups
from hypothesis import event, given, settings
from jax import lax
from jax.extend.core import primitives

from jevt._jax_internals import iota_2x32_shape_p
from jevt.lowering.errors import NotFusible
from jevt_kernels import interpreter
from jevt_kernels.spec import Config, KernelSpec

X = contract.random((4, 6, 32))
SQUARE = contract.random((12, 12))
BIAS = contract.random((32,))

VIEWS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "heads": (lambda x: (x + 1).reshape(4, 6, 4, 8).transpose(0, 2, 1, 3) * 2, (X,)),
    "heads of an input": (lambda x: x.reshape(4, 6, 4, 8).transpose(0, 2, 1, 3) * 2, (X,)),
    "transpose": (lambda x: x.transpose(2, 1, 0) + 1, (X,)),
    "two orders": (lambda x: (x + 1, (x + 1).T), (SQUARE[:6],)),
    "slices": (lambda x: x[:, 1:5, ::-1] * x[:, 2:6, :], (X,)),
    "strided slice": (lambda x: x[::2, ::3, 1::5] + 1, (X,)),
    "flip": (lambda x: x[::-1, :, ::-1] - x, (X,)),
    "bias": (lambda x, b: x + b, (X, BIAS)),
    "outer": (lambda a, b: a[:, None] * b[None, :], (BIAS, X[0, :, 0])),
    "column": (lambda x, c: x * c[:, :, None], (X, X[..., 0])),
    "broadcast both ways": (lambda a, b: a + b, (X[:, :1], X[:1, :, :1])),
    "squeeze": (lambda x: x[:, None].squeeze(1) + x[..., None][..., 0], (X,)),
    "split and merged": (lambda x, y: x + y.reshape(24, 32).reshape(x.shape), (X, X)),
    "gated": (lambda x: jax.nn.silu(x[..., :16]) * x[..., 16:], (X,)),
    "scalars": (lambda x, s: jnp.where(s > 0, x * s, 1.0), (X, np.float32(2))),
    "broadcast of a scalar": (lambda s: jnp.full((5, 7), 2.0) * s, (np.float32(2),)),
    "a constant": (lambda s: (jnp.full((), 3.0) * jnp.float32(2), s + 1), (np.float32(2),)),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    function, arrays = VIEWS[name]
    contract.check(function, *arrays)


MASKS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda x: x + x.T,
    "symmetrised": lambda x: (jnp.tanh(x) + jnp.tanh(x.T)) / 2,
    "lower": jnp.tril,
    "lower and its transpose": lambda x: jnp.tril(x) + jnp.tril(x).T,
    "identity": lambda x: x * jnp.eye(12),
    "mask transposed": lambda x: jnp.where(jnp.tri(12, dtype=bool).T, x, 0.0),
    "band": lambda x: jnp.where(
        abs(lax.broadcasted_iota(int, x.shape, 0) - lax.broadcasted_iota(int, x.shape, 1)) < 3,
        x,
        -jnp.inf,
    ),
    "computed transposed": lambda x: (x * 2) + (x * 2).T,
    "flip of both": lambda x: x[::-1, ::-1].T + x,
    "rows and columns": lambda x: x[0][:, None] + x[0][None, :] + x[:, 0][:, None],
    "causal softmax": lambda x: jax.nn.softmax(
        jnp.where(jnp.tri(12, dtype=bool), x, -jnp.inf), axis=-1
    ),
    "heads of a square": lambda x: x.reshape(3, 4, 3, 4) + x.reshape(3, 4, 3, 4).swapaxes(0, 2),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", MASKS)
def test_diagonals(name: str) -> None:
    """Axes of equal size that mean different things."""
    contract.check(MASKS[name], SQUARE)


@pytest.mark.interpret
def test_random_bits() -> None:
    """Bit for bit ``jax.random.bits``, and dropout on it."""
    key = jax.random.wrap_key_data(np.array([17, 42], np.uint32))
    x = contract.random((6, 50))

    def dropout(k0: Any, k1: Any, x: Any) -> Any:
        words = primitives.threefry2x32_p.bind(k0, k1, *iota_2x32_shape_p.bind(shape=x.shape))
        bits = words[0] ^ words[1]
        return bits, jnp.where(bits < np.uint32(1 << 31), 2 * x, 0.0)

    spec = contract.check(dropout, np.uint32(17), np.uint32(42), x)
    bits, _ = interpreter.run(spec, np.uint32(17), np.uint32(42), x)
    np.testing.assert_array_equal(bits, jax.random.bits(key, x.shape))


REFUSALS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "slice of a value": (lambda x: (x + 1)[1:], (X,), "slice of a value computed in the same"),
    "flip of a value": (lambda x: (x + 1)[::-1], (X,), "rev of a value computed in the same"),
    "two shapes": (lambda x, y: (x + 1, y + 1), (X, BIAS), "does not run along every axis"),
    "two reductions": (
        lambda x: x.sum(-1)[..., None] + x.sum((1, 2))[:, None, None] + x,
        (X,),
        "neither the same nor complementary",
    ),
    "repeated reduction": (
        lambda x, y: x.sum(-1)[..., None] + y,
        (X, X[..., :7]),
        "repeated along an axis",
    ),
    "diagonal of a value": (lambda x: (lambda y: y + y.T)(x * 2), (SQUARE,), "a diagonal"),
    "diagonal of an iota": (
        lambda x: (lambda i: x * (i == i.T))(lax.broadcasted_iota(np.int32, (12, 12), 0)),
        (SQUARE,),
        "a diagonal",
    ),
    "diagonal inside a reduction": (
        lambda x: (lambda i: (i == i.T).sum(1) * x[0])(lax.broadcasted_iota(np.int32, (12, 12), 0)),
        (SQUARE,),
        "a diagonal",
    ),
    "no elements": (lambda x: x[:0] + 1, (X,), "without elements"),
    "merged and sliced": (lambda x: x.T.reshape(-1)[3:9] + 1, (SQUARE,), "slice of an axis"),
    "sizes that do not match": (lambda x: (x + 1).T.reshape(3, -1), (X[0],), "factor into common"),
    "too many operands": (lambda *xs: sum(xs), (BIAS,) * 70, "more than 64 operands"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    function, arrays, reason = REFUSALS[name]
    with pytest.raises(NotFusible, match=reason):
        contract.build(function, *arrays)


def tight(spec: KernelSpec) -> Config:
    """Tiles so small that everything is masked, repeated and looped."""
    whole = spec.mainloop == "columnwise"
    sizes = {t.name: 1024 if whole and t.name == "col" else 4 for t in spec.space.tile}
    return Config(tuple(sizes.items()))


def check_program(program: random_groups.Program) -> None:
    """The kernel is right in both configurations, or there is none."""
    arrays, expected = program.inputs(), program.expected()
    try:
        spec = contract.build(program, *arrays)
    except NotFusible as refusal:
        event(str(refusal)[:40])
        return
    event(f"{spec.mainloop}, {len(spec.space.tile)} tile axes")
    for config in (None, tight(spec)):
        for got, want in zip(interpreter.run(spec, *arrays, config=config), expected, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.interpret
@given(random_groups.programs())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_groups(program: random_groups.Program) -> None:
    check_program(program)


@given(random_groups.programs())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_random_groups_by_reference(program: random_groups.Program) -> None:
    arrays = program.inputs()
    try:
        spec = contract.build(program, *arrays)
    except NotFusible:
        return
    for got, want in zip(contract.referred(spec, *arrays), program.expected(), strict=True):
        np.testing.assert_array_equal(got, want)


def layer(x: Any, residual: Any, scale: Any, bias: Any) -> Any:
    """About forty equations: residual, layer norm, gelu."""
    x = x + residual
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    variance = (centred * centred).mean(-1, keepdims=True)
    y = centred * lax.rsqrt(variance + 1e-6) * scale + bias
    z = jax.nn.gelu(jax.nn.gelu(y))
    return x, z.astype(jnp.bfloat16), jax.nn.sigmoid(z)


def test_equal_groups_make_equal_kernels() -> None:
    first = contract.build(layer, X, X, BIAS, BIAS)
    second = contract.build(layer, X, X, BIAS, BIAS)
    assert first == second
    assert hash(first) == hash(second)
    assert first != contract.build(layer, X[:2], X[:2], BIAS, BIAS)


def test_equal_constants_are_one_node_and_signed_zeros_are_two() -> None:
    spec = contract.build(lambda x: (x + 0.0) * (x + -0.0) + 0.0, X)
    constants = [node.value for node in spec.tree if type(node).__name__ == "Constant"]
    assert sorted(map(str, constants)) == ["-0.0", "0.0"]
