"""One pointwise tree over many sets of tensors: numbers, types, in place, text, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from kernel_gallery import tensor

from jevt_kernels import aot, codegen, interpreter, launch, multi_tensor
from jevt_kernels.index_map import IndexMap, Space
from jevt_kernels.mainloops import MAINLOOPS
from jevt_kernels.mainloops.multi_tensor import MAX_POINTERS
from jevt_kernels.spec import Config, KernelSpec, Member, TensorType, UnsupportedKernel
from jevt_kernels.visitor import Iota, Load, Reduce, Store

BFLOAT16 = contract.BFLOAT16
FLOAT32 = np.dtype("float32")

#: Positions of AdamW's tensors among its operands; its results take the places of the first three.
WEIGHT, MEAN, SQUARE, GRADIENT, RATE, STEP = range(6)


def adamw(w: Any, m: Any, v: Any, g: Any, rate: Any, step: Any) -> Any:
    wide, slope = w.astype(jnp.float32), g.astype(jnp.float32)
    m = 0.9 * m + 0.1 * slope
    v = 0.999 * v + 0.001 * slope * slope
    update = m / (1 - 0.9**step) / (jnp.sqrt(v / (1 - 0.999**step)) + 1e-8) + 0.01 * wide
    return (wide - rate * update).astype(w.dtype), m, v


def one(size: int, dtype: Any = BFLOAT16, function: Callable[..., Any] = adamw) -> KernelSpec:
    """The kernel of one update: parameters and gradients of a type, moments in float32."""
    moments = (tensor(size),) * 2
    half = tensor(size, dtype=dtype)
    return contract.build(function, half, *moments, half, tensor(), tensor())


def several(sizes: Sequence[int], dtype: Any = BFLOAT16, *, in_place: bool = False) -> KernelSpec:
    """The update of tensors of any sizes, by hand: 0 and 1 too. Rate and step are shared."""
    flat = multi_tensor.flat(one(64, dtype))
    assert flat is not None
    inputs, outputs, members, aliases = [], [], [], []
    scalar = TensorType((), FLOAT32)
    kinds = (np.dtype(dtype), FLOAT32, FLOAT32, np.dtype(dtype))
    for size in sizes:
        at, to = len(inputs), len(outputs)
        inputs += [TensorType((size,), kind) for kind in kinds]
        outputs += [TensorType((size,), kind) for kind in kinds[:3]]
        places = [*range(at, at + 4), 4 * len(sizes), 4 * len(sizes) + 1]
        members.append(
            Member(size, tuple(places[i] for i in flat.inputs), tuple(to + o for o in flat.outputs))
        )
        aliases += [(at + i, to + i) for i in range(3)]
    return KernelSpec(
        name="updates",
        mainloop="multi_tensor",
        space=Space((max(sizes),), one(64).space.tile),
        tree=flat.tree,
        inputs=(*inputs, scalar, scalar),
        outputs=tuple(outputs),
        aliases=tuple(aliases) if in_place else (),
        members=tuple(members),
    )


def arrays(spec: KernelSpec) -> list[np.ndarray]:
    drawn = [contract.random(t.shape, t.dtype, seed) for seed, t in enumerate(spec.inputs)]
    drawn[-2:] = [np.float32(0.01), np.float32(3)]
    for member in spec.members:  # squares are not negative
        square = next(i for i in sorted(member.inputs)[2:3])
        drawn[square] = np.abs(drawn[square])
    return drawn


def expected(spec: KernelSpec, given: Sequence[Any]) -> list[Any]:
    """What ``jax.jit`` gives, one update after the other."""
    update = jax.jit(adamw)
    ranges = range(0, len(given) - 2, 4)
    return [x for at in ranges for x in update(*given[at : at + 4], *given[-2:])]


SIZES: dict[str, list[int]] = {
    "one": [1000],
    "two": [31, 2049],
    "none and one": [0, 1, 5, 0, 4096, 1],
    "sixty": [(31, 1, 128, 60)[k % 4] for k in range(60)],
    "equal": [128] * 9,
    "long and short": [9000, *range(1, 6)],
}


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_updates(sizes: list[int], dtype: Any) -> None:
    spec = several(sizes, dtype)
    given = arrays(spec)
    want = expected(spec, given)
    contract.same(contract.referred(spec, *given), want)
    for config in (None, Config((("i", 128),))):
        contract.same(interpreter.run(spec, *given, config=config), want)


@pytest.mark.interpret
def test_in_place_gives_the_same_bits() -> None:
    sizes = [3, 2048, 70, 1, 999]
    apart, together = several(sizes), several(sizes, in_place=True)
    given = arrays(apart)
    kept = [a.copy() for a in given]
    want = interpreter.run(apart, *given)
    for x, y in zip(interpreter.run(together, *given), want, strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(given, kept, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.interpret
def test_scalars_of_ones_own() -> None:
    """As LAMB's trust ratios: one a parameter, beside the rate that all share."""

    def scaled(w: Any, u: Any, ratio: Any, rate: Any) -> Any:
        return w - rate * (ratio * u)

    sizes = [5, 300, 64]
    specs = [contract.build(scaled, tensor(n), tensor(n), tensor(), tensor()) for n in sizes]
    operands = [(f"w{i}", f"u{i}", f"ratio{i}", "rate") for i, _ in enumerate(sizes)]
    spec = multi_tensor.merge(specs, operands, "scaled")
    assert len(spec.inputs) == 3 * len(sizes) + 1
    given = [contract.random(t.shape, t.dtype, seed) for seed, t in enumerate(spec.inputs)]
    rate = given[3]  # after the first one's own
    own = [given[:3], given[4:7], given[7:]]
    want = [jax.jit(scaled)(*xs, rate) for xs in own]
    contract.same(interpreter.run(spec, *given), want)
    contract.same(contract.referred(spec, *given), want)


