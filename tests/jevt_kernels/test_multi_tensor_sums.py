"""Multi-tensor kernels that need sums of each member's tensors: LAMB's update and others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, codegen, interpreter, multi_tensor
from jevt_kernels.mainloops.multi_tensor import MAX_POINTERS
from jevt_kernels.mainloops.multi_tensor_sums import LARGEST
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel

SMALL = Config((("i", 16),), 1)


def lamb(w: Any, m: Any, g: Any, rate: Any) -> Any:
    wide, slope = w.astype(jnp.float32), g.astype(jnp.float32)
    m = 0.9 * m + 0.1 * slope
    update = m + 0.01 * wide
    norm, other = jnp.square(wide).sum(), jnp.square(update).sum()
    trust = jnp.where(other > 0, jnp.sqrt(norm) / jnp.sqrt(other), 1.0)
    return (wide - rate * trust * update).astype(w.dtype), m


def centred(w: Any, m: Any, g: Any, rate: Any) -> Any:
    """One sum; an operand that is not read before it is known; a result that does not need it."""
    return (w - jnp.exp(m).sum() * rate + g).astype(w.dtype), m + g


def shapes(shape: tuple[int, ...], dtype: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(s, d) for s, d in ((shape, dtype), (shape, np.float32))]


def one(function: Any, shape: tuple[int, ...], dtype: Any) -> KernelSpec:
    weight, moment = shapes(shape, dtype)
    rate = jax.ShapeDtypeStruct((), np.float32)
    return contract.build(function, weight, moment, weight, rate)


def several(function: Any, sizes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> KernelSpec:
    specs = [one(function, shape, dtype) for shape in sizes]
    operands = [[f"w{i}", f"m{i}", f"g{i}", "rate"] for i in range(len(sizes))]
    return multi_tensor.merge(specs, operands, "updates")


SHAPES = [(7, 5), (3,), (16,), (130, 3), (2, 2, 2)]


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, contract.BFLOAT16], ids=str)
@pytest.mark.parametrize("function", [lamb, centred])
def test_values(function: Any, dtype: Any) -> None:
    """Of tensors of one block and of many, ragged and not, against ``jax.jit`` of each."""
    spec = several(function, SHAPES, dtype)
    arrays = [contract.random(t.shape, t.dtype, seed) for seed, t in enumerate(spec.inputs)]
    expected: list[Any] = []
    for member in spec.members:
        w, m, g = (arrays[i] for i in sorted(i for i in member.inputs if i != 3))
        expected += jax.jit(function)(w, m, g, arrays[3])
    for config in (None, SMALL):
        got = interpreter.run(spec, *arrays, config=config)
        contract.same(got, [np.asarray(y) for y in expected])
    contract.same([np.asarray(y) for y in contract.referred(spec, *arrays)], got)


@pytest.mark.interpret
def test_in_place() -> None:
    """Only the last kernel writes, when sums are known."""
    spec = several(lamb, SHAPES)
    pairs = [
        zip(sorted({*m.inputs} - {3})[:2], sorted(m.outputs), strict=True) for m in spec.members
    ]
    aliased = dataclasses.replace(spec, aliases=tuple(pair for each in pairs for pair in each))
    arrays = [contract.random(t.shape, t.dtype, seed) for seed, t in enumerate(spec.inputs)]
    expected = interpreter.run(spec, *arrays, config=SMALL)
    contract.same(interpreter.run(aliased, *arrays, config=SMALL), expected)
    stages = codegen.generate(aliased, SMALL).stages
    assert stages is not None
    assert [len(step.spec.aliases) for step in stages.steps] == [0, 0, 2 * len(SHAPES)]


def test_three_kernels() -> None:
    spec = several(lamb, SHAPES)
    stages = codegen.generate(spec, SMALL).stages
    assert stages is not None
    parts, sums, rest = (step.spec for step in stages.steps)
    assert [t.shape for t in parts.outputs[::2]] == [(3,), (1,), (1,), (25,), (1,)]
    assert len(parts.outputs) == len(sums.inputs) == len(sums.outputs) == 2 * len(SHAPES)
    assert len(rest.inputs) == len(spec.inputs) + 2 * len(SHAPES)
    assert [t.shape for t in rest.outputs] == [s for shape in SHAPES for s in (shape, shape)]
    # A kernel reads what it needs only: of centred, m before the sum is known.
    (first, *_) = codegen.generate(several(centred, SHAPES), SMALL).stages.steps
    assert len(first.spec.inputs) == len(SHAPES)


def test_a_member_is_one_program_of_the_second_kernel() -> None:
    spec = several(lamb, [(LARGEST,), (32,)])
    stages = codegen.generate(spec).stages
    assert stages is not None
    second = codegen.generate(stages.steps[1].spec)
    assert second.grid == 2
    assert second.config == Config((("i", LARGEST // 2048),), 16)


@pytest.mark.aot
def test_compiled() -> None:
    stages = codegen.generate(several(lamb, [(1 << 22,), (1024,)], contract.BFLOAT16)).stages
    assert stages is not None
    for step in stages.steps:
        assert aot.compile(step.spec, 90).spill_bytes == 0


def norm_twice(w: Any, m: Any, g: Any, rate: Any) -> Any:
    """A sum that needs another."""
    return w / jnp.square(w / w.sum()).sum() + g + rate, m + w


def largest(w: Any, m: Any, g: Any, rate: Any) -> Any:
    return w / w.max() + g + rate, m + w


def total(w: Any, m: Any, g: Any, rate: Any) -> Any:
    return w.sum() * rate, m + g + w


def of_rows(w: Any, m: Any, g: Any, rate: Any) -> Any:
    return w - w.sum(-1, keepdims=True) * rate, m + g + w


@pytest.mark.parametrize("function", [norm_twice, largest, total, of_rows])
def test_what_is_not_flat(function: Any) -> None:
    assert multi_tensor.flat(one(function, (6, 8), np.float32)) is None


def test_what_is_too_large() -> None:
    assert multi_tensor.flat(one(lamb, (LARGEST + 1,), np.float32)) is None
    many = several(lamb, [(16,)] * 69)
    with pytest.raises(UnsupportedKernel, match=f"at most {MAX_POINTERS} pointers, got 484 with"):
        codegen.generate(many)
    codegen.generate(several(lamb, [(16,)] * 68))
