"""Which configurations of a kernel are worth measuring, known before anything is compiled.

The mainloop names them in the order of its own model. Here goes what cannot run or is said twice:
configurations that cannot be generated, whose grid CUDA does not launch, that ask for tensor
descriptors on a GPU without them, whose operands do not fit into shared memory or whose result not
into registers, and those that print the same text as an earlier one. Compiling ahead of time would
tell registers and shared memory exactly, but costs as much as what it would save.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from jevt_kernels import launch
from jevt_kernels.mainloops import MAINLOOPS, gemm_configs, product
from jevt_kernels.spec import Config, KernelSpec, Source, UnsupportedKernel

#: Bytes of shared memory that a thread block may have, by compute capability (CUDA C++ Programming
#: Guide, technical specifications).
_SHARED_BYTES = {
    80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10,
    90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
}  # fmt: skip

#: 32-bit registers of a thread, of which addresses and the operands of a step take some.
_REGISTERS = 255
_OTHER_REGISTERS = 24

#: Warps of a thread block.
_MOST_WARPS = 32


@dataclasses.dataclass(frozen=True)
class Space:
    """The configurations of one kernel.

    Attributes:
      chosen: those to measure, the most promising first.
      left: further ones that could run, in the same order.
      pruned: those that could not, with the reason.
    """

    chosen: tuple[Config, ...]
    left: tuple[Config, ...] = ()
    pruned: tuple[tuple[Config, str], ...] = ()


def search_space(spec: KernelSpec, capability: int, most: int) -> Space:
    """What to measure of a kernel.

    Args:
      spec: the kernel.
      capability: compute capability of the GPU, 90 for sm_90.
      most: configurations to measure at most.

    Returns:
      The same for the same arguments.
    """
    seen: set[tuple[Source, int, int]] = set()
    promising: list[Config] = []
    pruned: list[tuple[Config, str]] = []
    for config in offered(spec):
        try:
            source = launch.source_for(spec, config)
        except UnsupportedKernel as error:
            pruned.append((config, str(error)))
            continue
        reason = _obstacle(spec, source, config, capability)
        # Blocks longer than their axis are cut, so two configurations can be one.
        printed = (
            dataclasses.replace(source, config=Config(())),
            config.num_warps,
            config.num_stages,
        )
        if not reason and printed in seen:
            reason = "prints the same kernel as an earlier one"
        if reason:
            pruned.append((config, reason))
        else:
            seen.add(printed)
            promising.append(config)
    return Space(tuple(promising[:most]), tuple(promising[most:]), tuple(pruned))


@functools.lru_cache(maxsize=4096)
def offered(spec: KernelSpec) -> tuple[Config, ...]:
    """All configurations of the kernel's mainloop, the preferred one first."""
    try:
        return MAINLOOPS[spec.mainloop].configs(spec)
    except UnsupportedKernel:
        return ()


def _obstacle(spec: KernelSpec, source: Source, config: Config, capability: int) -> str:
    """Why a configuration cannot run on a GPU, "" if nothing is known against it."""
    try:
        launch.check_grid(spec, source)
        launch.check_descriptors(spec, source, capability)
    except UnsupportedKernel as error:
        return str(error)
    if config.num_warps > _MOST_WARPS:
        return f"{config.num_warps} warps, a thread block has {_MOST_WARPS} at most"
    if spec.mainloop != "gemm":
        return ""
    found = product.find(spec)
    shared, limit = gemm_configs.shared_bytes(found, config), _shared_limit(capability)
    if shared > limit:
        return f"{shared} bytes of shared memory for the operands, {limit} at most"
    held = config.block("m") * config.block("n") // (32 * config.num_warps)
    registers = held * math.ceil(found.node.dtype.itemsize / 4)
    if registers > _REGISTERS - _OTHER_REGISTERS:
        return f"{registers} registers a thread for the result, {_REGISTERS} at most for all"
    return ""


def _shared_limit(capability: int) -> int:
    older = [known for known in _SHARED_BYTES if known <= capability]
    return _SHARED_BYTES[max(older, default=min(_SHARED_BYTES))]


def describe(config: Config) -> str:
    """A configuration in a few characters: ``128x256x64 w8 s4``."""
    text = "x".join(str(block) for _, block in config.blocks)
    text += f" w{config.num_warps} s{config.num_stages}"
    usual = Config(config.blocks)
    for name, letter in (("programs", "p"), ("group", "g"), ("splits", "k"), ("subtiles", "e")):
        if getattr(config, name) != getattr(usual, name):
            text += f" {letter}{getattr(config, name)}"
    return text + " tma" * config.descriptors
