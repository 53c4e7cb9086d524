"""Running a :class:`~jevt_kernels.spec.KernelSpec` on a GPU through jax-triton.

:func:`call` is traceable and belongs inside ``jax.jit``; :func:`run` is the same, jitted, for use
by hand. :mod:`jevt_kernels.interpreter` runs a kernel without a GPU, :mod:`jevt_kernels.aot`
compiles it without one. All take the source that :mod:`jevt_kernels.codegen` prints, or one given
by hand.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import linecache
import math
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jevt_kernels import compat, ops, partials, visitor
from jevt_kernels.compat import UnsupportedDevice
from jevt_kernels.spec import (
    Config,
    Descriptor,
    KernelSpec,
    Source,
    TensorType,
    UnsupportedKernel,
)

# The x dimension of a CUDA grid, which is the only one that generated kernels use.
MAXIMUM_GRID = 2**31 - 1

# Since when GPUs have tensor descriptors.
_DESCRIPTOR_CAPABILITY = 90

# How Triton abbreviates the names of its types in signatures.
_ABBREVIATIONS = {"int": "i", "uint": "u", "bfloat": "bf", "float": "fp"}


def triton_name(dtype: np.dtype) -> str:
    """Triton's name of a dtype: ``"fp32"`` for float32.

    Raises:
      UnsupportedKernel: if kernels do not support the dtype.
    """
    if dtype not in ops.TRITON_TYPES:
        names = ", ".join(known.name for known in ops.TRITON_TYPES)
        raise UnsupportedKernel(f"expected an operand of type {names}, got {dtype.name}")
    name = ops.TRITON_TYPES[dtype].removeprefix("tl.")
    kind = name.rstrip("0123456789")
    return _ABBREVIATIONS[kind] + name.removeprefix(kind)


@functools.cache
def source_for(spec: KernelSpec, config: Config | None) -> Source:
    """The generated source of ``spec``, with the default configuration if ``config`` is None."""
    from jevt_kernels import codegen

    return codegen.generate(spec, config)


def parameters(spec: KernelSpec) -> tuple[TensorType, ...]:
    """Types of the kernel's pointers in order: the inputs, then the outputs that alias no input."""
    aliased = {output for _, output in spec.aliases}
    own = (output for i, output in enumerate(spec.outputs) if i not in aliased)
    return (*spec.inputs, *own)


def signature(spec: KernelSpec, source: Source) -> tuple[str, ...]:
    """Triton's names of the types of the kernel's parameters, pointers and descriptors, in order.

    Raises:
      UnsupportedKernel: if kernels do not support the dtype of an operand.
    """
    pointers = [f"*{triton_name(operand.dtype)}" for operand in parameters(spec)]
    descriptors = []
    for descriptor in source.descriptors:
        dtype = triton_name(spec.inputs[descriptor.input].dtype)
        layout = descriptor_layout(spec, source, descriptor)
        block = ",".join(map(str, descriptor.block))
        descriptors.append(f"tensordesc<{dtype}[{block}]{f',{layout!r}' if layout else ''}>")
    inputs = len(spec.inputs)
    return (*pointers[:inputs], *descriptors, *pointers[inputs:])


def descriptor_layout(spec: KernelSpec, source: Source, descriptor: Descriptor) -> Any:
    """The layout of a descriptor's tiles in shared memory; None where Triton chooses it."""
    if not source.config.specialized:
        return None
    return compat.shared_layout(descriptor.block, triton_name(spec.inputs[descriptor.input].dtype))


def check_descriptors(spec: KernelSpec, source: Source, capability: int) -> None:
    """Raises UnsupportedKernel if the GPU lacks what the kernel is written for.

    That is tensor descriptors, since sm_90; and of warps with different tasks, the instructions by
    which they multiply, which sm_90 alone has.
    """
    if source.config.specialized and capability != _DESCRIPTOR_CAPABILITY:
        raise UnsupportedKernel(
            f"kernel {spec.name}: expected a GPU of compute capability "
            f"{_DESCRIPTOR_CAPABILITY / 10} for warps with different tasks, got {capability / 10}. "
            "Use a configuration that is not specialized."
        )
    if source.descriptors and capability < _DESCRIPTOR_CAPABILITY:
        raise UnsupportedKernel(
            f"kernel {spec.name}: expected a GPU of compute capability "
            f"{_DESCRIPTOR_CAPABILITY / 10} or higher for tensor descriptors, got "
            f"{capability / 10}. Use a configuration without descriptors."
        )


