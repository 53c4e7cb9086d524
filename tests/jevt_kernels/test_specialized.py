"""Matrix products whose warps have different tasks, on a GPU against the reference."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import gemm_kernels as gemm
import jax
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, codegen, compat, launch, limits
from jevt_kernels.mainloops import gemm_configs, product, specialized
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel

BFLOAT16 = contract.BFLOAT16


CONFIGS = {
    "cooperative": gemm.specialized("cooperative", 128, 256, 8, subtiles=4),
    "one group": gemm.specialized("cooperative", 64, 64, 4, stages=4),
    "two groups": gemm.specialized("cooperative", 128, 256, 4, subtiles=2),
    "four groups": gemm.specialized("cooperative", 256, 64, 4),
    "pingpong": gemm.specialized("pingpong", 128, 128, 8, subtiles=4),
    "small groups": gemm.specialized("pingpong", 128, 64, 4, stages=4, subtiles=2),
    "overlapped": gemm.specialized("overlapped", 128, 128, 4, stages=4, subtiles=4),
    "more pieces than steps": gemm.specialized("overlapped", 64, 128, 4, subtiles=8),
}

#: Large tiles, which are held only as 16 bits.
OVERLAPPED = gemm.specialized("overlapped", 128, 256, 4, stages=4, subtiles=4)

#: Rows, columns and k that fill no tile, but whose strides are multiples of 16 bytes.
SIZES = (2, 304, 264, 200)

CASES = {
    "plain": gemm.product(SIZES, BFLOAT16),
    "gelu": gemm.bias_gelu(SIZES),
    "residual": gemm.bias_residual(SIZES),
    "gradient of a gelu": gemm.dgrad_gelu(SIZES, BFLOAT16),
    "float16": gemm.bias_gelu(SIZES, np.dtype("float16")),
    "weight gradient": gemm.weight_gradient((1, 304, 264, 700)),
    "transposed": gemm.product(SIZES, BFLOAT16, "bkm", "bnk", "bnm"),
    "short k": gemm.bias_residual((1, 640, 520, 40)),
    "every reduction": gemm.every_reduction((1, 304, 264, 200), BFLOAT16),
    "rounded": gemm.product(SIZES, BFLOAT16, out_dtype=BFLOAT16),
    "rounded residual": gemm.rounded_residual(SIZES),
}


def groups(name: str) -> int:
    """Groups of warps that multiply in one of the configurations."""
    chosen = CONFIGS[name]
    rows = chosen.block("m") // (16 * chosen.num_warps)
    return 2 if chosen.specialized == "pingpong" else rows


#: A product of which each program keeps the left operand's rows, and their configurations.
KEPT = gemm.dgrad_gelu((1, 200, 2000, 264), BFLOAT16)
KEEPING = {
    kind: dataclasses.replace(gemm.specialized(kind, 128, 64, 4, stages=4), programs=6)
    for kind in ("cooperative", "pingpong", "overlapped")
}


@pytest.fixture
def sm_90() -> None:
    """Skips the test on GPUs without the instructions."""
    if compat.local_compute_capability() != 90:
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, sm_90: None) -> None:
    for launched in CONFIGS.values():
        gemm.check(CASES[name], launched, launch.run)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rounded", "rounded residual"])
def test_large_overlapped_tiles_on_a_gpu(name: str, sm_90: None) -> None:
    for programs in (1, 2, 5):
        launched = dataclasses.replace(OVERLAPPED, programs=programs)
        gemm.check(CASES[name], launched, launch.run)


@pytest.mark.gpu
def test_more_programs_than_tiles_on_a_gpu(sm_90: None) -> None:
    for kind in ("cooperative", "pingpong", "overlapped"):
        launched = dataclasses.replace(
            gemm.specialized(kind, 128, 128, 4, subtiles=2), programs=132
        )
        gemm.check(CASES["gelu"], launched, launch.run)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KEEPING)
def test_kept_rows_on_a_gpu(kind: str, sm_90: None) -> None:
    gemm.check(KEPT, KEEPING[kind], launch.run)
    for steps in (1, 2, 3):
        short = gemm.bias_gelu((1, 200, 2000, 64 * steps))
        gemm.check(short, KEEPING[kind], launch.run)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [3, 5, 16])
def test_uneven_parts_on_a_gpu(splits: int, sm_90: None) -> None:
    for name in ("one group", "two groups"):
        whole = dataclasses.replace(CONFIGS[name], splits=splits)
        gemm.check(gemm.weight_gradient((2, 304, 264, 1000)), whole, launch.run)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [2, 4])
def test_split_on_a_gpu(splits: int, sm_90: None) -> None:
    for name in ("one group", "small groups"):
        whole = dataclasses.replace(CONFIGS[name], splits=splits, subtiles=1)
        gemm.check(gemm.weight_gradient((2, 304, 264, 1000)), whole, launch.run)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["residual", "every reduction"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_compiles_without_spills(name: str, kind: str) -> None:
    binary = aot.compile(CASES[name], 90, config=CONFIGS[kind])
    assert binary.spill_bytes == 0 and binary.scratch_bytes == 0
    # The loading warp comes with three idle ones.
    assert binary.num_warps == groups(kind) * CONFIGS[kind].num_warps + 4
    assert "wgmma.mma_async" in binary.ptx and "setmaxnreg" in binary.ptx
    found = product.find(CASES[name])
    assert binary.shared_bytes <= gemm_configs.shared_bytes(CASES[name], found, CONFIGS[kind])


@pytest.mark.aot
@pytest.mark.parametrize("splits", [2, 4])
def test_parts_compile(splits: int) -> None:
    for name in ("one group", "two groups", "small groups"):
        whole = dataclasses.replace(CONFIGS[name], splits=splits, subtiles=1)
        spec = gemm.weight_gradient((2, 304, 264, 1000))
        binary = aot.compile(spec, 90, config=whole)
        assert binary.spill_bytes == 0
        assert binary.shared_bytes <= gemm_configs.shared_bytes(spec, product.find(spec), whole)


@pytest.mark.aot
@pytest.mark.parametrize("kind", KEEPING)
def test_kept_rows_compile(kind: str) -> None:
    binary = aot.compile(KEPT, 90, config=KEEPING[kind])
    assert binary.spill_bytes == 0
    found = product.find(KEPT)
    assert specialized.keeps_lhs(found, KEEPING[kind])
    assert binary.shared_bytes <= gemm_configs.shared_bytes(KEPT, found, KEEPING[kind])


def test_rows_are_kept_only_by_programs_that_have_no_others() -> None:
    launched, found = KEEPING["pingpong"], product.find(KEPT)
    assert "lhs_tiles.index(step)" in codegen.generate(KEPT, launched).text
    for other in (
        dataclasses.replace(launched, programs=5),
        dataclasses.replace(launched, programs=0),
        dataclasses.replace(launched, group=1),
    ):
        assert not specialized.keeps_lhs(found, other)
        assert "lhs_tiles.index(slot)" in codegen.generate(KEPT, other).text
    long = gemm.dgrad_gelu((1, 200, 2000, 1024), BFLOAT16)
    assert not specialized.keeps_lhs(product.find(long), launched)
    batched = gemm.dgrad_gelu((2, 200, 2000, 264), BFLOAT16)
    assert not specialized.keeps_lhs(product.find(batched), launched)


#: Operations of a product, and of 32-bit integers, with their number of operands.
_FLOAT_OPERATIONS = {
    **dict.fromkeys(
        """
        abs acos acosh asin asinh atan atanh cbrt ceil cos cosh erf erf_inv erfc exp exp2 expm1
        floor is_finite lgamma log log1p log1p_of_unit log2 logistic neg one_minus_square round_away
        round_even round_to_bfloat16 rsqrt sign sin sinh sqrt square tan tanh
        """.split(),  # noqa: SIM905
        1,
    ),
    **dict.fromkeys("add atan2 div eq lt logistic_of max min mul nextafter pow rem sub".split(), 2),  # noqa: SIM905
    "clamp": 3,
}
_INTEGER_OPERATIONS = {
    **dict.fromkeys(
        """
        add and div max min mul or rem shift_left shift_right_arithmetic shift_right_logical sub xor
        """.split(),  # noqa: SIM905
        2,
    ),
    **dict.fromkeys(("neg", "not", "sign"), 1),
}
_COMPARISONS = ("eq", "is_finite", "lt")


@pytest.mark.aot
@pytest.mark.parametrize("part", range(4))
def test_every_operation_compiles(part: int) -> None:
    """Gluon's types know layouts, so that what Triton compiles need not be a kernel of Gluon's."""
    integer, boolean = np.dtype("int32"), np.dtype(bool)
    b = gemm.tree(1, 64, 128, 64)
    value = b.contract(b.load("bmk", BFLOAT16), b.load("kn", BFLOAT16))
    number = b.load("bmn", integer)
    cases = [(op, count, value, gemm.FLOAT) for op, count in _FLOAT_OPERATIONS.items()]
    cases += [(op, count, number, integer) for op, count in _INTEGER_OPERATIONS.items()]
    for op, count, operand, dtype in cases[part::4]:
        result = boolean if op in _COMPARISONS else dtype
        b.store(b.compute(op, *[operand] * count, dtype=result), "bmn", result)
    chosen = b.compute("select_n", b.load("bmn", boolean), value, b.load("n", gemm.FLOAT))
    b.store(b.compute("integer_pow", chosen, b.constant(-3)), "nbm", gemm.FLOAT)
    for dtype in (integer, np.dtype("uint8"), np.dtype("float16"), boolean):
        b.store(b.compute("convert", value, dtype=dtype), "bmn", dtype)
    for op in ("sum", "prod", "max", "min"):
        b.store(b.reduce(value, "n", op), "bm", gemm.FLOAT)
    binary = aot.compile(b.spec("operations"), 90, config=CONFIGS["one group"])
    assert "wgmma.mma_async" in binary.ptx


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("kind", ["cooperative", "pingpong", "overlapped"])
def test_jax_compiles_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """jax-triton would run Triton's own passes on such kernels, and change their layouts."""
    compat.import_jax_triton()
    library = importlib.import_module("jax_triton.triton_lib")
    compiled: list[str] = []
    compile_ptx = library.compile_ttir_to_ptx_inplace

    def record(*arguments: Any) -> Any:
        result = compile_ptx(*arguments)
        compiled.append(result.binary)
        return result

    monkeypatch.setattr(library, "compile_ttir_to_ptx_inplace", record)
    # A kernel of its own, which nothing has compiled before.
    spec = dataclasses.replace(CASES["short k"], name=f"compiled_by_jax_{kind}")
    call = functools.partial(launch.call, spec, config=CONFIGS[kind], compute_capability=90)
    jax.jit(call).trace(*gemm.operands(spec)).lower(lowering_platforms=("cuda",))

    def code(ptx: str) -> list[str]:
        lines = (line.split("//")[0].strip() for line in ptx.splitlines())
        return [line for line in lines if line and not line.startswith((".loc", ".file"))]

    assert [code(ptx) for ptx in compiled] == [
        code(aot.compile(spec, 90, config=CONFIGS[kind]).ptx)
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_text(kind: str) -> None:
    source = codegen.generate(CASES["gelu"], CONFIGS[kind])
    assert "gl.warp_specialize" in source.text and len(source.descriptors) == 2
    assert source.text.count("bias_gelu_compute, (") == groups(kind)
    assert source.grid == 5


@pytest.mark.aot
@pytest.mark.parametrize("name", ["rounded", "rounded residual"])
def test_large_overlapped_tiles_compile(name: str) -> None:
    pieces = dataclasses.replace(OVERLAPPED, subtiles=8)
    binary = aot.compile(CASES[name], 90, config=pieces)
    assert binary.spill_bytes == 0
    found = product.find(CASES[name])
    assert binary.shared_bytes <= gemm_configs.shared_bytes(CASES[name], found, pieces)


def test_pieces_are_finished_between_steps() -> None:
    text = codegen.generate(CASES["rounded"], OVERLAPPED).text
    between = text[text.index("for pid in", text.index("_compute(")) :]
    *pieces, last = between[: between.index("pid = tl.program_id(0)")].split("tl.store(")
    assert len(pieces) == 4 and all("for step in range(" in piece for piece in pieces)
    assert "for step" not in last and "held = acc" in last
    # The last tile's pieces come after the loop.
    assert between.count("tl.store(") == 2 * len(pieces)


def test_only_sm_90_has_them() -> None:
    spec = gemm.bias_gelu((1, 16384, 4096, 1024))
    chosen = {capability: limits.default_config(spec, capability) for capability in (80, 90, 100)}
    assert chosen[90] is not None and chosen[90].specialized == "pingpong"
    for capability in (80, 100):
        other = chosen[capability]
        assert other is not None and not other.specialized
        source = launch.source_for(spec, chosen[90])
        with pytest.raises(UnsupportedKernel, match="capability 9.0 for warps with different"):
            launch.check_descriptors(spec, source, capability)


WIDE = gemm.specialized("cooperative", 128, 128, 8)


@pytest.mark.parametrize(
    ("spec", "wrong", "message"),
    [
        (CASES["gelu"], dataclasses.replace(WIDE, specialized="both"), "one of cooperative, pingp"),
        (gemm.bias_gelu(SIZES, np.dtype("float32")), WIDE, "only for operands of 16 bits"),
        (gemm.bias_gelu((2, 70, 50, 90)), WIDE, "no operand of the product can have"),
        (gemm.bias_gelu((2, 70, 50, 96)), WIDE, "only where both operands have a descriptor"),
        (CASES["plain"], dataclasses.replace(WIDE, splits=5), "4 steps along k cannot be split"),
        (
            CASES["plain"],
            dataclasses.replace(CONFIGS["pingpong"], splits=3),
            "4 steps along k cannot be split",
        ),
        (CASES["residual"], dataclasses.replace(WIDE, ahead=True), "load nothing ahead"),
        (CASES["residual"], OVERLAPPED, "128 registers of a thread .* leave none for the next"),
        (CASES["rounded"], dataclasses.replace(OVERLAPPED, splits=2), "have no parts of k"),
        (
            CASES["gelu"],
            gemm.specialized("cooperative", 64, 128, 8),
            "cannot be multiplied by 8 warps",
        ),
        (CASES["gelu"], dataclasses.replace(WIDE, descriptors=False), "both operands have a desc"),
    ],
)
def test_wrong_configurations(spec: KernelSpec, wrong: Config, message: str) -> None:
    with pytest.raises(UnsupportedKernel, match=message):
        codegen.generate(spec, wrong)