@pytest.mark.interpret
def test_nan_and_infinity_stay_where_they_are() -> None:
    spec = several([40, 7])
    given = arrays(spec)
    given[GRADIENT][3], given[GRADIENT + 4][5] = np.nan, np.inf
    contract.same(interpreter.run(spec, *given), expected(spec, given))


def test_no_elements_at_all() -> None:
    spec = several([0, 0])
    given = [np.zeros(t.shape, t.dtype) for t in spec.inputs]
    assert [x.shape for x in interpreter.run(spec, *given)] == [(0,)] * 6


# What computes the same


def test_shapes_and_orders_of_operands_do_not_matter() -> None:
    def turned(step: Any, g: Any, v: Any, w: Any, rate: Any, m: Any) -> Any:
        return adamw(w, m, v, g, rate, step)[::-1]

    first = multi_tensor.flat(one(24))
    half, full = tensor(2, 3, 5, dtype=BFLOAT16), tensor(2, 3, 5)
    second = multi_tensor.flat(contract.build(turned, tensor(), half, full, half, tensor(), full))
    assert first is not None
    assert second is not None
    assert (first.key, first.tree) == (second.key, second.tree)
    assert (first.size, second.size) == (24, 30)
    places = {GRADIENT: 1, SQUARE: 2, WEIGHT: 3, MEAN: 5, RATE: 4, STEP: 0}
    assert second.inputs == tuple(places[i] for i in first.inputs)
    assert second.outputs == tuple(2 - o for o in first.outputs)


@pytest.mark.parametrize(
    ("function", "operands"),
    [
        (lambda x, b: x + b, (tensor(4, 8), tensor(8))),  # a row for every row
        (lambda x: x.T + 1, (tensor(4, 8),)),
        (lambda x: x[:3] + 1, (tensor(8),)),
        (lambda x: x + jnp.arange(8), (tensor(8),)),
        (lambda x: x * 2, (tensor(),)),
    ],
    ids=["broadcast", "transposed", "slice", "positions", "scalar"],
)
def test_what_depends_on_shapes_is_not_flat(function: Any, operands: Any) -> None:
    assert multi_tensor.flat(contract.build(function, *operands)) is None


