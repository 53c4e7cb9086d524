"""Compiling a :class:`~jevt_kernels.spec.KernelSpec` ahead of time; no GPU is needed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from jevt_kernels import compat, gluon_kernels, launch, limits, partials
from jevt_kernels.gluon_kernels import GluonKernel
from jevt_kernels.spec import Config, KernelSpec, Source

# jax-triton passes buffers of this alignment and tells Triton so; the code depends on it.
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled kernel and the resources that it takes.

    Attributes:
      arch: compute capability that it was compiled for, 90 for sm_90.
      ptx: the assembly.
      cubin: the machine code.
      registers: registers of a thread, 255 at most.
      spill_bytes: bytes that a thread stores to local memory for want of registers; 0 is wanted.
      stack_bytes: bytes of local memory that a thread uses, spills included.
      shared_bytes: shared memory of a thread block.
      scratch_bytes: memory that a launch must allocate, which XLA's captured graphs cannot do; 0 is
        wanted.
      num_warps: warps of a thread block, which warp specialisation can raise above the requested.
    """

    arch: int
    ptx: str = dataclasses.field(repr=False)
    cubin: bytes = dataclasses.field(repr=False)
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    scratch_bytes: int
    num_warps: int


def compile(  # noqa: A001
    spec: KernelSpec,
    arch: int,
    *,
    config: Config | None = None,
    source: Source | None = None,
) -> Binary:
    """Compiles the kernel for an NVIDIA GPU with Triton's own ptxas; no GPU or driver is needed.

    Of several stages, the first.

    Args:
      spec: the kernel.
      arch: compute capability, 80 (A100) or 90 (H100).
      config: launch configuration; the default is the mainloop's first that the GPU can run.
      source: printed kernel to use instead of generating one; it brings its own configuration.

    Raises:
      RuntimeError: if Triton was imported with ``TRITON_INTERPRET=1``.
      UnsupportedKernel: if the spec cannot be generated.
      jevt_kernels.compat.UnsupportedDevice: if ``arch`` is below 80.
      ImportError: if Triton is missing or too old.
    """
    compat.check_compute_capability(arch)
    if source is None:
        source = launch.source_for(spec, config or limits.default_config(spec, arch))
    if source.stages is not None:
        spec = source.stages.steps[0].spec
    launch.check_descriptors(spec, source, arch)
    return _of_source(source, launch.signature(partials.written(spec, source), source), arch)


@functools.lru_cache(maxsize=256)
def _of_source(source: Source, signature: tuple[str, ...], arch: int) -> Binary:
    _check_compiler()
    config = source.config
    return _compile(launch.load(source), signature, {}, arch, config.num_warps, config.num_stages)


@functools.lru_cache(maxsize=256)
def compile_gluon(kernel: GluonKernel, arch: int) -> Binary:
    """Compiles a kernel that is written by hand, as :func:`compile` does.

    Args:
      kernel: the kernel.
      arch: compute capability, 90 (H100).

    Raises:
      RuntimeError, UnsupportedKernel, ImportError: as :func:`compile` does.
    """
    gluon_kernels.check_capability(kernel, arch)
    _check_compiler()
    constants = dict(kernel.constants)
    return _compile(kernel.load(), kernel.signature, constants, arch, kernel.num_warps, 1)


def _check_compiler() -> None:
    compat.triton_version()
    if compat.interpreting():
        raise RuntimeError(
            "Triton was imported with TRITON_INTERPRET=1, so it cannot compile. Unset the "
            "variable; interpret and compile in separate processes."
        )


def _compile(
    kernel: Any,
    signature: tuple[str, ...],
    constants: dict[str, Any],
    arch: int,
    num_warps: int,
    num_stages: int,
) -> Binary:
    triton: Any = importlib.import_module("triton")
    backends: Any = importlib.import_module("triton.backends.compiler")
    names = kernel.arg_names
    if len(names) != len(signature) + len(constants):
        raise ValueError(
            f"expected {kernel.__name__} to take {len(signature) + len(constants)} parameters, got"
            f" {names}"
        )
    types = (*signature, *["constexpr"] * len(constants))
    compiled = triton.compile(
        compat.ast_source(kernel)(
            kernel,
            dict(zip(names, types, strict=True)),
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={
                (i,): [["tt.divisibility", _ALIGNMENT]]
                for i, parameter in enumerate(signature)
                if parameter.startswith("*")
            },
        ),
        target=backends.GPUTarget("cuda", arch, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            **compat.backend_options(arch),
        },
    )
    usage = _resource_usage(compiled.asm["cubin"])
    # Without a stack there are no spills, and ptxas, which compiles once more, need not be asked.
    spills = _spill_bytes(compiled.asm["ptx"]) if usage["STACK"] or usage["LOCAL"] else 0
    return Binary(
        arch=arch,
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        registers=usage["REG"],
        spill_bytes=spills,
        stack_bytes=max(usage["STACK"], usage["LOCAL"]),
        shared_bytes=compiled.metadata.shared,
        scratch_bytes=compiled.metadata.global_scratch_size,
        num_warps=compiled.metadata.num_warps,
    )


def _tool(name: str) -> str:
    """Path of a CUDA tool that Triton's wheel brings."""
    package = importlib.import_module("triton.backends.nvidia")
    return str(Path(package.__path__[0]) / "bin" / name)


def _execute(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with code {result.returncode}:\n{output}")
    return output


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Reads ``Function f: REG:16 STACK:0 SHARED:0 LOCAL:0 ...`` of the only function."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        output = _execute(_tool("cuobjdump"), "--dump-resource-usage", str(path))
    usage = {key: int(value) for key, value in re.findall(r"\b(\w+):(\d+)", output)}
    if missing := {"REG", "STACK", "LOCAL"} - usage.keys():
        raise RuntimeError(f"expected {sorted(missing)} in the output of cuobjdump, got\n{output}")
    return usage


def _spill_bytes(ptx: str) -> int:
    """Bytes of spill stores that ptxas reports."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError(f"expected a .target line in the PTX, got\n{ptx[:500]}")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(ptx)
        output = _execute(
            *(_tool("ptxas"), "-v", f"--gpu-name={target[1]}", str(path)),
            *("-o", str(Path(directory) / "kernel.cubin")),
        )
    spills = re.search(r"(\d+) bytes spill stores", output)
    if spills is None:
        raise RuntimeError(f"expected the spill stores in the output of ptxas -v, got\n{output}")
    return int(spills[1])
