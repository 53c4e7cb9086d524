"""The second stage of reductions whose results several programs have a part in.

A kernel that reduces along rows leaves one partial result for each program that walks a part of
them. The order in which these are combined is fixed, so results are the same bits from run to run.

All results of a kernel with as many parts of the same size are combined by one kernel, which is
columnwise itself: the parts are its rows. (XLA makes one of each result, and on an H200 such a
reduction of a thousand short rows took 6 µs.) A single result of few parts is left to XLA, which
adds up long rows at the speed of memory.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.spec import Config, KernelSpec, Partial, Source, TensorType

# Methods that NumPy's and JAX's arrays share.
_METHODS = {"sum": "sum", "prod": "prod", "max": "max", "min": "min", "or": "max", "and": "min"}

#: From so many parts on, a single result has a kernel of its own.
_MANY = 64

#: Elements of a tile, and the programs that it should leave to the columns: one for each
#: multiprocessor.
_TILE = 2048
_PROGRAMS = 128


@dataclasses.dataclass(frozen=True)
class Combination:
    """A second stage.

    Attributes:
      spec: its inputs are partial results, its outputs the outputs of the first stage.
      config: one program a block of columns.
      outputs: which outputs of the first stage these are.
    """

    spec: KernelSpec
    config: Config
    outputs: tuple[int, ...]


def written(spec: KernelSpec, source: Source) -> KernelSpec:
    """The spec with the outputs that the kernel itself writes.

    They are partial results where there are some.
    """
    outputs = list(spec.outputs)
    for partial in source.partials:
        shape = (partial.programs, *spec.outputs[partial.output].shape)
        outputs[partial.output] = TensorType(shape, partial.dtype)
    return dataclasses.replace(spec, outputs=tuple(outputs))


def combine(
    spec: KernelSpec,
    source: Source,
    results: Sequence[Any],
    run: Callable[..., Sequence[Any]],
) -> tuple[Any, ...]:
    """The kernel's outputs from what it has written.

    Args:
      spec: the kernel.
      source: its text.
      results: what it has written. NumPy arrays give NumPy arrays, JAX's give JAX's.
      run: runs a kernel: ``run(spec, *operands, config=config)``.
    """
    outputs = list(results)
    left = list(source.partials)
    for second in combinations(spec, source):
        operands = [results[output] for output in second.outputs]
        combined = run(second.spec, *operands, config=second.config)
        for output, value in zip(second.outputs, combined, strict=True):
            outputs[output] = value
        left = [partial for partial in left if partial.output not in second.outputs]
    for partial in left:
        values = outputs[partial.output]
        keep = {"dtype": values.dtype} if partial.op in ("sum", "prod") else {}
        total = getattr(values, _METHODS[partial.op])(axis=0, **keep)
        outputs[partial.output] = total.astype(spec.outputs[partial.output].dtype)
    return tuple(outputs)


def combinations(spec: KernelSpec, source: Source) -> list[Combination]:
    """The second stages that are kernels."""
    alike: dict[tuple[int, int], list[Partial]] = collections.defaultdict(list)
    for partial in source.partials:
        alike[partial.programs, spec.outputs[partial.output].size].append(partial)
    return [
        combination(spec, partials, *key)
        for key, partials in alike.items()
        if len(partials) > 1 or key[0] >= _MANY
    ]


def combination(
    spec: KernelSpec, partials: Sequence[Partial], parts: int, size: int
) -> Combination:
    """One kernel that reduces ``[parts, size]`` for each of the partial results.

    Args:
      spec: the kernel that leaves them.
      partials: the results.
      parts: of each.
      size: elements of each part.
    """
    from jevt_kernels.codegen import power_of_two
    from jevt_kernels.mainloops.pipelining import stages

    nodes: list[visitor.Node] = []
    for number, partial in enumerate(partials):
        output = spec.outputs[partial.output]
        # A tensor does not depend on an axis of one element.
        step = int(size > 1)
        nodes.append(visitor.Load(number, IndexMap((size, step))))
        nodes.append(visitor.Reduce(partial.op, len(nodes) - 1, "row", output.dtype))
        nodes.append(visitor.Store(number, len(nodes) - 1, IndexMap((0, step))))
    second = KernelSpec(
        name=f"combine_{parts}_parts",
        mainloop="columnwise",
        space=Space((parts, size), (TileAxis("row", (0,)), TileAxis("col", (1,)))),
        tree=tuple(nodes),
        inputs=tuple(
            TensorType((parts, *spec.outputs[partial.output].shape), partial.dtype)
            for partial in partials
        ),
        outputs=tuple(spec.outputs[partial.output] for partial in partials),
        comment=f"The second stage of {len(partials)} results, {parts} parts of each.",
    )
    across = min(max(16, power_of_two(size // _PROGRAMS)), power_of_two(size), 128)
    down = min(_TILE // across, power_of_two(parts))
    blocks = (("row", down), ("col", across))
    ahead = stages(second, "row", dict(blocks), most=3)
    column_blocks = -(-size // across)
    config = Config(blocks, num_warps=4, num_stages=ahead, programs=column_blocks)
    return Combination(second, config, tuple(partial.output for partial in partials))