@pytest.mark.parametrize(
    "others",
    [
        (lambda x, y: x - y, (tensor(8),) * 2),
        (lambda x, y: x + y, (tensor(8, dtype=BFLOAT16),) * 2),
        (lambda x, y: x + x + 0 * y, (tensor(8),) * 2),
    ],
    ids=["operation", "type", "operands"],
)
def test_what_computes_something_else_is_not_merged(others: Any) -> None:
    plus = contract.build(lambda x, y: x + y, tensor(8), tensor(8))
    with pytest.raises(ValueError, match="compute the same"):
        multi_tensor.merge([plus, contract.build(others[0], *others[1])], ["ab", "cd"], "both")


def test_zeros_of_both_signs_are_not_the_same() -> None:
    zeros = [contract.build(lambda x, z=z: jnp.where(x > 0, x, z), tensor(8)) for z in (0.0, -0.0)]
    with pytest.raises(ValueError, match="compute the same"):
        multi_tensor.merge(zeros, ["a", "b"], "both")


# Text and machine code


def test_text(golden: Callable[[str, str], None]) -> None:
    spec = several([1024, 1 << 22, 30528, 1024], in_place=True)
    golden("kernels/multi_tensor_adamw.py.txt", codegen.generate(spec).text)


def test_the_tree_is_printed_once() -> None:
    texts = [codegen.generate(several([4096] * n)).text for n in (2, 60)]
    assert [text.count("tl.sqrt_rn(") for text in texts] == [1, 1]
    assert [len(re.findall(r"\bif pid\b", text)) for text in texts] == [1, 59]


def test_programs_of_long_tensors_decide_early() -> None:
    """Three branches to the longest of sixty, however short the others are."""
    text = codegen.generate(several([*[1024] * 57, *[1 << 22] * 3])).text
    depths = {}
    for indent, name in re.findall(r"^( +)x0 = (x0_\d+)$", text, re.MULTILINE):
        depths[name] = len(indent) // 4 - 1
    assert max(depths[f"x0_{k}"] for k in (57, 58, 59)) <= 3
    assert max(depths.values()) <= 9


LAYER = [1 << 20] * 4 + [1 << 22] * 2 + [1024] * 9 + [4096]


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("sizes", [LAYER * 4, [30528, 16, 48]], ids=["64 members", "masked"])
def test_accesses_are_16_bytes_wide(sizes: list[int], arch: int) -> None:
    """Pointers and sizes keep their divisibility through the branches."""
    binary = aot.compile(several(sizes, in_place=True), arch)
    assert binary.spill_bytes == 0
    accesses = re.findall(r"(?:ld|st)\.global[.\w:]*", binary.ptx)
    scalars = [a for a in accesses if ".v" not in a]
    assert len(scalars) == 2, "rate and step"
    for access in set(accesses) - {*scalars}:
        lanes, bits = re.search(r"\.v(\d)", access), re.search(r"\.b(\d+)", access)
        assert lanes is not None, access
        assert bits is not None, access
        assert int(lanes[1]) * int(bits[1]) == 128, access


