"""Matrix products: every layout, type and odd size, with trees before and after, on the reference.

The same kernels run in the interpreter and, where there is one, on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import gemm_kernels as gemm
import jax
import kernel_contract as contract
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jevt_kernels import aot, codegen, interpreter, launch, printer
from jevt_kernels.index_map import IndexMap
from jevt_kernels.mainloops import product
from jevt_kernels.mainloops.gemm_configs import configs
from jevt_kernels.reference import reference
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel
from jevt_kernels.visitor import Compute, Contract, Iota, Load, Reduce, Store

BFLOAT16, FLOAT = contract.BFLOAT16, np.dtype("float32")


@pytest.mark.interpret
@pytest.mark.parametrize("name", gemm.CASES)
def test_in_the_interpreter(name: str) -> None:
    gemm.check(gemm.CASES[name], gemm.SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("name", gemm.CASES)
def test_on_a_gpu(name: str) -> None:
    spec = gemm.CASES[name]
    for config in dict.fromkeys([None, gemm.SMALL]):
        gemm.check(spec, config, launch.run)


INTEGERS = [
    (lhs, rhs, out, config)
    for lhs, rhs, out in (("bmk", "bkn", "bmn"), ("bkm", "kn", "mbn"), ("kmb", "nk", "bnm"))
    for config in (None, gemm.SMALL)
]


def check_integers(lhs: str, rhs: str, out: str, config: Config | None, run: Any) -> None:
    """Against NumPy, because XLA's products of int8 tensors were seen to be wrong on a GPU."""
    spec = gemm.product((2, 40, 33, 50), np.int8, lhs, rhs, out)
    x, y = gemm.operands(spec)
    (got,) = run(spec, x, y, config=config)
    expected = np.einsum(f"{lhs},{rhs}->{out}", x.astype(np.int32), y.astype(np.int32))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.interpret
@pytest.mark.parametrize(("lhs", "rhs", "out", "config"), INTEGERS)
def test_integers(lhs: str, rhs: str, out: str, config: Config | None) -> None:
    check_integers(lhs, rhs, out, config, interpreter.run)


@pytest.mark.gpu
@pytest.mark.parametrize(("lhs", "rhs", "out", "config"), INTEGERS)
def test_integers_on_a_gpu(lhs: str, rhs: str, out: str, config: Config | None) -> None:
    check_integers(lhs, rhs, out, config, launch.run)


