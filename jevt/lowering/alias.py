"""Which outputs of a kernel may be written into the buffer of a donated input."""

from __future__ import annotations

from collections.abc import Set

from jax.extend.core import Jaxpr, Var

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap
from jevt_kernels.spec import KernelSpec


def donated_aliases(spec: KernelSpec, jaxpr: Jaxpr, free: Set[Var]) -> tuple[tuple[int, int], ...]:
    """Pairs (input, output) that can share a buffer.

    An input qualifies when it is in ``free`` (donated, and nothing reads it later) and the kernel
    reads it only where the very same program instance and point writes the output: equal index
    maps, along every tile axis. (A value of a row alone is read by several warps, one of which
    could read after another has written.) Without the alias XLA would have to give the output a
    buffer of its own and copy it over the donated one.

    All outputs share buffers or none does. A kernel's pointers are filled by position, which a
    mixture complicates (see ``launch.call``), for a gain that optimizer updates do not need.
    """
    free_inputs = [i for i, var in enumerate(jaxpr.invars) if var in free]
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for output, kind in enumerate(spec.outputs):
        written = {
            n.index for n in spec.tree if isinstance(n, visitor.Store) and n.output == output
        }
        if not all(_covers(index, spec) for index in written):
            continue
        for candidate in free_inputs:
            read = {
                n.index for n in spec.tree if isinstance(n, visitor.Load) and n.input == candidate
            }
            if candidate not in taken and spec.inputs[candidate] == kind and read == written:
                pairs.append((candidate, output))
                taken.add(candidate)
                break
    return tuple(pairs) if len(pairs) == len(spec.outputs) else ()


def _covers(index: IndexMap, spec: KernelSpec) -> bool:
    """Whether the address varies along every tile axis that stores run along."""
    contracted = {node.over for node in spec.tree if isinstance(node, visitor.Contract)}
    return all(
        tile_axis.name in contracted
        or spec.space.extent(tile_axis) == 1
        or index.depends_on(tile_axis)
        for tile_axis in spec.space.tile
    )
