"""Which outputs of a kernel may be written into the buffer of a donated input."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType

from jax.extend.core import Jaxpr, Var

from jevt._context import Context
from jevt._jaxpr import aval
from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap
from jevt_kernels.spec import KernelSpec

type Pairs = tuple[tuple[int, int], ...]


def donated_inputs(jaxpr: Jaxpr, context: Context) -> frozenset[Var]:
    """The inputs of the program whose buffers its caller gives up."""
    if len(context.donated) != len(jaxpr.invars):
        return frozenset()
    return frozenset(v for v, d in zip(jaxpr.invars, context.donated, strict=True) if d)


def partners(jaxpr: Jaxpr, donated: Set[Var]) -> dict[Var, Var]:
    """For outputs of the program, the donated input whose buffer JAX has them returned in.

    JAX goes by type and order. A kernel that wrote an output into another input's buffer would save
    nothing: XLA would have to copy it.
    """
    waiting: dict[object, collections.deque[Var]] = collections.defaultdict(collections.deque)
    for var in jaxpr.invars:
        if var in donated:
            waiting[aval(var).shape, aval(var).dtype].append(var)
    result: dict[Var, Var] = {}
    for atom in jaxpr.outvars:
        buffers = waiting[aval(atom).shape, aval(atom).dtype]
        if buffers:
            buffer = buffers.popleft()
            if isinstance(atom, Var):
                result.setdefault(atom, buffer)
    return result


def donated_aliases(
    spec: KernelSpec,
    jaxpr: Jaxpr,
    free: Set[Var],
    wanted: Mapping[Var, Var] = MappingProxyType({}),
) -> Pairs:
    """Pairs (input, output) that can share a buffer.

    An input qualifies when it is in ``free`` (donated, and nothing reads it later) and the kernel
    reads it only where the very same program instance and point writes the output: equal index
    maps, along every tile axis. (A value of a row alone is read by several warps, one of which
    could read after another has written.) Without the alias XLA would have to give the output a
    buffer of its own and copy it over the donated one.

    All outputs share buffers or none does. A kernel's pointers are filled by position, which a
    mixture complicates (see ``launch.call``), for a gain that optimizer updates do not need. For
    the same reason all members of a multi-tensor kernel share the same ones; but sums that one has
    beside its updates, a few bytes, have buffers of their own.

    Args:
      spec: the kernel.
      jaxpr: what it computes.
      free: inputs that may be overwritten.
      wanted: for outputs, the input that would be best, see :func:`partners`.
    """
    if not spec.members:
        return _pairs(spec, jaxpr.invars, jaxpr.outvars, free, wanted)
    read = collections.Counter(i for one in spec.members for i in set(one.inputs))
    free = {v for i, v in enumerate(jaxpr.invars) if v in free and read[i] == 1}
    found = [
        _pairs(
            spec.member(position),
            [jaxpr.invars[i] for i in one.inputs],
            [jaxpr.outvars[o] for o in one.outputs],
            free,
            wanted,
            own_numbers=True,
        )
        for position, one in enumerate(spec.members)
    ]
    if any(pairs != found[0] for pairs in found):
        return ()
    return tuple((m.inputs[i], m.outputs[o]) for m in spec.members for i, o in found[0])


def _pairs(
    spec: KernelSpec,
    invars: Sequence[Var],
    outvars: Sequence[object],
    free: Set[Var],
    wanted: Mapping[Var, Var],
    *,
    own_numbers: bool = False,
) -> Pairs:
    partner = [wanted.get(v) if isinstance(v, Var) else None for v in outvars]
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for output, kind in enumerate(spec.outputs):
        written = {
            n.index for n in spec.tree if isinstance(n, visitor.Store) and n.output == output
        }
        if not all(_covers(index, spec) for index in written):
            continue
        # Its partner first, another output's partner last.
        candidates = sorted(
            (i for i, var in enumerate(invars) if var in free),
            key=lambda i: 0 if invars[i] is partner[output] else 1 + (invars[i] in partner),
        )
        for candidate in candidates:
            read = {
                n.index for n in spec.tree if isinstance(n, visitor.Load) and n.input == candidate
            }
            if candidate not in taken and spec.inputs[candidate] == kind and read == written:
                pairs.append((candidate, output))
                taken.add(candidate)
                break
    numbers = sum(kind.size == 1 for kind in spec.outputs) if own_numbers else 0
    return tuple(pairs) if len(pairs) + numbers == len(spec.outputs) else ()


def _covers(index: IndexMap, spec: KernelSpec) -> bool:
    """Whether the address varies along every tile axis that stores run along."""
    contracted = {node.over for node in spec.tree if isinstance(node, visitor.Contract)}
    return all(
        tile_axis.name in contracted
        or spec.space.extent(tile_axis) == 1
        or index.depends_on(tile_axis)
        for tile_axis in spec.space.tile
    )
