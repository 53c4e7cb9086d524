"""Matrix products whose operands come through tensor descriptors, and programs that walk tiles."""

from __future__ import annotations

import dataclasses
import functools

import gemm_kernels as gemm
import jax
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, codegen, launch
from jevt_kernels.mainloops.gemm_configs import configs
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel

BFLOAT16, FLOAT = contract.BFLOAT16, np.dtype("float32")

#: Sizes whose rows are multiples of 16 bytes in every type and layout.
ALIGNED = (3, 80, 48, 96)
DESCRIBED = dataclasses.replace(gemm.SMALL, descriptors=True)


def several_batch_axes() -> KernelSpec:
    sizes = {"b": 2, "h": 3, "q": 40, "s": 48, "d": 16}
    b = gemm.GemmTree(sizes, batch="bh", m="q", n="s", k="d")
    b.store(b.contract(b.load("bqhd", FLOAT), b.load("hsd", FLOAT)), "bhqs", FLOAT)
    return b.spec("several_batch_axes")


def mixed() -> KernelSpec:
    """One operand through a descriptor, the other made from what is loaded."""
    b = gemm.tree(*ALIGNED)
    rhs = b.compute("exp", b.load("bkn", FLOAT))
    b.store(b.contract(b.load("bmk", FLOAT), rhs), "bmn", FLOAT)
    return b.spec("mixed")


DESCRIBABLE: dict[str, tuple[KernelSpec, int]] = {
    **{
        f"{lhs} times {rhs}": (gemm.product(ALIGNED, BFLOAT16, lhs, rhs), 2)
        for lhs, rhs in (("bmk", "bkn"), ("mk", "bnk"), ("bkm", "kbn"), ("kbm", "nk"))
    },
    "ends": (gemm.product((2, 33, 40, 48), FLOAT, "bmk", "bnk"), 2),
    "epilogue": (gemm.dgrad_gelu(ALIGNED), 2),
    "several batch axes": (several_batch_axes(), 2),
    "mixed": (mixed(), 1),
    "int8": (gemm.product(ALIGNED, np.int8, "bmk", "bnk"), 2),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", DESCRIBABLE)
def test_descriptors(name: str) -> None:
    spec, count = DESCRIBABLE[name]
    source = codegen.generate(spec, DESCRIBED)
    assert source.text.count("tl.make_tensor_descriptor(") == count
    gemm.check(spec, DESCRIBED)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [0, 5])
@pytest.mark.parametrize("name", DESCRIBABLE)
def test_descriptors_on_a_gpu(name: str, programs: int) -> None:
    gemm.check(DESCRIBABLE[name][0], dataclasses.replace(DESCRIBED, programs=programs), launch.run)


@pytest.mark.interpret
@pytest.mark.parametrize("descriptors", [False, True])
def test_programs_that_walk_tiles(descriptors: bool) -> None:
    config = dataclasses.replace(DESCRIBED, programs=4, descriptors=descriptors)
    spec = gemm.dgrad_gelu(ALIGNED)
    assert codegen.generate(spec, config).grid == 4
    gemm.check(spec, config)
    gemm.check(gemm.weight_gradient(ALIGNED), dataclasses.replace(config, splits=3))


def test_programs_are_no_more_than_tiles() -> None:
    config = dataclasses.replace(gemm.SMALL, programs=1000)
    assert codegen.generate(gemm.weight_gradient((1, 64, 64, 64)), config).grid == 4


@pytest.mark.aot
@pytest.mark.parametrize("programs", [0, 132])
def test_descriptors_compile_to_bulk_copies(programs: int) -> None:
    blocks = (("m", 128), ("n", 256), ("k", 64))
    config = Config(blocks, 8, 3, programs=programs, subtiles=2, descriptors=True)
    binary = aot.compile(gemm.bias_gelu((1, 16384, 4096, 1024)), 90, config=config)
    assert "cp.async.bulk.tensor" in binary.ptx
    assert "wgmma.mma_async" in binary.ptx
    assert binary.spill_bytes == 0
    assert binary.shared_bytes <= 227 * 1024


@pytest.mark.cuda_lowering
def test_descriptors_lower_for_cuda() -> None:
    """They need scratch memory, which jax-triton supplies."""
    spec = gemm.product((1, 256, 256, 256), BFLOAT16, "mk", "kn", "mn")
    call = functools.partial(launch.call, spec, config=DESCRIBED, compute_capability=90)
    text = jax.jit(call).trace(*gemm.operands(spec)).lower(lowering_platforms=("cuda",)).as_text()
    assert "@triton_kernel_call_ffi" in text


@pytest.mark.parametrize(
    "spec",
    [
        gemm.product((1, 64, 64, 60), BFLOAT16, "mk", "nk"),  # rows of 120 bytes
        gemm.product((1, 64, 64, 64), BFLOAT16, "m", "n"),  # no rows
        gemm.unflattened(),
        gemm.prologue((1, 64, 64, 64)),
    ],
    ids=["unaligned", "broadcast", "two axes", "computed"],
)
def test_what_has_no_descriptor(spec: KernelSpec) -> None:
    with pytest.raises(UnsupportedKernel, match="no operand of the product can have a tensor desc"):
        codegen.generate(spec, DESCRIBED)
    assert not any(config.descriptors for config in configs(spec))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DESCRIBED, "tensor descriptors are used only with 32-bit offsets"),
        (dataclasses.replace(gemm.SMALL, programs=8), "walks several tiles only with 32-bit"),
    ],
)
def test_wide_offsets_allow_neither(config: Config, message: str) -> None:
    spec = gemm.product((1, 1 << 18, 128, 1 << 14), "int8", "mk", "kn", "mn")
    with pytest.raises(UnsupportedKernel, match=message):
        codegen.generate(spec, config)
    assert not any(config.descriptors or config.programs for config in configs(spec))
