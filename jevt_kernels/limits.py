"""What a GPU can run of a kernel's configurations, and what it runs if nothing was measured.

Known before anything is compiled: the grid that CUDA launches, tensor descriptors, shared memory
for a loop's operands, registers for its result.
"""

from __future__ import annotations

import functools
import math

from jevt_kernels import compat, launch
from jevt_kernels.mainloops import MAINLOOPS, gemm_configs, gemm_tiles, pipelining, product
from jevt_kernels.spec import Config, KernelSpec, Source, UnsupportedKernel

#: 32-bit registers of a thread, of which addresses and the operands of a step take some.
_REGISTERS = 255
_OTHER_REGISTERS = 24

#: Mainloops whose programs load blocks of rows ahead.
_WALK_ROWS = ("rowwise", "columnwise")

#: Warps of a thread block.
_MOST_WARPS = 32


@functools.lru_cache(maxsize=4096)
def default_config(spec: KernelSpec, capability: int) -> Config | None:
    """The mainloop's most preferred configuration that a GPU can run.

    Args:
      spec: the kernel.
      capability: compute capability of the GPU, 90 for sm_90.

    Returns:
      None if the GPU can run none of them, or if there is no such mainloop.

    Raises:
      UnsupportedKernel: if the mainloop cannot generate the kernel.
    """
    for config in MAINLOOPS[spec.mainloop].configs(spec) if spec.mainloop in MAINLOOPS else ():
        try:
            source = launch.source_for(spec, config)
        except UnsupportedKernel:
            continue
        if not obstacle(spec, source, config, capability):
            return config
    return None


def obstacle(spec: KernelSpec, source: Source, config: Config, capability: int) -> str:
    """Why a configuration cannot run on a GPU, "" if nothing is known against it."""
    try:
        launch.check_grid(spec, source)
        launch.check_descriptors(spec, source, capability)
    except UnsupportedKernel as error:
        return str(error)
    if config.num_warps > _MOST_WARPS:
        return f"{config.num_warps} warps, a thread block has {_MOST_WARPS} at most"
    limit = compat.shared_memory_limit(capability)
    if spec.mainloop in _WALK_ROWS:
        shared = pipelining.shared_bytes(spec, "row", source.config)
        if shared > limit:
            return f"{shared} bytes of shared memory for tiles under way, {limit} at most"
    if spec.mainloop != "gemm":
        return ""
    found = product.find(spec)
    shared = gemm_configs.shared_bytes(spec, found, config)
    if shared > limit:
        return f"{shared} bytes of shared memory for operands and results, {limit} at most"
    registers = gemm_tiles.held(config) * math.ceil(found.node.dtype.itemsize / 4)
    if registers > _REGISTERS - _OTHER_REGISTERS:
        return f"{registers} registers a thread for the result, {_REGISTERS} at most for all"
    return ""
