"""Pointwise kernels: sizes, tiles, operands, types, aliases."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from jax import lax

from jevt.lowering.errors import NotFusible
from jevt_kernels import interpreter
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.mainloops import pointwise
from jevt_kernels.ops import TRITON_TYPES
from jevt_kernels.spec import Config, KernelSpec, TensorType
from jevt_kernels.visitor import Compute, Constant, Iota, Load, Store

pytestmark = pytest.mark.interpret

FLOAT32 = np.dtype("float32")


def chain(x: Any, y: Any) -> Any:
    return jnp.tanh(x * y + 0.5) - lax.max(x, y)


@pytest.mark.parametrize("size", [1, 2, 31, 1024, 1025, 5000])
def test_sizes(size: int) -> None:
    x, y = contract.random((size,)), contract.random((size,), seed=1)
    small = Config((("i", 64),))
    contract.check(chain, x, y, configs=(None, small))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (7, 1, 3)])
def test_shapes_with_ones(shape: tuple[int, ...]) -> None:
    contract.check(chain, contract.random(shape), contract.random(shape, seed=1))


def test_no_elements() -> None:
    """A spec may be empty; ``lowering`` leaves such groups to XLA, saying why."""
    index, empty = IndexMap((1,)), TensorType((0,), FLOAT32)
    spec = KernelSpec(
        name="nothing",
        mainloop="pointwise",
        space=Space((0,), (TileAxis("i", (0,)),)),
        tree=(Load(0, index), Store(0, 0, index)),
        inputs=(empty,),
        outputs=(empty,),
    )
    assert interpreter.run(spec, np.zeros(0, np.float32))[0].shape == (0,)
    with pytest.raises(NotFusible, match="an operand without elements"):
        contract.build(chain, np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32))


@pytest.mark.parametrize("shape", [(40, 70), (64, 64), (3, 200), (200, 3), (33, 1)])
def test_two_dimensional_tiles(shape: tuple[int, int]) -> None:
    """One operand is contiguous along the other axis."""
    x, y = contract.random(shape), contract.random(shape[::-1])
    spec = contract.check(lambda x, y: x + 2 * y.T, x, y, configs=(None,))
    if min(shape) > 1:
        assert [t.name for t in spec.space.tile] == ["i", "j"]
        configs = (*pointwise.configs(spec), Config((("i", 8), ("j", 4))))
        contract.check(lambda x, y: x + 2 * y.T, x, y, configs=configs)
    one_dimensional = contract.check(lambda x, y: x + 2 * y, x, x)
    assert [t.name for t in one_dimensional.space.tile] == ["i"]


def test_many_inputs_and_outputs() -> None:
    arrays = [contract.random((50,), seed=seed) for seed in range(30)]

    def function(*xs: Any) -> Any:
        return (sum(xs), *(x * y for x, y in itertools.pairwise(xs)))

    spec = contract.check(function, *arrays)
    assert len(spec.outputs) == 30


def test_outputs_of_several_types() -> None:
    x = contract.random((60,))
    contract.check(
        lambda x: (
            x > 0,
            x.astype(jnp.int8),
            x.astype(jnp.bfloat16),
            x.astype(jnp.float16),
            (x * 100).astype(jnp.uint32),
            (x * 10).astype(jnp.int16),
        ),
        x,
    )


@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=lambda d: d.name)
def test_every_type_passes_through(dtype: np.dtype) -> None:
    x, y = contract.random((77,), dtype), contract.random((77,), dtype, seed=1)
    spec = contract.check(lambda x, y: (jnp.where(x == y, x, y), x < y), x, y)
    assert spec.outputs[0].dtype == dtype


def test_select_and_clamp() -> None:
    x = contract.random((9, 8))
    which = (np.arange(72) % 3).astype(np.int32).reshape(9, 8)
    contract.check(lambda p, x: lax.select_n(p, x, -x), np.bool_(True), x)
    contract.check(lambda p, x: lax.select_n(p, x, -x, 2 * x), which, x)
    contract.check(lambda p, x: lax.select_n(p, x, -x, 2 * x), np.int32(2), x)
    contract.check(lambda x: lax.clamp(-0.5, x, 0.5), x)
    contract.check(lambda low, x: lax.clamp(low, x, 1.0), np.float32(-1), x)
    contract.check(lax.clamp, x - 1, x * 2, x + 1)


def test_broadcasting_both_ways() -> None:
    a, b = contract.random((6, 1, 5)), contract.random((1, 7, 1))
    contract.check(lambda a, b: (a * b, a + b), a, b)
    contract.check(lambda a, s: a * s + s, a, np.float32(3))
    contract.check(lambda a, v: a * v[None, :, None], contract.random((6, 7, 5)), b[0, :, 0])


def test_sums_of_half_precision_are_rounded_once() -> None:
    x = np.full((4,), 1, contract.BFLOAT16)
    spec = contract.build(lambda x: (x + jnp.bfloat16(2**-9)) + jnp.bfloat16(2**-9) - x, x)
    (got,) = interpreter.run(spec, x)
    np.testing.assert_array_equal(got.astype(np.float32), 2**-8)


def test_a_float16_that_overflows_is_not_finite() -> None:
    x = np.array([1, 255, 256, 300, np.inf, np.nan], np.float16)
    spec = contract.build(lambda x: (jnp.isfinite(x * x), x * x), x)
    finite, square = interpreter.run(spec, x)
    np.testing.assert_array_equal(finite, np.isfinite(square))
    np.testing.assert_array_equal(finite, [True, True, False, False, False, False])


@pytest.mark.parametrize("config", [None, Config((("i", 32),))])
def test_in_place(config: Config | None) -> None:
    """Both outputs overwrite an input that the other output needs."""
    x, y = contract.random((100,)), contract.random((100,), seed=1)

    def swap(x: Any, y: Any) -> Any:
        return x + 2 * y, x - y

    spec = dataclasses.replace(contract.build(swap, x, y), aliases=((0, 1), (1, 0)))
    contract.same(interpreter.run(spec, x, y, config=config), jax.jit(swap)(x, y))


def test_every_configuration_gives_the_same() -> None:
    x = contract.random((3000,))
    spec = contract.build(chain, x, x[::-1].copy())
    results = [
        interpreter.run(spec, x, x[::-1].copy(), config=config)[0]
        for config in pointwise.configs(spec)
    ]
    assert len(results) > 2
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_numbers_beyond_32_bits() -> None:
    """An offset that does not fit 32 bits is printed as a 64-bit number."""
    index = IndexMap((2**30,), 2**33)
    int64 = np.dtype("int64")
    spec = KernelSpec(
        name="far",
        mainloop="pointwise",
        space=Space((5,), (TileAxis("i", (0,)),)),
        tree=(
            Iota(index, int64),
            Constant(1, int64),
            Compute("add", (0, 1), int64),
            Store(0, 2, IndexMap((1,))),
        ),
        inputs=(),
        outputs=(TensorType((5,), int64),),
    )
    (got,) = interpreter.run(spec)
    np.testing.assert_array_equal(got, 2**33 + 1 + 2**30 * np.arange(5))
