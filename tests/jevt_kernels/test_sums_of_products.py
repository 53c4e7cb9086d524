"""Sums of matrix products in one kernel: every loop, on the reference and on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import gemm_kernels as gemm
import jax
import numpy as np
import pytest
import sums_of_products as sums

from jevt_kernels import aot, codegen, compat, interpreter, launch, limits
from jevt_kernels.index_map import Space, TileAxis
from jevt_kernels.mainloops import gemm_configs, product
from jevt_kernels.mainloops.terms import MOST_TERMS
from jevt_kernels.reference import reference
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel
from jevt_kernels.visitor import Compute, Reduce

BFLOAT16, FLOAT = gemm.BFLOAT16, gemm.FLOAT


@pytest.mark.interpret
@pytest.mark.parametrize("name", sums.CASES)
def test_in_the_interpreter(name: str) -> None:
    gemm.check(sums.CASES[name], gemm.SMALL)


def check_exactly(run: Any) -> None:
    """Against sums of NumPy's in float64, of layouts that differ between the terms."""
    spec = sums.plain((2, 33, 40), (50, 35, 20), FLOAT, sums.MIXED)
    arrays = gemm.operands(spec)
    letters = ("bmk,kn", "bxm,bnx", "myb,ny")
    pairs = zip(letters, arrays[::2], arrays[1::2], strict=True)
    want = sum(np.einsum(f"{axes}->bmn", x, y, dtype=np.float64) for axes, x, y in pairs)
    (got,) = run(spec, *arrays)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_reference() -> None:
    check_exactly(reference)


@pytest.mark.interpret
def test_exactly() -> None:
    check_exactly(lambda *arguments: interpreter.run(*arguments, config=gemm.SMALL))


@pytest.mark.gpu
def test_exactly_on_a_gpu() -> None:
    check_exactly(launch.run)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sums.CASES)
def test_on_a_gpu(name: str) -> None:
    for config in (None, gemm.SMALL):
        gemm.check(sums.CASES[name], config, launch.run)


#: Sizes whose rows are multiples of 16 bytes in every type and layout.
ALIGNED = (2, 80, 48)
KS = (96, 64, 48)
DESCRIBED = dataclasses.replace(gemm.SMALL, descriptors=True)

