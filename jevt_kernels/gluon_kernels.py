"""Kernels that are written by hand in Gluon, called from JAX programs as generated ones are.

:func:`call` is traceable and belongs inside ``jax.jit``; :func:`jevt_kernels.aot.compile_gluon`
compiles such a kernel without a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax

from jevt_kernels import compat, launch
from jevt_kernels.spec import TensorType, UnsupportedKernel

#: That of the GPUs whose instructions the kernels are written in.
CAPABILITY = 90


@dataclasses.dataclass(frozen=True)
class View:
    """What a tensor descriptor, made by the host, says of an operand.

    Attributes:
      shape, strides: of the dimensions, in elements; the last one is contiguous. What lies beyond
        the shape is loaded as 0, and not stored.
      block: shape of the tiles.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """An input or output: by a descriptor, or by a pointer where it has no view."""

    type: TensorType
    view: View | None = None

    @property
    def description(self) -> dict[str, Any] | None:
        """The descriptor, with the layout of its tiles in shared memory; None for a pointer."""
        if self.view is None:
            return None
        layout = compat.shared_layout(self.view.block, launch.triton_name(self.type.dtype))
        return {
            "shape": self.view.shape,
            "strides": self.view.strides,
            "block_shape": self.view.block,
            "layout": layout,
        }

    @property
    def signature(self) -> str:
        """Triton's name of the parameter's type."""
        name = launch.triton_name(self.type.dtype)
        described = self.description
        if described is None:
            return f"*{name}"
        block = ",".join(map(str, described["block_shape"]))
        return f"tensordesc<{name}[{block}],{described['layout']!r}>"


@dataclasses.dataclass(frozen=True)
class GluonKernel:
    """A kernel of sm_90 and how it is launched; hashable.

    Attributes:
      name: of the ``@gluon.jit`` function; appears in profiles.
      module: where it is, which is imported when it is needed. Its parameters are the inputs, the
        outputs and the constants, in this order.
      inputs, outputs: operands.
      constants: names and values of ``constexpr`` parameters.
      programs: of the grid.
      num_warps: of its first task.
      flops: operations, as a cost estimate.
    """

    name: str
    module: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    constants: tuple[tuple[str, int | float], ...]
    programs: int
    num_warps: int
    flops: int

    def __str__(self) -> str:
        """The name alone: ``repr`` shows everything."""
        return self.name

    @property
    def signature(self) -> tuple[str, ...]:
        """Triton's names of the types of inputs and outputs."""
        return tuple(operand.signature for operand in (*self.inputs, *self.outputs))

    def load(self) -> Any:
        """The function; imports Triton."""
        with compat.importing:
            return getattr(importlib.import_module(self.module), self.name)


def check_capability(kernel: GluonKernel, capability: int) -> None:
    """Raises UnsupportedKernel if the GPU lacks the instructions, which sm_90 alone has."""
    if capability != CAPABILITY:
        raise UnsupportedKernel(
            f"kernel {kernel.name}: expected a GPU of compute capability {CAPABILITY / 10}, got "
            f"{capability / 10}"
        )


def call(
    kernel: GluonKernel, *operands: jax.Array, compute_capability: int
) -> tuple[jax.Array, ...]:
    """Calls the kernel. Traceable; the surrounding program must be lowered for CUDA.

    Args:
      kernel: the kernel.
      *operands: arrays of the types of its inputs.
      compute_capability: of the GPU to compile for, 90 for sm_90.

    Returns:
      One array for each output.

    Raises:
      TypeError: if the operands do not match the kernel.
      UnsupportedKernel: if the GPU cannot run it.
      ImportError: if jax-triton is missing or Triton is too old.
    """
    types = [operand.type for operand in kernel.inputs]
    got = [TensorType(tuple(operand.shape), operand.dtype) for operand in operands]
    if got != types:
        raise TypeError(
            f"kernel {kernel.name}: expected operands of types {', '.join(map(str, types))}, got "
            f"{', '.join(map(str, got))}"
        )
    check_capability(kernel, compute_capability)
    types_of_results = [jax.ShapeDtypeStruct(o.type.shape, o.type.dtype) for o in kernel.outputs]
    results = compat.call_with_descriptors(
        kernel.load(),
        [(a, o.description) for a, o in zip(operands, kernel.inputs, strict=True)],
        [(t, o.description) for t, o in zip(types_of_results, kernel.outputs, strict=True)],
        dict(kernel.constants),
        grid=kernel.programs,
        name=kernel.name,
        num_warps=kernel.num_warps,
        compute_capability=compute_capability,
        cost_estimate={
            "bytes_accessed": sum(o.type.nbytes for o in (*kernel.inputs, *kernel.outputs)),
            "flops": kernel.flops,
        },
    )
    return tuple(results)


@functools.lru_cache(maxsize=256)
def precompile(kernel: GluonKernel, compute_capability: int) -> None:
    """Compiles a kernel by lowering a program that only calls it, as ``launch.precompile`` does.

    Args:
      kernel: the kernel.
      compute_capability: of the GPU, 90 for sm_90.

    Raises:
      Exception: whatever Triton and its compilers raise, and as :func:`call` does.
    """
    operands = [jax.ShapeDtypeStruct(o.type.shape, o.type.dtype) for o in kernel.inputs]
    launched = functools.partial(call, kernel, compute_capability=compute_capability)
    jax.jit(launched).trace(*operands).lower(lowering_platforms=("cuda",))
