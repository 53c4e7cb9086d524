"""Kernels written by hand, to test launching apart from code generation."""

from __future__ import annotations

import numpy as np

from jevt_kernels.index_map import Space, TileAxis
from jevt_kernels.spec import Config, KernelSpec, Source, TensorType

HEADER = """\
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from jevt_kernels import device_math as dm


@triton.jit
"""


def kernel(
    body: str,
    inputs: list[TensorType],
    outputs: list[TensorType],
    *,
    aliases: tuple[tuple[int, int], ...] = (),
    grid: int = 1,
    num_warps: int = 4,
) -> tuple[KernelSpec, Source]:
    """A spec without a tree, and the source ``body`` with pointers ``x0, …`` and ``y0, …``."""
    aliased = {output for _, output in aliases}
    names = [f"x{i}" for i in range(len(inputs))]
    names += [f"y{i}" for i in range(len(outputs)) if i not in aliased]
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    text = f"{HEADER}def kernel({', '.join(names)}):\n{lines}"
    size = max((operand.size for operand in (*inputs, *outputs)), default=1)
    spec = KernelSpec(
        name="kernel",
        mainloop="pointwise",
        space=Space((size,), (TileAxis("i", (0,)),)),
        tree=(),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        aliases=aliases,
    )
    return spec, Source(text, "kernel", grid, Config((("i", 128),), num_warps))


def tensor(shape: tuple[int, ...], dtype: object = np.float32) -> TensorType:
    return TensorType(shape, np.dtype(dtype))


def tanh_add(size: int = 300, dtype: object = np.float32) -> tuple[KernelSpec, Source]:
    """``x1 += tanh(x0)`` in place, and ``y1 = sign(x1)``."""
    body = (
        "i = tl.program_id(0) * 128 + tl.arange(0, 128)\n"
        f"i_ok = i < {size}\n"
        "v0 = libdevice.tanh(tl.load(x0 + i, mask=i_ok))\n"
        "v1 = tl.load(x1 + i, mask=i_ok) + v0\n"
        "tl.store(x1 + i, v1, mask=i_ok)\n"
        "tl.store(y1 + i, dm.sign(v1), mask=i_ok)"
    )
    operand = tensor((size,), dtype)
    return kernel(
        body, [operand, operand], [operand, operand], aliases=((1, 0),), grid=-(-size // 128)
    )