VARIANTS = {
    "the default": None,
    "one group": dataclasses.replace(gemm.SMALL, group=1),
    "a group that divides the rows": dataclasses.replace(gemm.SMALL, group=3),
    "wide": Config((("m", 32), ("n", 64), ("k", 32))),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", VARIANTS)
def test_in_every_order_of_tiles(name: str) -> None:
    gemm.check(gemm.dgrad_gelu((2, 70, 70, 40), FLOAT), VARIANTS[name])


def epilogue_in_parts() -> tuple[KernelSpec, Config]:
    config = Config((("m", 32), ("n", 64), ("k", 32)), subtiles=4)
    return gemm.dgrad_gelu((2, 40, 70, 40), FLOAT), config


@pytest.mark.interpret
@pytest.mark.parametrize("splits", [2, 3, 16])
def test_parts_of_the_contracted_axis(splits: int) -> None:
    config = dataclasses.replace(gemm.SMALL, splits=splits)
    gemm.check(gemm.weight_gradient((2, 33, 40, 170)), config)
    (partial,) = codegen.generate(gemm.weight_gradient((2, 33, 40, 170)), config).partials
    assert (partial.programs, partial.op, partial.dtype) == (splits, "sum", FLOAT)


def update(sizes: tuple[int, int, int, int], layout: str = "bmn") -> KernelSpec:
    """A step down a weight gradient, in place, and the gradient itself in another layout."""
    b = gemm.tree(*sizes)
    half = b.compute("mul", b.load("bkm", BFLOAT16), b.constant(0.5), dtype=BFLOAT16)
    gradient = b.contract(half, b.load("bkn", BFLOAT16))
    step = b.compute("mul", gradient, b.load("", FLOAT))
    b.store(b.compute("sub", b.load(layout, FLOAT), step), layout, FLOAT)
    b.store(b.compute("mul", gradient, b.load("n", FLOAT)), "nbm", FLOAT)
    return b.spec("update", aliases=((3, 0),))


def several_contracted_axes() -> KernelSpec:
    b = gemm.GemmTree({"x": 40, "n": 33, "c": 1, "d": 6, "e": 7}, m="x", n="n", k="cde")
    number = b.add(Iota(IndexMap((0, 0, 0, 3, 1), 2), np.dtype("int32")))
    lhs = b.compute("mul", b.load("xdce", FLOAT), b.compute("convert", number))
    b.store(b.compute("tanh", b.contract(lhs, b.load("den", FLOAT))), "xn", FLOAT)
    return b.spec("several_contracted_axes")


SPLIT: dict[str, tuple[KernelSpec, int]] = {
    "update": (update((2, 33, 40, 165)), 3),
    "update of the transpose": (update((2, 33, 40, 165), "nbm"), 5),
    "several axes": (several_contracted_axes(), 2),
    "heads": (gemm.split_heads(), 4),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", SPLIT)
def test_split_with_an_epilogue(name: str) -> None:
    spec, splits = SPLIT[name]
    config = dataclasses.replace(gemm.SMALL, splits=splits)
    stages = codegen.generate(spec, config).stages
    assert stages is not None
    assert stages.steps[0].spec.outputs[0].shape[0] == splits
    gemm.check(spec, config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPLIT)
def test_split_with_an_epilogue_on_a_gpu(name: str) -> None:
    spec, splits = SPLIT[name]
    gemm.check(spec, dataclasses.replace(gemm.SMALL, splits=splits), launch.run)


@pytest.mark.interpret
def test_split_through_descriptors() -> None:
    config = dataclasses.replace(gemm.SMALL, splits=2, descriptors=True)
    spec = gemm.bias_residual((2, 40, 48, 96))
    source = codegen.generate(spec, config)
    assert source.stages is not None
    assert len(source.descriptors) == 2
    gemm.check(spec, config)


@pytest.mark.cuda_lowering
def test_split_lowers_to_two_kernels() -> None:
    spec, splits = SPLIT["update"]
    config = dataclasses.replace(gemm.SMALL, splits=splits)
    call = functools.partial(launch.call, spec, config=config, compute_capability=90)
    text = jax.jit(call).trace(*gemm.operands(spec)).lower(lowering_platforms=("cuda",)).as_text()
    first, second = (line for line in text.splitlines() if "@triton_kernel_call_ffi" in line)
    assert "operand_index" not in first
    assert "operand_index = 1" in second  # the weights; the step's size comes before them


@pytest.mark.interpret
def test_epilogue_in_parts() -> None:
    spec, config = epilogue_in_parts()
    gemm.check(spec, config)
    gemm.check(spec, dataclasses.replace(config, subtiles=2))


@pytest.mark.interpret
def test_every_reduction_in_parts() -> None:
    """Along n, each part of a tile leaves a partial result of its own."""
    spec = gemm.every_reduction((1, 40, 70, 40))
    config = Config((("m", 32), ("n", 64), ("k", 32)), subtiles=2)
    assert {p.programs for p in codegen.generate(spec, config).partials} == {2, 4, 8}
    gemm.check(spec, config)


AHEAD = {
    "residual": gemm.bias_residual((2, 40, 70, 40)),
    "gradient of a gelu": gemm.dgrad_gelu((2, 70, 40, 40), BFLOAT16),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", AHEAD)
@pytest.mark.parametrize("programs", [0, 3])
def test_epilogue_loaded_ahead(name: str, programs: int) -> None:
    config = dataclasses.replace(gemm.SMALL, ahead=True, programs=programs)
    text = codegen.generate(AHEAD[name], config).text
    assert text.index("ahead") < text.index("tl.dot")
    gemm.check(AHEAD[name], config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", AHEAD)
def test_epilogue_loaded_ahead_on_a_gpu(name: str) -> None:
    gemm.check(AHEAD[name], dataclasses.replace(gemm.SMALL, ahead=True), launch.run)


@pytest.mark.gpu
def test_parts_on_a_gpu() -> None:
    gemm.check(*epilogue_in_parts(), launch.run)
    gemm.check(
        gemm.weight_gradient((2, 333, 400, 5000)), Config(gemm.SMALL.blocks, splits=5), launch.run
    )


@pytest.mark.gpu
def test_every_configuration_gives_the_same_twice() -> None:
    spec = gemm.dgrad_gelu((2, 300, 520, 260))
    arrays = gemm.operands(spec)
    for config in configs(spec):
        first, second = (launch.run(spec, *arrays, config=config) for _ in range(2))
        for x, y in zip(first, second, strict=True):
            np.testing.assert_array_equal(x, y)
        gemm.check(spec, config, launch.run)


UNARY = ("exp", "tanh", "neg", "abs", "logistic", "square")
BINARY = ("add", "sub", "mul", "max", "min")


@st.composite
def trees(draw: Any) -> KernelSpec:
    """A product of random trees with a random tree of its result, stored and reduced."""
    # Few sizes, because the reference compiles its operations for each.
    sizes = draw(st.sampled_from([(2, 33, 20, 40), (1, 5, 36, 3), (1, 40, 1, 35)]))
    b = gemm.tree(*sizes)
    dtype = draw(st.sampled_from([np.dtype("float16"), FLOAT]))

    def tree(full: str, leaves: list[int], depth: int) -> int:
        """A value that varies along ``full``, of ``leaves`` and of new loads."""
        layouts = [full, full[::-1], full[1:], full[-1], ""]
        value = leaves[0] if leaves else b.load(full, dtype)
        for _ in range(depth):
            if draw(st.booleans()):
                value = b.compute(draw(st.sampled_from(UNARY)), value)
            else:
                other = b.load(
                    draw(st.sampled_from(layouts)), draw(st.sampled_from([dtype, FLOAT]))
                )
                pair = draw(st.permutations([value, other]))
                value = b.compute(draw(st.sampled_from(BINARY)), *pair)
            # Values stay of order one.
            value = b.compute("tanh", value, dtype=dtype)
        return value

    lhs = tree("bmk", [], draw(st.integers(0, 2)))
    rhs = tree("bkn", [], draw(st.integers(0, 2)))
    value = b.contract(lhs, rhs)
    value = tree("bmn", [value], draw(st.integers(0, 3)))
    for layout in draw(st.lists(st.sampled_from(["bmn", "nbm", "mnb"]), min_size=1, max_size=2)):
        b.store(value, layout, draw(st.sampled_from([FLOAT, np.dtype("float16")])))
    left = "bmn"
    value = b.compute("convert", value)
    for over in draw(st.sampled_from([(), ("m",), ("n",), ("m", "n"), ("n", "m")])):
        value = b.reduce(value, over)
        left = left.replace(over, "")
        b.store(value, left, FLOAT)
    return b.spec("random_trees")


@pytest.mark.interpret
@settings(max_examples=8, deadline=None, derandomize=True)
@given(trees())
def test_random_trees(spec: KernelSpec) -> None:
    gemm.check(spec, gemm.SMALL)


@pytest.mark.gpu
@settings(max_examples=25, deadline=None, derandomize=True)
@given(trees())
def test_random_trees_on_a_gpu(spec: KernelSpec) -> None:
    gemm.check(spec, gemm.SMALL, launch.run)


COMPILED: dict[str, KernelSpec] = {
    "bias, gelu": gemm.bias_gelu((1, 16384, 4096, 1024)),
    "bias, residual": gemm.bias_residual((1, 16384, 1024, 4096)),
    "gradient of gelu": gemm.dgrad_gelu((1, 16384, 4096, 1024)),
    "weight gradient": gemm.weight_gradient((1, 1024, 4096, 16384)),
    "prologue": gemm.prologue((1, 4096, 1024, 1024)),
    "heads": gemm.product((512, 512, 512, 64), BFLOAT16, "mbk", "nbk", "bmn", BFLOAT16),
    "odd": gemm.product((1, 1001, 1003, 999), BFLOAT16, "mk", "nk", "mn", BFLOAT16),
    "tf32": gemm.changed(
        gemm.product((1, 4096, 4096, 1024), FLOAT, "mk", "nk", "mn"), 2, precision="tf32"
    ),
    "float32": gemm.product((1, 4096, 4096, 1024), FLOAT, "mk", "kn", "mn"),
    "float64": gemm.product((1, 1024, 1024, 1024), "float64", "mk", "kn", "mn"),
    "int8": gemm.product((1, 4096, 4096, 1024), "int8", "mk", "nk", "mn"),
}


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(name: str, arch: int) -> None:
    binary = aot.compile(COMPILED[name], arch)
    assert binary.spill_bytes == 0
    assert binary.shared_bytes <= {80: 163, 90: 227}[arch] * 1024
    if name not in ("float32", "float64"):
        instruction = "wgmma.mma_async" if arch == 90 and name != "odd" else "mma"
        assert instruction in binary.ptx


def test_text(golden: Callable[[str, str], None]) -> None:
    golden("kernels/gemm_bias_gelu.py.txt", codegen.generate(COMPILED["bias, gelu"]).text)


def test_operands_reach_the_tensor_cores_as_they_are_stored() -> None:
    text = codegen.generate(gemm.bias_gelu((1, 512, 512, 512))).text
    (loop,) = re.findall(r"    for start .*?\n(?=    \S)", text, re.DOTALL)
    assert ".to(" not in loop
    assert "mask" not in text


def test_what_the_loop_needs_once_is_printed_before_it() -> None:
    text = codegen.generate(gemm.prologue((1, 64, 64, 64))).text
    before, loop = text.split("    for start in")
    assert "a1 = tl.load(x1 + m)" in before
    assert "tl.load(x1" not in loop


@pytest.mark.parametrize("layout", ["mk", "km"])
def test_offsets_beyond_32_bits(layout: str) -> None:
    spec = gemm.product((1, 1 << 18, 128, 1 << 14), "int8", layout, "kn", "mn")
    text = codegen.generate(spec).text
    assert "pid = tl.program_id(0).to(tl.int64)" in text
    assert "wide_start = tl.cast(start, tl.int64)" in text
    assert len(re.findall(r"_k_lane = .*\.to\(tl\.int64\)\n", text)) == 2
    assert " + start" not in text


@pytest.mark.interpret
def test_wide_offsets_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printer, "_INT32_MAX", 0)
    spec = gemm.bias_gelu(gemm.SIZES, FLOAT)
    source = codegen.generate(spec, gemm.SMALL)
    assert "wide_start" in source.text
    arrays = gemm.operands(spec)
    expected = reference(spec, *arrays)
    contract.same(interpreter.run(spec, *arrays, source=source), expected, 1e-4)


def test_partial_results_beyond_32_bits() -> None:
    spec = gemm.product((1, 1 << 15, 1 << 14, 1 << 14), BFLOAT16, "mk", "kn", "mn")
    assert "int64" not in codegen.generate(spec, gemm.SMALL).text
    assert "int64" in codegen.generate(spec, dataclasses.replace(gemm.SMALL, splits=8)).text


@pytest.mark.interpret
def test_a_long_odd_k_in_as_many_parts_as_fill_a_gpu() -> None:
    spec = gemm.product((1, 33, 40, 70001), BFLOAT16, "km", "kn", "mn")
    config = next(c for c in configs(spec) if c.splits >= 66 and not c.descriptors)
    gemm.check(spec, config)


def test_configurations() -> None:
    def first(spec: KernelSpec) -> Config:
        return configs(spec)[0]

    large = first(gemm.product((1, 16384, 4096, 1024), BFLOAT16, "mk", "kn", "mn"))
    assert dict(large.blocks) == {"m": 128, "n": 256, "k": 64}
    weight = first(gemm.product((1, 1024, 1024, 16384), BFLOAT16, "km", "kn", "mn"))
    assert weight.splits > 1
    assert first(gemm.dgrad_gelu((1, 1024, 1024, 16384))).splits == 1
    small = first(gemm.product((1, 20, 40, 30), FLOAT, "mk", "kn", "mn"))
    assert dict(small.blocks) == {"m": 32, "n": 32, "k": 32}


PLAIN = gemm.product((1, 64, 64, 64), FLOAT, "mk", "kn", "mn")
EVERY = gemm.every_reduction((1, 64, 64, 64))
(REDUCED,) = (i for i, n in enumerate(EVERY.tree) if isinstance(n, Reduce) and n.op == "max")


def without_contraction() -> KernelSpec:
    return dataclasses.replace(PLAIN, tree=(PLAIN.tree[0], Store(0, 0, PLAIN.tree[3].index)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dataclasses.replace(contract.reduction("sum", FLOAT, 4, 8), mainloop="gemm"), "tile axes"),
        (without_contraction(), "expected one matrix product in a GEMM for each axis of k; got 0"),
        (gemm.changed(PLAIN, 2, over="n"), "expected a contraction over 'k', got 'n'"),
        (gemm.changed(PLAIN, 2, rhs=0), "operand rhs of a product varies along 'm'"),
        (gemm.changed(PLAIN, 2, precision="fast"), "precision of ieee, tf32x3, tf32; got 'fast'"),
        (gemm.changed(PLAIN, 2, dtype=np.dtype("float64")), "got float32 to float64"),
        (gemm.product((1, 64, 64, 64), np.int16), "got int16 to int16"),
        (
            gemm.changed(gemm.product((1, 64, 64, 64), BFLOAT16), 2, precision="tf32"),
            "expected precision 'ieee' of a product of bfloat16",
        ),
        (gemm.changed(PLAIN, 3, operand=0), "an operand of a product is stored by the same kernel"),
        (gemm.changed(EVERY, REDUCED, over="batch"), "got 'max' along 'batch'"),
        (
            dataclasses.replace(EVERY, tree=(*EVERY.tree, Compute("neg", (REDUCED,), FLOAT))),
            "the result of a reduction beside a product is used",
        ),
        (dataclasses.replace(PLAIN, aliases=((0, 0),)), "output 0 takes the place of input 0"),
    ],
)
def test_what_cannot_be_generated(spec: KernelSpec, message: str) -> None:
    with pytest.raises(UnsupportedKernel, match=message):
        codegen.generate(spec)


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (EVERY, dataclasses.replace(gemm.SMALL, splits=2), "cannot be split into 2 parts"),
        (gemm.bias_gelu((1, 64, 64, 99)), dataclasses.replace(gemm.SMALL, splits=2), "cannot be"),
        (PLAIN, dataclasses.replace(gemm.SMALL, ahead=True), "the epilogue loads no full tiles"),
        (
            gemm.bias_residual((2, 40, 70, 40)),
            Config((("m", 32), ("n", 64), ("k", 32)), subtiles=2, ahead=True),
            "only an epilogue of whole tiles",
        ),
        (PLAIN, dataclasses.replace(gemm.SMALL, subtiles=4), "have no 4 parts along n"),
    ],
)
def test_wrong_configurations(spec: KernelSpec, config: Config, message: str) -> None:
    with pytest.raises(UnsupportedKernel, match=message):
        codegen.generate(spec, config)


