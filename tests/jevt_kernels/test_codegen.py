"""The printed source: golden text, resources when compiled, vector width, wide offsets."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import kernel_contract as contract
import kernel_gallery
import numpy as np
import pytest
from kernel_gallery import tensor

from jevt_kernels import aot, codegen, compat
from jevt_kernels.index_map import IndexMap
from jevt_kernels.mainloops import MAINLOOPS
from jevt_kernels.ops import TRITON_TYPES
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel
from jevt_kernels.visitor import Contract, Load, Reduce, Store

BFLOAT16 = contract.BFLOAT16


@pytest.mark.parametrize("name", kernel_gallery.GALLERY)
def test_text(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"kernels/{name}.py.txt", codegen.generate(kernel_gallery.spec(name)).text)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", kernel_gallery.GALLERY)
def test_compiles_without_spills(name: str, arch: int) -> None:
    binary = aot.compile(kernel_gallery.spec(name), arch)
    assert binary.spill_bytes == 0
    # As much as a thread block can have for the widest rows, 48 KiB for others.
    widest = binary.num_warps == 32
    assert binary.shared_bytes <= (compat.shared_memory_limit(arch) if widest else 48 * 1024)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=lambda d: d.name)
def test_every_type_compiles(dtype: np.dtype) -> None:
    operand = tensor(1024, 96, dtype=dtype)

    def function(x: Any, y: Any) -> Any:
        return jnp.where(x == y, x, y), x.max(1), y.astype(jnp.bfloat16)

    with contract.types_of(operand):
        spec = contract.build(function, operand, operand)
    aot.compile(spec, 80)


def global_accesses(ptx: str) -> set[str]:
    return set(re.findall(r"(?:ld|st)\.global[.\w:]*", ptx))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("function", "operands"),
    [
        (jnp.add, (tensor(1 << 20),) * 2),
        (jnp.add, (tensor(1 << 20, dtype=BFLOAT16),) * 2),
        (jnp.add, (tensor(1000, 1000),) * 2),
        (jnp.add, (tensor(512, 1024, dtype=BFLOAT16), tensor(1024, dtype=BFLOAT16))),
        (lambda x: x[:, :512] * x[:, 512:], (tensor(999, 1024),)),
        (lambda x: x.reshape(32, 128, 16, 64).transpose(0, 2, 1, 3) * 2, (tensor(4096, 1024),)),
        (kernel_gallery.softmax, (tensor(4096, 1000),)),
        (kernel_gallery.softmax, (tensor(256, 131072, dtype=BFLOAT16),)),
        (kernel_gallery.transposed, (tensor(1024, 512, dtype=BFLOAT16),)),
    ],
)
def test_accesses_are_16_bytes_wide(
    function: Callable[..., Any], operands: tuple[Any, ...]
) -> None:
    accesses = global_accesses(aot.compile(contract.build(function, *operands), 90).ptx)
    assert accesses
    for access in accesses:
        lanes, bits = (re.search(p, access) for p in (r"\.v(\d)", r"\.b(\d+)"))
        assert lanes is not None, access
        assert bits is not None, access
        assert int(lanes[1]) * int(bits[1]) == 128, access


HUGE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "pointwise": (lambda x: x + 1, (tensor(1 << 16, 1 << 16, dtype=np.int8),)),
    "a huge input": (lambda x: x[-1, :8] + 1, (tensor(1 << 16, 1 << 16, dtype=np.int8),)),
    "a huge output": (lambda x: x[:, None] + x, (tensor(1 << 16, dtype=np.int8),)),
    "transposed": (lambda x: x.T + 1, (tensor(1 << 17, 1 << 15, dtype=np.int8),)),
    "columns far apart": (
        lambda x: x.T + 1,
        (tensor(64, 1 << 26, dtype=np.int8),),
    ),
    "rowwise": (lambda x: x.max(1), (tensor(1 << 18, 1 << 14, dtype=np.int8),)),
    "rowwise, looped": (lambda x: x.max(1), (tensor(1 << 15, 1 << 17, dtype=np.int8),)),
    "strided row": (
        lambda x: x.transpose(1, 2, 0).max((1, 2)),
        (tensor(1 << 10, 1 << 12, 1 << 10, dtype=np.int8),),
    ),
}


def in_32_bits(text: str) -> list[str]:
    """Linear indices that the source leaves in 32 bits."""
    narrow = []
    for name, expression in re.findall(r"^ *(row|col|i|j) = (.*)$", text, re.MULTILINE):
        wide = "tl.int64" in expression or re.search(r"\b(pid|block)\b", expression)
        if not wide:
            narrow.append(name)
    return narrow


@pytest.mark.parametrize("name", HUGE)
def test_offsets_beyond_32_bits(name: str) -> None:
    text = codegen.generate(contract.build(*_call(HUGE[name]))).text
    assert "tl.program_id(0).to(tl.int64)" in text
    assert in_32_bits(text) == []


@pytest.mark.parametrize("name", ["pointwise", "transposed", "rowwise"])
def test_offsets_within_32_bits(name: str) -> None:
    function, (operand,) = HUGE[name]
    small = tensor(*(size >> 8 for size in operand.shape), dtype=operand.dtype)
    assert "int64" not in codegen.generate(contract.build(function, small)).text


@pytest.mark.aot
@pytest.mark.parametrize("name", ["pointwise", "transposed", "rowwise, looped", "strided row"])
def test_huge_tensors_compile(name: str) -> None:
    aot.compile(contract.build(*_call(HUGE[name])), 90)


def _call(case: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    return case[0], *case[1]


def test_all_configurations_are_printed() -> None:
    for name in kernel_gallery.GALLERY:
        spec = kernel_gallery.spec(name)
        for config in MAINLOOPS[spec.mainloop].configs(spec):
            source = codegen.generate(spec, config)
            compile(source.text, name, "exec")
            assert source.stages or source.entry == name
            assert dataclasses.replace(source.config, splits=config.splits) == config
            for axis, block in config.blocks:
                assert block & (block - 1) == 0
                assert f"BLOCK_{axis.upper()}: tl.constexpr = {block}\n" in source.text


def test_blocks_are_no_larger_than_needed() -> None:
    spec = contract.build(lambda x: x.max(1), tensor(3, 5))
    source = codegen.generate(spec, Config((("row", 16), ("col", 64)), 8))
    assert source.config == Config((("row", 4), ("col", 8)), 8)


def test_text_is_the_same_in_every_process() -> None:
    """Objects are hashed by address: no order may come from a set of them."""
    program = (
        "import kernel_gallery as g, hashlib; from jevt_kernels import codegen; "
        "texts = [codegen.generate(g.spec(n)).text for n in g.GALLERY]; "
        "print(hashlib.sha256(''.join(texts).encode()).hexdigest())"
    )
    roots = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    prints = set()
    for padding in (0, 12345):
        setup = f"import sys; sys.path[:0] = {roots}; junk = [object() for _ in range({padding})]; "
        command = [sys.executable, "-c", setup + program]
        prints.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(prints) == 1


def matrix(*nodes: Any) -> KernelSpec:
    spec = contract.reduction("sum", np.dtype("float32"), 4, 8)
    return dataclasses.replace(spec, tree=nodes)


FLOAT = np.dtype("float32")
X = Load(0, IndexMap((8, 1)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dataclasses.replace(matrix(), mainloop="loop"), "expected a mainloop of .*, got 'loop'"),
        (
            matrix(X, Contract(0, 0, "col", FLOAT), Store(0, 1, IndexMap((1, 0)))),
            "mainloop 'rowwise' holds no matrix product",
        ),
        (
            matrix(X, Reduce("sum", 0, "row", FLOAT), Store(0, 1, IndexMap((0, 1)))),
            "mainloop 'rowwise' holds no reduction along 'row'",
        ),
        (
            matrix(X, Store(0, 0, IndexMap((1, 0)))),
            "output 0 does not follow every axis of its value",
        ),
    ],
)
def test_what_cannot_be_generated(spec: KernelSpec, message: str) -> None:
    with pytest.raises(UnsupportedKernel, match=message):
        codegen.generate(spec)


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (1.0, "float32", "1.0"),
        (-0.0, "float32", "-0.0"),
        (float("inf"), "float64", "float('inf')"),
        (float("nan"), "float32", "float('nan')"),
        (True, "bool", "True"),
        (1, "bool", "True"),
        (7, "float32", "7.0"),
        (2**64 - 1, "uint64", "18446744073709551615"),
    ],
)
def test_literals(value: Any, dtype: str, text: str) -> None:
    assert codegen.literal(value, np.dtype(dtype)) == text
