"""Matrix products whose operands come through tensor descriptors, and programs that walk tiles."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import gemm_kernels as gemm
import jax
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, codegen, launch
from jevt_kernels.index_map import IndexMap
from jevt_kernels.mainloops.gemm_configs import configs
from jevt_kernels.spec import Config, KernelSpec, TensorType, UnsupportedKernel
from jevt_kernels.visitor import Load

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


def part_of_a_tensor(column: int = 16) -> KernelSpec:
    """Rows from 3 and columns from ``column`` on of a tensor that goes on behind them."""
    spec = gemm.product((1, 40, 48, 90), FLOAT, "mk", "kn", "mn")
    load = dataclasses.replace(spec.tree[0], index=IndexMap((0, 128, 0, 1), 3 * 128 + column))
    return dataclasses.replace(
        spec,
        tree=(load, *spec.tree[1:]),
        inputs=(TensorType((45, 128), FLOAT), spec.inputs[1]),
    )


def in_place() -> KernelSpec:
    """The result takes the place of what the epilogue adds."""
    b = gemm.tree(*ALIGNED)
    value = b.contract(b.load("bmk", FLOAT), b.load("bkn", FLOAT))
    b.store(b.compute("add", value, b.load("bmn", FLOAT)), "bmn", FLOAT)
    return b.spec("in_place", aliases=((2, 0),))


def input_read_twice() -> KernelSpec:
    """The rows are loaded as tiles, and once more element by element."""
    b = gemm.tree(1, 80, 96, 96)
    x = b.load("mk", FLOAT)
    value = b.contract(x, b.load("kn", FLOAT))
    same = b.add(Load(0, IndexMap((0, 96, 1, 0))))
    b.store(b.compute("add", value, same), "mn", FLOAT)
    return b.spec("input_read_twice")


DESCRIBABLE: dict[str, tuple[KernelSpec, int]] = {
    **{
        f"{lhs} times {rhs}": (gemm.product(ALIGNED, BFLOAT16, lhs, rhs), 2)
        for lhs, rhs in (("bmk", "bkn"), ("mk", "bnk"), ("bkm", "kbn"), ("kbm", "nk"))
    },
    "ends": (gemm.product((2, 33, 40, 48), FLOAT, "bmk", "bnk"), 2),
    "epilogue": (gemm.dgrad_gelu(ALIGNED), 2),
    "several batch axes": (several_batch_axes(), 2),
    "mixed": (mixed(), 1),
    "part of a tensor": (part_of_a_tensor(), 2),
    "in place": (in_place(), 2),
    "input read twice": (input_read_twice(), 2),
    "int8": (gemm.product(ALIGNED, np.int8, "bmk", "bnk"), 2),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", DESCRIBABLE)
def test_descriptors(name: str) -> None:
    spec, count = DESCRIBABLE[name]
    gemm.check_descriptors(spec, DESCRIBED, count)


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
    assert binary.scratch_bytes == 0
    assert binary.shared_bytes <= 227 * 1024


@pytest.mark.aot
def test_tiles_of_batches_go_to_the_tensor_cores() -> None:
    spec = gemm.product((512, 512, 512, 64), BFLOAT16, "mbk", "nbk", "bmn", BFLOAT16)
    config = Config((("m", 128), ("n", 128), ("k", 64)), 8, 3, programs=132, descriptors=True)
    binary = aot.compile(spec, 90, config=config)
    assert "cp.async.bulk.tensor" in binary.ptx
    assert "wgmma.mma_async" in binary.ptx
    assert binary.spill_bytes == binary.scratch_bytes == 0


def lowered(spec: KernelSpec, capability: int) -> str:
    call = functools.partial(launch.call, spec, config=DESCRIBED, compute_capability=capability)
    return jax.jit(call).trace(*gemm.operands(spec)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("name", DESCRIBABLE)
def test_descriptors_lower_for_cuda(name: str) -> None:
    """A described operand is passed twice: once as a pointer, once for its descriptor."""
    spec, count = DESCRIBABLE[name]
    (line,) = [line for line in lowered(spec, 90).splitlines() if "custom_call" in line]
    (arguments,) = re.findall(r"@triton_kernel_call_ffi\((.*?)\)", line)
    assert arguments.count("%") == len(spec.inputs) + count
    aliases = re.findall(r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)", line)
    assert aliases == [("", str(position)) for position, _ in spec.aliases]


@pytest.mark.cuda_lowering
def test_descriptors_need_sm_90() -> None:
    spec, _ = DESCRIBABLE["ends"]
    with pytest.raises(UnsupportedKernel, match="9.0 or higher for tensor descriptors, got 8.0"):
        lowered(spec, 80)
    with pytest.raises(UnsupportedKernel, match="9.0 or higher for tensor descriptors, got 8.0"):
        aot.compile(spec, 80, config=DESCRIBED)


def test_text_with_descriptors(golden: Callable[[str, str], None]) -> None:
    text = codegen.generate(several_batch_axes(), dataclasses.replace(DESCRIBED, programs=5)).text
    golden("kernels/gemm_descriptors.py.txt", text)


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


def test_a_tile_that_starts_between_16_bytes_has_no_descriptor() -> None:
    (described,) = codegen.generate(part_of_a_tensor(19), DESCRIBED).descriptors
    assert described.input == 1


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
