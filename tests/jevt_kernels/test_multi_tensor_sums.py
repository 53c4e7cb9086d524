"""Multi-tensor kernels with sums of each member's tensors: LAMB's update, norms, and others."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, codegen, interpreter, multi_tensor
from jevt_kernels.mainloops import multi_tensor_sums
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
    """Parts and sums are a tensor each, of which a member has its own part."""
    spec = several(lamb, SHAPES)
    stages = codegen.generate(spec, SMALL).stages
    assert stages is not None
    parts, sums, rest = (step.spec for step in stages.steps)
    blocks = [3, 1, 1, 25, 1]
    assert [t.shape for t in parts.outputs] == [(sum(blocks),)] * 2
    assert [m.size for m in sums.members] == blocks
    # The longest member comes first, those of one size in their order.
    assert [m.starts for m in sums.members] == [(n, n) for n in (25, 30, 28, 0, 29)]
    assert [t.shape for t in sums.outputs] == [(5,)] * 2
    assert len(rest.inputs) == len(spec.inputs) + 2
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


def number(w: Any, m: Any, g: Any, rate: Any) -> Any:
    """One that is made of no sum."""
    return rate * 2, m + g + w - w.sum()


def if_finite(w: Any, m: Any, g: Any, rate: Any) -> Any:
    """Numbers that are no floats are kept as another type."""
    return jnp.where(jnp.isfinite(g).all(), w - rate * g, w), m + g


def of_rows(w: Any, m: Any, g: Any, rate: Any) -> Any:
    return w - w.sum(-1, keepdims=True) * rate, m + g + w


@pytest.mark.parametrize("function", [norm_twice, number, if_finite, of_rows])
def test_what_is_not_flat(function: Any) -> None:
    assert multi_tensor.flat(one(function, (6, 8), np.float32)) is None


def test_what_is_too_large() -> None:
    assert multi_tensor.flat(one(lamb, (LARGEST + 1,), np.float32)) is None
    most = (MAX_POINTERS - 3) // 5  # a weight, a moment, a gradient and two results; rate and sums
    with pytest.raises(UnsupportedKernel, match=f"at most {MAX_POINTERS} pointers, got 483"):
        codegen.generate(several(lamb, [(16,)] * (most + 1)))
    codegen.generate(several(lamb, [(16,)] * most))


# Sums as results


def norm(x: Any) -> Any:
    return jnp.square(x.astype(jnp.float32)).sum()


def root(x: Any) -> Any:
    """A number that is made of two sums, and one of them."""
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).sum()
    return jnp.sqrt(square) / (1 + jnp.abs(wide).sum()), square


def unscaled(x: Any) -> Any:
    """A tensor beside its norm."""
    wide = x.astype(jnp.float32) / 8
    return wide, jnp.square(wide).sum()


def normed(x: Any) -> Any:
    """A tensor that needs the norm, and the norm."""
    wide = x.astype(jnp.float32)
    total = jnp.square(wide).sum()
    return wide / jnp.sqrt(total + 1), total, jnp.sqrt(total)


def largest(x: Any) -> Any:
    return jnp.abs(x).max()


def finite(x: Any) -> Any:
    return jnp.isfinite(x).all()


def count(x: Any) -> Any:
    return (x > 0).sum(dtype=jnp.int32)


OF_ONE = [norm, root, unscaled, normed, largest, finite, count]


def alone(function: Any, sizes: Sequence[tuple[int, ...]], dtype: Any = np.float32) -> KernelSpec:
    specs = [contract.build(function, jax.ShapeDtypeStruct(s, dtype)) for s in sizes]
    return multi_tensor.merge(specs, [[f"x{i}"] for i in range(len(sizes))], "sums")


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, contract.BFLOAT16], ids=str)
@pytest.mark.parametrize("function", OF_ONE)
def test_sums_alone(function: Any, dtype: Any) -> None:
    """By one program a member, and by several, whose parts another kernel combines."""
    spec = alone(function, SHAPES, dtype)
    arrays = [contract.random(t.shape, t.dtype, seed) for seed, t in enumerate(spec.inputs)]
    arrays[1][0] = np.inf if function is finite else 1
    expected = [np.asarray(y) for x in arrays for y in jax.tree.leaves(jax.jit(function)(x))]
    contract.same([np.asarray(y) for y in contract.referred(spec, *arrays)], expected)
    for config in (None, SMALL):
        contract.same(interpreter.run(spec, *arrays, config=config), expected)


@pytest.mark.interpret
def test_sums_are_as_exact_as_their_type() -> None:
    """Of float32 against float64, over many blocks; of float64 in float64."""
    shapes = [(3, 4001), (17,), (20000,)]
    arrays = [contract.random(s, np.float32, seed) for seed, s in enumerate(shapes)]
    exact = [np.square(x.astype(np.float64)).sum() for x in arrays]
    got = interpreter.run(alone(norm, shapes), *arrays, config=Config((("i", 256),), 1))
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    wide = [x.astype(np.float64) for x in arrays]
    with contract.types_of(*wide):
        spec = alone(lambda x: jnp.square(x).sum(), shapes, np.float64)
    got = interpreter.run(spec, *wide, config=Config((("i", 256),), 1))
    np.testing.assert_allclose(got, exact, rtol=1e-14)


@pytest.mark.interpret
def test_sums_of_sums_of_parts() -> None:
    """Where one program cannot hold a member's parts, they are summed up in turn."""
    source = codegen.generate(alone(norm, [(70000,), (5,)]), Config((("i", 2),), 1))
    sums = source.stages.steps[1].spec
    assert [m.size for m in sums.members] == [35000, 3]
    (again, _) = codegen.generate(sums).stages.steps
    assert [m.starts for m in again.spec.members] == [(0,), (35000,)]
    parts = np.full(35003, 0.5, np.float32)
    parts[35000:] = 2
    np.testing.assert_array_equal(interpreter.run(sums, parts), [17500, 6])