@pytest.mark.aot
@pytest.mark.parametrize("in_place", [False, True])
def test_registers_do_not_grow_with_the_members(in_place: bool) -> None:
    """As many pointers as a launch takes: a program holds those of its own member."""
    most = (MAX_POINTERS - 2) // (4 if in_place else 7)
    few, many = (
        aot.compile(several([1024, 4096] * (n // 2), in_place=in_place), 90) for n in (2, most)
    )
    assert many.spill_bytes == 0
    assert many.registers <= few.registers + 8


@pytest.mark.aot
def test_tensors_beyond_32_bits() -> None:
    tree, kind = (Load(0, IndexMap((1,))), Store(0, 0, IndexMap((1,)))), np.dtype("int8")
    sizes = (1 << 33, 100)
    types = tuple(TensorType((n,), kind) for n in sizes)
    members = tuple(Member(n, (k,), (k,)) for k, n in enumerate(sizes))
    tile = one(64).space.tile
    space = Space((max(sizes),), tile)
    spec = KernelSpec("copies", "multi_tensor", space, tree, types, types, members=members)
    text = codegen.generate(spec).text
    assert "tl.program_id(0).to(tl.int64)" in text
    assert f"tl.full((), {1 << 33}, tl.int64)" in text
    aot.compile(spec, 90)


@pytest.mark.cuda_lowering
def test_one_launch_with_all_in_place() -> None:
    spec = several(SIZES["sixty"], in_place=True)
    given = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in spec.inputs]
    call = functools.partial(launch.call, spec, compute_capability=90)
    text = jax.jit(call).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call_ffi") == 1
    assert text.count("operand_index = ") == 180


def test_costs_are_those_of_all_members() -> None:
    parts = [launch.cost_estimate(one(n)) for n in (64, 1000)]
    whole = launch.cost_estimate(several([64, 1000]))
    assert whole["flops"] == sum(part["flops"] for part in parts)
    assert whole["bytes_accessed"] == sum(part["bytes_accessed"] for part in parts) - 8


def test_a_member_as_a_kernel_of_its_own() -> None:
    spec = several([64, 1000], in_place=True)
    part = spec.member(1)
    assert part.mainloop == "pointwise"
    assert {t.size for t in part.inputs} == {1000, 1}
    assert len(part.aliases) == 3
    assert all(part.inputs[i] == part.outputs[o] for i, o in part.aliases)
    assert codegen.generate(part).grid == math.ceil(1000 / 1024)


# What cannot be generated


def _with(**fields: Any) -> Callable[[KernelSpec], KernelSpec]:
    return lambda spec: dataclasses.replace(spec, **fields)


def _second(**fields: Any) -> Callable[[KernelSpec], KernelSpec]:
    """The second member changed."""

    def change(spec: KernelSpec) -> KernelSpec:
        first, second = spec.members
        return dataclasses.replace(spec, members=(first, dataclasses.replace(second, **fields)))

    return change


def _first_node(node: Any) -> Callable[[KernelSpec], KernelSpec]:
    return lambda spec: dataclasses.replace(spec, tree=(*spec.tree[:-1], node, spec.tree[-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(members=()), "at least one member"),
        (_second(size=101), r"longest of at least one member, \(101,\)"),
        (_second(size=50), "expected a tensor of 50 elements, got"),
        (lambda s: _second(outputs=s.members[0].outputs)(s), "each output in one"),
        (lambda s: _second(inputs=s.members[0].inputs)(s), "each input in some member"),
        (_with(aliases=((1, 1),)), "expected members alike"),
        (_first_node(Iota(IndexMap((1,)), FLOAT32)), "in memory order, got Iota"),
        (_first_node(Reduce("argmax", 0, "i", FLOAT32)), "reductions of what varies and is none"),
        (_first_node(Load(1, IndexMap((2,)))), "in memory order, got Load"),
    ],
)
def test_refused(change: Callable[[KernelSpec], KernelSpec], message: str) -> None:
    with pytest.raises(UnsupportedKernel, match=message):
        codegen.generate(change(several([100, 64])))


def test_too_many_pointers_are_refused() -> None:
    with pytest.raises(UnsupportedKernel, match=f"at most {MAX_POINTERS} pointers, got 842"):
        codegen.generate(several([16] * 120))
    codegen.generate(several([16] * 119, in_place=True))


def test_an_input_of_several_members_is_not_overwritten() -> None:
    """Another member's program may read it later."""
    tree = (Load(0, IndexMap((1,))), Store(0, 0, IndexMap((1,))))
    kind = TensorType((8,), FLOAT32)
    members = (Member(8, (0,), (0,)), Member(8, (0,), (1,)))
    space = Space((8,), one(64).space.tile)
    spec = KernelSpec(
        "twice", "multi_tensor", space, tree, (kind,), (kind,) * 2, ((0, 0), (0, 1)), "", members
    )
    with pytest.raises(UnsupportedKernel, match="several members cannot be written in place"):
        codegen.generate(spec)


def test_blocks_are_no_longer_than_the_longest() -> None:
    spec = several([3, 50])
    assert {c.block("i") for c in MAINLOOPS["multi_tensor"].configs(spec)} == {64}
    assert codegen.generate(spec).grid == 2