DESCRIBABLE: dict[str, tuple[KernelSpec, int]] = {
    "three terms": (sums.residual(ALIGNED, KS, BFLOAT16, sums.MIXED), 5),
    "ends": (sums.residual((1, 33, 40), (48, 16), FLOAT), 4),
    "one is computed": (sums.prologues(ALIGNED, KS), 2),
    "one is empty": (sums.residual(ALIGNED, (64, 0)), 2),
    "rows along k": (sums.plain(ALIGNED, (96, 64), sums.BFLOAT16), 4),
}
WALKING = {
    "descriptors": DESCRIBED,
    "programs that walk": dataclasses.replace(DESCRIBED, programs=4),
    "pointers that walk": dataclasses.replace(gemm.SMALL, programs=4),
    "parts": Config((("m", 32), ("n", 64), ("k", 32)), subtiles=2, descriptors=True),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", DESCRIBABLE)
def test_descriptors(name: str) -> None:
    spec, count = DESCRIBABLE[name]
    gemm.check_descriptors(spec, DESCRIBED, count)


@pytest.mark.interpret
@pytest.mark.parametrize("name", WALKING)
def test_every_loop(name: str) -> None:
    for case in ("three terms", "rows along k"):
        gemm.check(DESCRIBABLE[case][0], WALKING[name])


@pytest.mark.interpret
def test_epilogue_loaded_ahead() -> None:
    gemm.check(DESCRIBABLE["three terms"][0], dataclasses.replace(DESCRIBED, ahead=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", DESCRIBABLE)
def test_every_loop_on_a_gpu(name: str) -> None:
    for config in WALKING.values():
        gemm.check(DESCRIBABLE[name][0], config, launch.run)


def test_one_loop_a_term_into_one_accumulator() -> None:
    spec = sums.residual((2, 33, 40), (31, 64, 33), BFLOAT16, sums.MIXED)
    text = codegen.generate(spec, gemm.SMALL).text
    assert text.count("for start in") == text.count("acc = tl.dot(") == 3
    assert text.count("tl.zeros(") == 1
    # Nobody adds up what is in the accumulator already, and steps end where each term does.
    assert "lhs_k_ok = lhs_k < 31" in text and "lhs_k2_ok = lhs_k2 < 33" in text
    assert "lhs_k1_ok" not in text
    empty = codegen.generate(sums.CASES["one is empty"], gemm.SMALL).text
    assert empty.count("for start in") == 2


def test_work_is_that_of_all_terms() -> None:
    estimate = launch.cost_estimate(sums.plain((2, 3, 4), (5, 6, 7), FLOAT))
    additions = 2 * 3 * 4 * 2
    assert estimate["flops"] == 2 * 2 * 3 * 4 * (5 + 6 + 7) + additions


# Specialised kernels


SPECIALIZED = {
    "cooperative": gemm.specialized("cooperative", 128, 256, 4, subtiles=2),
    "one group": gemm.specialized("cooperative", 64, 64, 4, stages=4),
    "pingpong": gemm.specialized("pingpong", 128, 128, 4, stages=4, subtiles=2),
    "wide pingpong": gemm.specialized("pingpong", 128, 128, 8, stages=4, subtiles=4),
    "overlapped": gemm.specialized("overlapped", 128, 128, 4, stages=4, subtiles=4),
    "more pieces than steps": gemm.specialized("overlapped", 64, 128, 4, subtiles=8),
}
#: Rows, columns and k that fill no tile, but whose strides are multiples of 16 bytes.
SIZES = (2, 304, 264)
#: Of both operands of each term, so that tiles of neighbours lie in the ring in two ways each.
LAYOUTS: tuple[sums.Layouts, ...] = (("bmk", "kn"), ("bmk", "nk"), ("bkm", "nk"), ("mk", "bnk"))
RINGS: dict[str, KernelSpec] = {
    "plain": sums.plain(SIZES, (200, 72), BFLOAT16),
    "residual": sums.residual(SIZES, (200, 40, 136)),
    "gradient of gelu": sums.gelu_gradient(SIZES, (128, 200)),
    "float16": sums.residual(SIZES, (64, 64), np.dtype("float16")),
    "transposed": sums.plain(SIZES, (72, 200), BFLOAT16, [("bkm", "bnk")] * 2, BFLOAT16),
    "one is empty": sums.residual(SIZES, (0, 200, 72)),
    "layouts": sums.residual(SIZES, (200, 72, 40, 136), BFLOAT16, LAYOUTS),
    "layouts rounded": sums.plain(
        SIZES, (200, 40), BFLOAT16, [("bmk", "kn"), ("bkm", "nk")], BFLOAT16
    ),
    "batch axes": sums.plain(SIZES, (72, 200), BFLOAT16, [("bmk", "nk"), ("mk", "bnk")], BFLOAT16),
    "eight terms": sums.plain(SIZES, (8, 16, 24, 32, 40, 200, 56, 64), BFLOAT16),
}


#: Pieces of the steps of "layouts rounded", cut where the second term begins.
PIECES = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))


@pytest.fixture
def sm_90() -> None:
    """Skips the test on GPUs without the instructions."""
    if compat.local_compute_capability() != 90:
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("name", RINGS)
def test_specialized_on_a_gpu(name: str, sm_90: None) -> None:
    for launched in SPECIALIZED.values():
        gemm.check(RINGS[name], launched, launch.run)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 132])
def test_few_and_many_programs_on_a_gpu(programs: int, sm_90: None) -> None:
    for kind in ("cooperative", "pingpong", "overlapped"):
        launched = dataclasses.replace(SPECIALIZED[kind], programs=programs)
        gemm.check(RINGS["residual"], launched, launch.run)


@pytest.mark.parametrize("kind", SPECIALIZED)
def test_terms_follow_one_another_through_the_ring(kind: str) -> None:
    """Whoever multiplies knows of one long product; the loading warp has a loop for each term."""
    spec, one = RINGS["residual"], gemm.bias_residual((2, 304, 264, 64 * (4 + 1 + 3)))
    loading, computing = (
        codegen.generate(spec, SPECIALIZED[kind]).text.split("@gluon.jit")[part] for part in (1, 2)
    )
    assert [f"for step in range({steps}):" in loading for steps in (4, 1, 3)] == [True] * 3
    assert loading.count("async_copy_global_to_shared(") == 6
    assert "slot = 0\n" in loading and loading.count("slot = 0\n") == 1
    whole = codegen.generate(one, SPECIALIZED[kind]).text.split("@gluon.jit")[2]

    def steps(text: str) -> list[str]:
        return [line for line in text.splitlines() if "step" in line]

    assert len(steps(computing)) == len(steps(whole)) > 0
    assert [line for line in steps(computing) if "for" in line] == [
        line for line in steps(whole) if "for" in line
    ]