@pytest.mark.parametrize(
    ("function", "short", "long"),
    [(norm, 1, 2), (root, 1, 2), (unscaled, 1, 2), (normed, 3, 3), (largest, 1, 2)],
)
def test_launches(function: Any, short: int, long: int) -> None:
    assert multi_tensor.launches(alone(function, [(1 << 14,), (32,)])) == short
    assert multi_tensor.launches(alone(function, [(1 << 20,), (32,)])) == long


def test_two_kernels_for_all_that_have_pointers() -> None:
    """One for each operand, one for the parts of all."""
    count = MAX_POINTERS - 1
    spec = alone(norm, [(4096 * (1 + k % 9),) for k in range(count)])
    source = codegen.generate(spec)
    parts, sums = (step.spec for step in source.stages.steps)
    assert (len(parts.inputs), len(parts.outputs)) == (count, 1)
    assert (len(sums.inputs), len(sums.outputs)) == (1, count)
    assert source.grid == parts.outputs[0].size
    assert codegen.generate(sums).grid == count
    for step in source.stages.steps:
        assert "atomic" not in codegen.generate(step.spec).text, "in a fixed order"
    with pytest.raises(UnsupportedKernel, match=f"at most {MAX_POINTERS} pointers"):
        codegen.generate(alone(norm, [(40960,)] * (count + 1)))


@pytest.mark.parametrize("size", [64, 1 << 15], ids=["short", "long"])
@pytest.mark.parametrize("function", [*OF_ONE, lamb, centred])
def test_pointers_are_known_beforehand(function: Any, size: int) -> None:
    """Of as many members as a launch takes, and no fewer than it could take."""
    of_one = function in OF_ONE

    def made(count: int) -> KernelSpec:
        shapes = [(size,)] * count
        return alone(function, shapes) if of_one else several(function, shapes)

    def pointers(spec: KernelSpec) -> int:
        numbers = sum(t.size == 1 for t in spec.outputs)
        tensors = len(spec.outputs) - numbers
        return multi_tensor_sums.pointers(spec.tree, len(spec.inputs), tensors, numbers)

    least, most = (pointers(made(count)) for count in (1, 2))
    count = 1 + (MAX_POINTERS - least) // (most - least)
    launches = codegen.generate(made(count)).stages
    used = [len(s.spec.inputs) + len(s.spec.outputs) for s in launches.steps]
    assert MAX_POINTERS - (most - least) < max(used) <= pointers(made(count)) <= MAX_POINTERS


#: As many members as two launches take.
COUNTS = {norm: MAX_POINTERS - 1, unscaled: (MAX_POINTERS - 1) // 2}


@pytest.mark.interpret
@pytest.mark.parametrize("function", COUNTS)
def test_short_members_with_more_pointers_than_a_launch_takes(function: Any) -> None:
    """Which one program could reduce; the parts of each are then one number."""
    spec = alone(function, [(2 + k % 5,) for k in range(COUNTS[function])])
    assert len(spec.inputs) + len(spec.outputs) > MAX_POINTERS
    assert multi_tensor.launches(spec) == 2
    arrays = [contract.random(t.shape, t.dtype, seed) for seed, t in enumerate(spec.inputs)]
    expected = [np.asarray(y) for x in arrays for y in jax.tree.leaves(function(x))]
    contract.same(interpreter.run(spec, *arrays), expected)


@pytest.mark.parametrize(
    ("function", "dtype", "block"),
    [
        (norm, contract.BFLOAT16, 4096),
        (norm, np.float32, 2048),
        (unscaled, contract.BFLOAT16, 2048),
    ],
)
def test_programs_that_move_little_have_longer_blocks(
    function: Any, dtype: Any, block: int
) -> None:
    spec = alone(function, [(1 << 20,), (1 << 18,)], dtype)
    assert codegen.generate(spec).config == Config((("i", block),), 4)


def test_what_is_written_beside_sums_is_written_at_once() -> None:
    """In place, too."""
    spec = alone(unscaled, [(1 << 20,), (1 << 18,)])
    pairs = tuple((m.inputs[0], m.outputs[k]) for m in spec.members for k in _full(spec))
    aliased = dataclasses.replace(spec, aliases=pairs)
    parts, sums = (step.spec for step in codegen.generate(aliased).stages.steps)
    assert len(parts.aliases) == 2
    assert sums.aliases == ()
    assert [t.shape for t in parts.outputs[1:]] == [(1 << 20,), (1 << 18,)]


def _full(spec: KernelSpec) -> list[int]:
    """The outputs of a member that have more than one element."""
    first = spec.members[0]
    return [k for k, output in enumerate(first.outputs) if spec.outputs[output].size > 1]


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_sums_compiled(arch: int) -> None:
    """Without spills, in wide loads, and with few registers for however many members."""
    spec = alone(norm, [((1 << 22) >> (k % 12),) for k in range(48)], contract.BFLOAT16)
    parts, sums = (aot.compile(step.spec, arch) for step in codegen.generate(spec).stages.steps)
    assert parts.spill_bytes == sums.spill_bytes == 0
    assert parts.registers <= 64
    assert "ld.global.v4.b32" in re.sub(r"ld\.global\.(?!v)\w+\.", "ld.global.", parts.ptx)
