"""Kernels compiled side by side, ahead of the program that calls them.

jax-triton compiles a kernel when a program that calls it is lowered, one after the other. Triton's
compiler holds no lock for most of its time, so that threads take a part of it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax

from jevt_kernels import launch
from jevt_kernels.spec import Config, KernelSpec

type Kernel = tuple[KernelSpec, Config | None]


def compile_all(kernels: Iterable[Kernel], capability: int) -> dict[Kernel, Exception]:
    """Compiles each of the kernels once, so that the calls find their binaries.

    Args:
      kernels: with their launch configurations, None for the default.
      capability: compute capability of the GPU, 0 for the first visible one's.

    Returns:
      The errors of those that do not compile.
    """
    distinct = list(dict.fromkeys(kernels))
    x64 = jax.config.jax_enable_x64

    def compile_one(kernel: Kernel) -> Exception | None:
        spec, config = kernel
        try:
            with jax.enable_x64(x64):  # as it is in the caller's thread
                launch.precompile(spec, capability, config)
        except Exception as error:  # noqa: BLE001 - whatever the compiler stack raises, the program must still run
            return error
        return None

    # Threads share the filters of warnings: what one of them installs and takes away for its own
    # calls has to be the same for all.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        outcomes = list(pool.map(compile_one, distinct))
    return {
        kernel: error for kernel, error in zip(distinct, outcomes, strict=True) if error is not None
    }