@pytest.mark.parametrize("kind", ["cooperative", "pingpong"])
def test_tiles_that_lie_otherwise_are_multiplied_in_a_loop_of_their_own(kind: str) -> None:
    source = codegen.generate(RINGS["layouts"], SPECIALIZED[kind])
    loading, computing, whole = source.text.split("@gluon.jit")[1:]
    loops = ["range(4)", "range(4, 6)", "range(6, 7)", "range(7, 10)"]
    for loop in loops:
        assert f"for step in {loop}:" in computing
    assert computing.count("warpgroup_mma(") == 4
    # One memory for each operand, a name for each order of its axes and for a batch axis.
    assert whole.count("allocate_shared_memory(tl.bfloat16") == 2
    views = re.findall(r"(\w+) = (\w+)\._reinterpret", whole)
    assert views == [
        ("rhs1_tiles", "rhs_tiles"),
        ("lhs2_tiles", "lhs_tiles"),
        ("lhs3_tiles", "lhs_tiles"),
        ("rhs3_tiles", "rhs_tiles"),
    ]
    assert loading.count("barrier, rhs1_tiles") == 2  # of the second and the third term
    same = codegen.generate(RINGS["residual"], SPECIALIZED[kind]).text
    assert "_reinterpret" not in same and same.count("warpgroup_mma(") == 1


def test_pieces_between_steps_of_several_terms() -> None:
    text = codegen.generate(RINGS["layouts rounded"], SPECIALIZED["overlapped"]).text
    between = text[text.index("for pid in", text.index("_compute(")) :]
    between = between[: between.index("pid = tl.program_id(0)")]
    steps = [line.strip() for line in between.splitlines() if "for step" in line]
    # Four steps of the first term and one of the second, in four pieces.
    assert steps == [f"for step in range({first}, {end}):" for first, end in PIECES]


#: As large as in training: three gradients of what queries, keys and values are made of.
LARGE = sums.residual((1, 16384, 1024), (1024,) * 3, sums=False)
COMPILED = {
    "cooperative": dataclasses.replace(
        gemm.specialized("cooperative", 128, 256, 4, 4, 2), programs=132
    ),
    "pingpong": dataclasses.replace(gemm.specialized("pingpong", 128, 128, 4, 5, 2), programs=132),
}


@pytest.mark.aot
@pytest.mark.parametrize("kind", COMPILED)
def test_specialized_compiles_without_spills(kind: str) -> None:
    binary = aot.compile(LARGE, 90, config=COMPILED[kind])
    assert binary.spill_bytes == binary.scratch_bytes == 0
    assert "wgmma.mma_async" in binary.ptx and "setmaxnreg" in binary.ptx
    found = product.find(LARGE)
    assert binary.shared_bytes <= gemm_configs.shared_bytes(LARGE, found, COMPILED[kind])


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("kind", ["cooperative", "pingpong", ""])
def test_lowers_for_cuda(kind: str) -> None:
    spec = RINGS["residual"]
    chosen = SPECIALIZED[kind] if kind else DESCRIBED
    call = functools.partial(launch.call, spec, config=chosen, compute_capability=90)
    text = jax.jit(call).trace(*gemm.operands(spec)).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = [line for line in text.splitlines() if "@triton_kernel_call_ffi(" in line]
    (arguments,) = re.findall(r"@triton_kernel_call_ffi\((.*?)\)", line)
    assert arguments.count("%") == len(spec.inputs) + 6  # six descriptors


@pytest.mark.aot
@pytest.mark.parametrize("kind", ["cooperative", "wide pingpong", "overlapped"])
def test_layouts_compile_without_spills(kind: str) -> None:
    spec = RINGS["layouts rounded" if kind == "overlapped" else "layouts"]
    binary = aot.compile(spec, 90, config=SPECIALIZED[kind])
    assert binary.spill_bytes == 0
    # Both names of the ring are the same memory.
    found = product.find(spec)
    assert binary.shared_bytes <= gemm_configs.shared_bytes(spec, found, SPECIALIZED[kind])