@functools.cache
def load(source: Source) -> Any:
    """The ``@triton.jit`` function that ``source`` defines.

    The text is registered with :mod:`linecache`, because Triton reads a kernel's source lines, and
    so that tracebacks show them.

    Returns:
      A ``triton.JITFunction``, or an ``InterpretedFunction`` under ``TRITON_INTERPRET=1``.

    Raises:
      ValueError: if the text does not define ``source.entry``.
    """
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:16]
    filename = f"<jevt kernel {source.entry} {digest}>"
    # A modification time of None tells linecache that there is no file to check against.
    linecache.cache[filename] = (
        len(source.text),
        None,
        source.text.splitlines(keepends=True),
        filename,
    )
    module = ModuleType(f"jevt_kernel_{source.entry}_{digest}")
    module.__file__ = filename
    with compat.importing:
        exec(compile(source.text, filename, "exec"), module.__dict__)  # noqa: S102
    try:
        return module.__dict__[source.entry]
    except KeyError:
        raise ValueError(
            f"expected the generated module to define {source.entry!r}, got the text\n{source.text}"
        ) from None


def check_operands(spec: KernelSpec, operands: Sequence[Any]) -> None:
    """Raises TypeError unless ``operands`` match the spec's inputs in number, shape and dtype."""
    if len(operands) != len(spec.inputs):
        raise TypeError(
            f"kernel {spec.name}: expected {len(spec.inputs)} operands, got {len(operands)}"
        )
    for position, (operand, expected) in enumerate(zip(operands, spec.inputs, strict=True)):
        got = TensorType(tuple(operand.shape), np.dtype(operand.dtype))
        if got != expected:
            raise TypeError(
                f"kernel {spec.name}: expected operand {position} of type {expected}, got {got}"
            )


def in_stages[Array](
    run: Callable[..., tuple[Array, ...]], source: Source, operands: Sequence[Array]
) -> tuple[Array, ...]:
    """Runs the kernels of ``source.stages``, of which ``source`` is the first.

    Args:
      run: :func:`call` or :func:`jevt_kernels.interpreter.run`.
      source: with stages.
      operands: of the whole.
    """
    stages = source.stages
    assert stages is not None
    values = list(operands)
    for number, step in enumerate(stages.steps):
        printed = None if number else dataclasses.replace(source, stages=None)
        values += run(step.spec, *(values[i] for i in step.reads), source=printed)
    return tuple(values[i] for i in stages.results)


def check_grid(spec: KernelSpec, source: Source) -> None:
    """Raises UnsupportedKernel if the launch grid is empty or exceeds CUDA's limit."""
    if not 1 <= source.grid <= MAXIMUM_GRID:
        raise UnsupportedKernel(
            f"kernel {spec.name}: expected a grid of 1 to {MAXIMUM_GRID} programs, got "
            f"{source.grid}. Use larger blocks: {source.config.blocks}"
        )


def call(
    spec: KernelSpec,
    *operands: jax.Array,
    config: Config | None = None,
    source: Source | None = None,
    compute_capability: int | None = None,
    name: str | None = None,
) -> tuple[jax.Array, ...]:
    """Calls the kernel. Traceable; the surrounding program must be lowered for CUDA.

    Args:
      spec: the kernel.
      operands: arrays of the types ``spec.inputs``.
      config: launch configuration; the default is the mainloop's first that the GPU can run.
      source: printed kernel to use instead of generating one; it brings its own configuration.
      compute_capability: of the GPU to compile for, 90 for sm_90; the default is the first visible
        GPU's. Must be given to lower for CUDA on a machine without a GPU.
      name: what profiles call this launch; the default is ``spec.name``.

    Returns:
      One array for each of ``spec.outputs``.

    Raises:
      TypeError: if the operands do not match the spec.
      UnsupportedKernel: if the spec cannot be generated or launched.
      jevt_kernels.compat.UnsupportedDevice: if the GPU is older than sm_80.
      ImportError: if jax-triton is missing or Triton is too old.
    """
    check_operands(spec, operands)
    if not any(output.size for output in spec.outputs):
        return tuple(jnp.empty(output.shape, output.dtype) for output in spec.outputs)
    if compute_capability is None:
        compute_capability = compat.local_compute_capability()
    if source is None:
        source = source_for(spec, config or _default_config(spec, compute_capability))
    if source.stages is not None:
        run = functools.partial(call, compute_capability=compute_capability, name=name)
        return in_stages(run, source, operands)
    check_grid(spec, source)
    kernel_spec = partials.written(spec, source)
    signature(kernel_spec, source)  # raises for dtypes that kernels do not support
    if compute_capability is not None:
        compat.check_compute_capability(compute_capability)
        check_descriptors(spec, source, compute_capability)
    jax_triton = compat.import_jax_triton()
    if compat.interpreting():
        raise UnsupportedDevice(
            "Triton was imported with TRITON_INTERPRET=1, so it cannot compile for a GPU. Unset "
            "the variable, or use jevt_kernels.interpreter (jevt.jit(backend='interpret'))."
        )
    # jaxlib fills the kernel's pointers from operands and then results, in order, and knows nothing
    # of aliases: results that share an operand's buffer, which have no pointer, must come last.
    aliased = {output: position for position, output in spec.aliases}
    order = sorted(range(len(spec.outputs)), key=lambda output: output in aliased)
    with warnings.catch_warnings():
        # The replacement, Ref arguments, needs a discharge pass around every lowering rule.
        # Should another thread leave this filter installed, it still hides this one message only.
        warnings.filterwarnings(
            "ignore", message="input_output_aliases is deprecated", category=DeprecationWarning
        )
        results = jax_triton.triton_call(
            *operands,
            *(
                jax_triton.TensorDescriptor(
                    operands[d.input],
                    d.shape,
                    d.strides,
                    d.block,
                    descriptor_layout(kernel_spec, source, d),
                )
                for d in source.descriptors
            ),
            kernel=load(source),
            out_type=tuple(
                jax.ShapeDtypeStruct(o.shape, o.dtype)
                for o in (kernel_spec.outputs[output] for output in order)
            ),
            grid=(source.grid,),
            name=spec.name if name is None else name,
            num_warps=source.config.num_warps,
            num_stages=source.config.num_stages,
            compute_capability=compute_capability,
            backend_options=compat.backend_options(compute_capability),
            input_output_aliases={aliased[o]: i for i, o in enumerate(order) if o in aliased},
            cost_estimate=cost_estimate(spec),
        )
    in_place = [results[order.index(output)] for output in range(len(order))]
    run = functools.partial(call, compute_capability=compute_capability)
    return partials.combine(spec, source, in_place, run)