def test_different_operand_types() -> None:
    spec = gemm.product((1, 64, 64, 64), FLOAT)
    inputs = (spec.inputs[0], dataclasses.replace(spec.inputs[1], dtype=BFLOAT16))
    with pytest.raises(UnsupportedKernel, match="of one type in a product, got float32 and bfloat"):
        codegen.generate(dataclasses.replace(spec, inputs=inputs))


def test_products_that_are_stored_as_they_are() -> None:
    def plain(spec: KernelSpec) -> bool:
        return product.is_plain(spec, product.find(spec))

    assert plain(PLAIN)
    assert not plain(EVERY)
    tree = (*PLAIN.tree[:3], Compute("convert", (2,), BFLOAT16), Store(0, 3, PLAIN.tree[3].index))
    assert plain(dataclasses.replace(PLAIN, tree=tree))
    tree = (*PLAIN.tree[:3], Compute("convert", (2,), np.dtype("int32")), *tree[4:])
    assert not plain(dataclasses.replace(PLAIN, tree=tree))


def test_two_products() -> None:
    tree = (*PLAIN.tree, Contract(0, 1, "k", FLOAT))
    with pytest.raises(UnsupportedKernel, match="got 2"):
        codegen.generate(dataclasses.replace(PLAIN, tree=tree))


def test_reduction_in_an_operand() -> None:
    load = Load(0, IndexMap((0, 64, 0, 1)))
    tree = (load, Reduce("max", 0, "m", FLOAT), PLAIN.tree[1], Contract(1, 2, "k", FLOAT))
    with pytest.raises(UnsupportedKernel, match="operand lhs of a product holds a reduction"):
        codegen.generate(dataclasses.replace(PLAIN, tree=(*tree, Store(0, 3, PLAIN.tree[3].index))))