@pytest.mark.aot
@pytest.mark.parametrize("kind", ["overlapped", "cooperative"])
def test_eight_terms_compile_without_spills(kind: str) -> None:
    """The loading warp has few registers, and sixteen descriptors."""
    binary = aot.compile(RINGS["eight terms"], 90, config=SPECIALIZED[kind])
    assert binary.spill_bytes == 0


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_defaults_compile_without_spills(arch: int) -> None:
    binary = aot.compile(LARGE, arch)
    assert binary.spill_bytes == 0
    assert binary.shared_bytes <= {80: 163, 90: 227}[arch] * 1024


@pytest.mark.aot
@pytest.mark.parametrize("programs", [0, 132])
def test_loops_of_descriptors_compile_without_spills(programs: int) -> None:
    blocks = (("m", 128), ("n", 256), ("k", 64))
    launched = Config(blocks, 8, 4, programs=programs, subtiles=2, descriptors=True)
    binary = aot.compile(LARGE, 90, config=launched)
    assert "cp.async.bulk.tensor" in binary.ptx and "wgmma.mma_async" in binary.ptx
    assert binary.spill_bytes == binary.scratch_bytes == 0
    assert binary.shared_bytes <= gemm_configs.shared_bytes(LARGE, product.find(LARGE), launched)


# Which configurations there are


@pytest.mark.parametrize(
    ("spec", "one"),
    [
        (LARGE, gemm.bias_residual((1, 16384, 1024, 3072))),
        (
            sums.plain((1, 16384, 1024), (1024,) * 3, BFLOAT16, [("bmk", "kn")] * 3, BFLOAT16),
            gemm.product((1, 16384, 1024, 3072), BFLOAT16, "bmk", "kn", out_dtype=BFLOAT16),
        ),
        (
            sums.gelu_gradient((1, 16384, 4096), (1024, 2048)),
            gemm.dgrad_gelu((1, 16384, 4096, 3072)),
        ),
        (
            sums.residual((1, 401408, 256), (64, 64), sums=False),
            gemm.bias_residual((1, 401408, 256, 128)),
        ),
    ],
    ids=["residual", "plain", "long epilogue", "memory bound"],
)
def test_the_preferred_configuration_is_that_of_one_product(
    spec: KernelSpec, one: KernelSpec
) -> None:
    for capability in (80, 90):
        assert limits.default_config(spec, capability) == limits.default_config(one, capability)


def test_a_sum_without_products_has_a_configuration() -> None:
    assert limits.default_config(sums.residual(ALIGNED, (0, 0)), 90) is not None


def test_no_sum_is_split() -> None:
    spec = sums.plain((1, 768, 768), (16384, 16384), BFLOAT16)
    assert all(config.splits == 1 for config in gemm_configs.configs(spec))
    (one, *_) = gemm_configs.configs(gemm.product((1, 768, 768, 32768), BFLOAT16))
    assert one.splits > 1
    for whole in (spec, sums.residual(ALIGNED, KS)):
        with pytest.raises(UnsupportedKernel, match="a sum of matrix products is not split along"):
            codegen.generate(whole, dataclasses.replace(gemm.SMALL, splits=2))


def test_the_longest_k_decides_the_block() -> None:
    source = codegen.generate(sums.plain((1, 64, 64), (8, 200), BFLOAT16), SPECIALIZED["one group"])
    assert source.config.block("k") == source.config.block("k1") == 64


def test_no_sum_keeps_rows() -> None:
    spec = sums.gelu_gradient((1, 200, 2000), (128, 136))
    launched = dataclasses.replace(gemm.specialized("pingpong", 128, 64, 4, stages=4), programs=6)
    assert "lhs_tiles.index(step)" not in codegen.generate(spec, launched).text
    one = gemm.dgrad_gelu((1, 200, 2000, 264), BFLOAT16)
    assert "lhs_tiles.index(step)" in codegen.generate(one, launched).text


# What is no sum of products

PAIR = sums.plain((1, 64, 64), (64, 32), FLOAT)
LHS, RHS, FIRST, LHS1, RHS1, SECOND, SUM, STORE = range(8)


def with_nodes(*nodes: Any) -> KernelSpec:
    """The pair, with other nodes behind its products."""
    return dataclasses.replace(PAIR, tree=(*PAIR.tree[:SUM], *nodes))


def stored(position: int) -> Any:
    return dataclasses.replace(PAIR.tree[STORE], operand=position)