@functools.lru_cache(maxsize=4096)
def precompile(spec: KernelSpec, compute_capability: int, config: Config | None = None) -> None:
    """Compiles a kernel by lowering a program that only calls it.

    jax-triton keeps the binary, so that :func:`call` finds it. Where a kernel fails inside a larger
    program, that program cannot be lowered any more; whoever has something else to fall back on
    asks here first, and pays once for equal kernels.

    Args:
      spec: the kernel.
      compute_capability: of the GPU, 90 for sm_90; 0 for the first visible GPU's.
      config: launch configuration; the default is chosen by the mainloop.

    Raises:
      Exception: whatever Triton and its compilers raise, and as :func:`call` does.
    """
    operands = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in spec.inputs]
    launched = functools.partial(
        call, spec, config=config, compute_capability=compute_capability or None
    )
    jax.jit(launched).trace(*operands).lower(lowering_platforms=("cuda",))


def described(error: BaseException) -> str:
    """An error in a line: its type, and how its message begins."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def cost_estimate(spec: KernelSpec) -> dict[str, int]:
    """Bytes moved and operations executed by one launch, in the form that jax-triton passes to XLA.

    An operation of the visitor tree counts once a point of the axes along which its operands vary,
    a matrix product twice a point. What a kernel reads or computes more than once is not counted.
    """
    ones = [spec.member(m) for m in range(len(spec.members))] or [spec]
    return {
        "bytes_accessed": sum(operand.nbytes for operand in (*spec.inputs, *spec.outputs)),
        "flops": sum(map(_operations, ones)),
    }


def _operations(spec: KernelSpec) -> int:
    dependencies = visitor.dependencies(spec.tree, spec.space)
    extents = {t.name: spec.space.extent(t) for t in spec.space.tile}
    flops = 0
    for position, node in enumerate(spec.tree):
        if isinstance(node, visitor.Contract):
            axes = dependencies[position] | {node.over}
            flops += 2 * math.prod(extents[name] for name in axes)
        elif isinstance(node, visitor.Compute | visitor.Reduce):
            axes = frozenset().union(*(dependencies[o] for o in visitor.operands(node)))
            flops += math.prod(extents[name] for name in axes)
    return flops


def _default_config(spec: KernelSpec, capability: int | None) -> Config | None:
    from jevt_kernels import limits

    return None if capability is None else limits.default_config(spec, capability)


@functools.cache
def _jitted(
    spec: KernelSpec, config: Config | None, source: Source | None
) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(functools.partial(call, spec, config=config, source=source))


def run(
    spec: KernelSpec,
    *operands: jax.Array,
    config: Config | None = None,
    source: Source | None = None,
) -> tuple[jax.Array, ...]:
    """Runs the kernel on the GPU: :func:`call` under ``jax.jit``.

    Raises:
      jevt_kernels.compat.UnsupportedDevice: if JAX sees no CUDA GPU, or one older than sm_80.
      TypeError, UnsupportedKernel, ImportError: as :func:`call` does.
    """
    if compat.local_compute_capability() is None:
        raise UnsupportedDevice(
            "JAX sees no CUDA GPU. Install its plugin (pip install 'jevt[cuda12]' or "
            "'jevt[cuda13]'), or run the kernel without a GPU: jevt_kernels.interpreter.run."
        )
    return _jitted(spec, config, source)(*operands)
