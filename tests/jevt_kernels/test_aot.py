"""Ahead-of-time compilation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hand_written import kernel, tanh_add, tensor

from jevt_kernels import aot, compat
from jevt_kernels.spec import UnsupportedKernel


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_resources(arch: int) -> None:
    spec, source = tanh_add()
    binary = aot.compile(spec, arch, source=source)
    assert f".target sm_{arch}" in binary.ptx
    assert binary.cubin.startswith(b"\x7fELF")
    assert binary.arch == arch
    assert 8 <= binary.registers <= 40
    assert (binary.spill_bytes, binary.stack_bytes, binary.shared_bytes) == (0, 0, 0)
    assert binary.num_warps == 4
    assert aot.compile(spec, arch, source=source) is binary


@pytest.mark.aot
def test_spills_and_shared_memory_are_seen() -> None:
    # One warp holds two 64x64 float32 tiles, 256 values a thread, and transposes one of them.
    body = (
        "i = tl.arange(0, 64)\n"
        "at = i[:, None] * 64 + i[None, :]\n"
        "v = tl.load(x0 + at)\n"
        "tl.store(y0 + at, tl.exp(v) * tl.sum(v) + tl.trans(tl.sin(v)))"
    )
    operand = tensor((64, 64))
    spec, source = kernel(body, [operand], [operand], num_warps=1)
    binary = aot.compile(spec, 90, source=source)
    assert binary.registers == 255
    assert binary.spill_bytes > 0
    assert binary.stack_bytes >= binary.spill_bytes / 2
    assert binary.shared_bytes > 0


@pytest.mark.aot
def test_ptx_is_old_enough_for_cuda_12() -> None:
    spec, source = tanh_add()
    line = aot.compile(spec, 90, source=source).ptx.split(".version ")[1].split()[0]
    assert compat.parse_version(line) <= (8, 8)


@pytest.mark.aot
def test_every_dtype_compiles() -> None:
    dtypes = [np.bool_, np.int8, np.uint16, np.int64, np.float16, jnp.bfloat16, np.float64]
    operands = [tensor((8,), dtype) for dtype in dtypes]
    lines = [f"tl.store(y{i} + i, tl.load(x{i} + i))" for i in range(len(dtypes))]
    spec, source = kernel("\n".join(["i = tl.arange(0, 8)", *lines]), operands, operands)
    assert aot.compile(spec, 80, source=source).registers > 0


@pytest.mark.aot
def test_wrong_source_and_dtype() -> None:
    spec, source = tanh_add()
    other, _ = kernel("pass", [tensor((4,))], [tensor((4,))])
    with pytest.raises(ValueError, match="expected kernel to take 2 parameters"):
        aot.compile(other, 90, source=source)
    spec, source = kernel("pass", [tensor((4,), np.complex64)], [tensor((4,))])
    with pytest.raises(UnsupportedKernel, match="got complex64"):
        aot.compile(spec, 90, source=source)


def test_old_gpu() -> None:
    spec, source = tanh_add()
    with pytest.raises(compat.UnsupportedDevice, match="8.0 or higher .* got 7.5"):
        aot.compile(spec, 75, source=source)


@pytest.mark.interpret
def test_under_the_interpreter() -> None:
    spec, source = tanh_add()
    with pytest.raises(RuntimeError, match="Unset the variable"):
        aot.compile(spec, 90, source=source)
