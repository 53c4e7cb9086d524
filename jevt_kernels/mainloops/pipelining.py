"""How far ahead a loop over tiles loads: what Triton keeps in shared memory meanwhile."""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.spec import Config, KernelSpec

#: Bytes of shared memory that a thread block may take for tiles under way, so that several blocks
#: fit on a multiprocessor of any present GPU (164 KiB on an A100, 228 KiB on an H100).
_BUDGET = 48 * 1024


def stages(spec: KernelSpec, over: str, blocks: dict[str, int], most: int = 4) -> int:
    """The deepest pipeline, at most ``most``, whose tiles under way fit.

    Args:
      spec: the kernel.
      over: the tile axis that the loop walks.
      blocks: tile sizes by tile-axis name.
      most: stages beyond which nothing is gained.
    """
    return max(1, min(most, 1 + _BUDGET // max(1, _step_bytes(spec, over, blocks))))


def shared_bytes(spec: KernelSpec, over: str, config: Config) -> int:
    """Bytes of shared memory that the tiles under way take in a loop along the tile axis ``over``.

    A step's tiles are in registers by the time that it computes.
    """
    return (config.num_stages - 1) * _step_bytes(spec, over, dict(config.blocks))


def _step_bytes(spec: KernelSpec, over: str, blocks: dict[str, int]) -> int:
    """Bytes of the tiles that a step loads."""
    return sum(
        spec.inputs[load.input].dtype.itemsize * _elements(load, spec, blocks)
        for load in {node for node in spec.tree if isinstance(node, visitor.Load)}
        if load.index.depends_on(spec.space.tile_axis(over))
    )


def _elements(load: visitor.Load, spec: KernelSpec, blocks: dict[str, int]) -> int:
    size = 1
    for tile_axis in spec.space.tile:
        if load.index.depends_on(tile_axis):
            size *= blocks[tile_axis.name]
    return size