def test_the_pair_is_what_the_tests_below_take_it_for() -> None:
    found = product.find(PAIR)
    assert found.position == SUM and [t.position for t in found.terms] == [FIRST, SECOND]
    assert [(t.k, t.node.over) for t in found.terms] == [(64, "k"), (32, "k1")]
    assert found.k == 96 and found.steps(64) == 2


def add(left: int, right: int, dtype: Any = FLOAT) -> Compute:
    return Compute("add", (left, right), np.dtype(dtype))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (with_nodes(stored(FIRST)), "expected the 2 matrix products of a GEMM to be added up in"),
        (with_nodes(Compute("sub", (FIRST, SECOND), FLOAT), stored(SUM)), "to be added up in"),
        (with_nodes(add(FIRST, SECOND, "float64"), stored(SUM)), "to be added up in float32"),
        (with_nodes(add(FIRST, FIRST), stored(SUM)), "with nothing between"),
        (
            with_nodes(Compute("neg", (FIRST,), FLOAT), add(SUM, SECOND), stored(SUM + 1)),
            "with nothing between",
        ),
        (
            with_nodes(add(FIRST, SECOND), Compute("mul", (SUM, FIRST), FLOAT), stored(SUM + 1)),
            "node 2, a part of a sum of matrix products, is read by something else",
        ),
        (with_nodes(add(FIRST, SECOND), stored(SUM), stored(SECOND)), "node 5, a part of a sum"),
        (
            with_nodes(add(FIRST, SECOND), add(SECOND, FIRST), stored(SUM), stored(SUM + 1)),
            "a part of a sum of matrix products, is read by something else",
        ),
        (gemm.changed(PAIR, SECOND, over="k"), "expected a contraction over 'k1', got 'k'"),
        (gemm.changed(PAIR, FIRST, over="k1"), "expected a contraction over 'k', got 'k1'"),
        (gemm.changed(PAIR, SECOND, lhs=LHS), "operand lhs of a product varies along 'k'"),
        (gemm.changed(PAIR, SECOND, rhs=LHS1), "operand rhs of a product varies along 'm'"),
        (gemm.changed(PAIR, SECOND, precision="tf32"), r"got float32 to float32 \(ieee\), float32"),
        (with_nodes(add(FIRST, SECOND), stored(LHS1)), "an operand of a product is stored by the"),
        (
            with_nodes(Reduce("sum", LHS1, "k1", FLOAT), add(FIRST, SECOND), stored(SUM + 1)),
            "got 'sum' along 'k1'",
        ),
        (
            dataclasses.replace(PAIR, tree=(*PAIR.tree[:SECOND], add(FIRST, FIRST), stored(5))),
            "expected one matrix product in a GEMM for each axis of k, k1; got 1",
        ),
        (dataclasses.replace(PAIR, aliases=((2, 0),)), "output 0 takes the place of input 2"),
    ],
)
def test_what_cannot_be_generated(spec: KernelSpec, message: str) -> None:
    with pytest.raises(UnsupportedKernel, match=message):
        codegen.generate(spec, gemm.SMALL)


def test_different_types() -> None:
    inputs = [
        dataclasses.replace(t, dtype=BFLOAT16) if i > 1 else t for i, t in enumerate(PAIR.inputs)
    ]
    with pytest.raises(UnsupportedKernel, match="one type and precision; got float32 to float32"):
        codegen.generate(dataclasses.replace(PAIR, inputs=tuple(inputs)), gemm.SMALL)


def test_too_many_terms() -> None:
    spec = sums.plain((1, 8, 8), (4,) * MOST_TERMS, FLOAT)
    codegen.generate(spec, gemm.SMALL)
    axes = (*spec.space.tile, TileAxis(f"k{MOST_TERMS}", (len(spec.space.sizes),)))
    space = Space((*spec.space.sizes, 4), axes)
    with pytest.raises(UnsupportedKernel, match="k1 to k7 for further products"):
        codegen.generate(dataclasses.replace(spec, space=space), gemm.SMALL)


def test_what_is_above_the_sum_is_its_epilogue() -> None:
    """An addition of something else, and the sum's own double, are no terms."""
    spec = with_nodes(add(SECOND, FIRST), add(SUM, SUM), stored(SUM + 1))
    assert product.find(spec).position == SUM
    assert "acc + acc" in codegen.generate(spec, gemm.SMALL).text
