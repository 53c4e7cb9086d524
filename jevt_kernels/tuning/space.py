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

from jevt_kernels import launch
from jevt_kernels.limits import obstacle
from jevt_kernels.mainloops import MAINLOOPS
from jevt_kernels.spec import Config, KernelSpec, Source, UnsupportedKernel


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
        reason = obstacle(spec, source, config, capability)
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


def describe(config: Config) -> str:
    """A configuration in a few characters: ``128x256x64 w8 s4``."""
    text = "x".join(str(block) for _, block in config.blocks)
    text += f" w{config.num_warps} s{config.num_stages}"
    usual = Config(config.blocks)
    for name, letter in (("programs", "p"), ("group", "g"), ("splits", "k"), ("subtiles", "e")):
        if getattr(config, name) != getattr(usual, name):
            text += f" {letter}{getattr(config, name)}"
    text += " ahead" * config.ahead + " tma" * config.descriptors
    return f"{text} {config.specialized}" if config.specialized else text
