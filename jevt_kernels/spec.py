"""What a kernel is, before any code is printed: mainloop, space, visitor tree, operand types."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jevt_kernels.index_map import Space, block_axis
from jevt_kernels.visitor import Tree


@dataclasses.dataclass(frozen=True)
class TensorType:
    """Shape and dtype of a dense row-major operand."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Config:
    """A launch configuration: what tuning may vary without changing the result beyond rounding.

    Attributes:
      blocks: tile sizes by tile-axis name, powers of two; "k" is that of every contracted axis.
      num_warps: warps in a thread block; of a specialized kernel, in a group of them.
      num_stages: software-pipelining depth of loops: the loads of so many steps are under way.
      programs: most program instances of a kernel that can walk several tiles in each; 0 for one
        tile an instance.
      group: of matrix products: rows of tiles that are walked column by column, so that the
        operands of tiles computed at the same time stay in the L2 cache.
      splits: of matrix products: parts of the contracted axis, each summed by a program of its own;
        of rowwise kernels: parts of a row, each reduced by a program of its own.
      subtiles: of matrix products: parts of a tile for which the epilogue runs one after the other,
        a power of two.
      descriptors: of matrix products: whether operands are loaded through tensor descriptors, those
        whose layout allows it.
      ahead: of matrix products: whether full tiles that the epilogue loads are loaded before the
        loop, so that their loads overlap with it; they take registers meanwhile.
      specialized: of matrix products on sm_90: how warps share the work beside the one that loads
        operands: "cooperative", "pingpong", "overlapped"
        (:mod:`jevt_kernels.mainloops.specialized`) or "": all warps do the same.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 1
    programs: int = 0
    group: int = 8
    splits: int = 1
    subtiles: int = 1
    descriptors: bool = False
    ahead: bool = False
    specialized: str = ""

    def block(self, name: str) -> int:
        return dict(self.blocks)[block_axis(name)]


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the sets of tensors over which a kernel of the multi_tensor mainloop runs its tree.

    Attributes:
      size: elements of its tensors; those of one element are the same at every point.
      inputs: for each input that the tree names, its position in ``KernelSpec.inputs``.
      outputs: for each output that the tree names, its position in ``KernelSpec.outputs``.
      starts: for each input, the element at which the member's part of it begins; empty where all
        inputs are the member's from their first element on.
    """

    size: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    starts: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Position and start of each input."""
        return tuple(zip(self.inputs, self.starts or (0,) * len(self.inputs), strict=True))


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """A fused kernel as data; hashable, so that equal groups share one compilation.

    Attributes:
      name: identifier of the generated function; appears in profiles.
      mainloop: name of the kernel family, a key of ``jevt_kernels.mainloops.MAINLOOPS``.
      space: the iteration space.
      tree: the visitor tree.
      inputs, outputs: operand types in argument order.
      aliases: pairs (input, output) that share a buffer; the input is consumed.
      comment: lines for the header of the generated source.
      members: of multi_tensor kernels: the tensors of each run of the tree. The inputs and outputs
        that the tree names are then those of a member, and the space is that of the longest.
    """

    name: str
    mainloop: str
    space: Space
    tree: Tree
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    aliases: tuple[tuple[int, int], ...] = ()
    comment: str = dataclasses.field(default="", compare=False)
    members: tuple[Member, ...] = ()

    def __str__(self) -> str:
        """The name alone: ``repr`` shows everything."""
        return self.name

    def member(self, position: int) -> KernelSpec:
        """The pointwise kernel that would do a member's part."""
        one = self.members[position]
        return dataclasses.replace(
            self,
            mainloop="pointwise",
            space=dataclasses.replace(self.space, sizes=(one.size,)),
            inputs=tuple(self.inputs[i] for i in one.inputs),
            outputs=tuple(self.outputs[o] for o in one.outputs),
            aliases=tuple(
                (one.inputs.index(i), one.outputs.index(o))
                for i, o in self.aliases
                if i in one.inputs and o in one.outputs
            ),
            members=(),
        )


@dataclasses.dataclass(frozen=True)
class Partial:
    """An output that a kernel leaves as one partial result a program; a second stage combines them.

    Attributes:
      output: position in ``KernelSpec.outputs``.
      programs: number of partial results, the leading axis of the buffer.
      op: "sum", "max", "min", "prod", "and" or "or".
      dtype: of the partial results.
    """

    output: int
    programs: int
    op: str
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor: how a kernel sees an input when it loads whole tiles by coordinates.

    The host makes it, so that a launch needs no scratch memory, and passes it beside the input's
    pointer. It describes the input from its first element on.

    Attributes:
      name: of the kernel's parameter.
      input: position in ``KernelSpec.inputs``.
      shape, strides: of the dimensions, in elements; the last one is contiguous. What lies beyond
        the shape is loaded as 0.
      block: shape of the tiles.
    """

    name: str
    input: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One of several kernels that compute what a spec asks for.

    Attributes:
      spec: the kernel.
      reads: where its inputs come from: positions among the inputs of the whole, followed by the
        outputs of the steps before it.
    """

    spec: KernelSpec
    reads: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stages:
    """A kernel that is computed by several, one after another.

    Attributes:
      steps: the kernels.
      results: the outputs of the whole: positions among its inputs, followed by the outputs of all
        steps.
    """

    steps: tuple[Step, ...]
    results: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A generated kernel.

    Attributes:
      text: Triton source, a module that defines ``entry``.
      entry: name of the ``@triton.jit`` function. Its parameters are the inputs in order, then the
        descriptors, then the outputs that alias no input (an aliased output is written through its
        input). Inputs and outputs are pointers.
      grid: number of program instances.
      config: the configuration that the text was printed for.
      partials: outputs that need a second stage (``jevt_kernels.partials``).
      descriptors: tensor descriptors of inputs.
      stages: several kernels that compute what the spec asks for; then all the above is about the
        first of them. None where one kernel does.
    """

    text: str
    entry: str
    grid: int
    config: Config
    partials: tuple[Partial, ...] = ()
    descriptors: tuple[Descriptor, ...] = ()
    stages: Stages | None = None


class UnsupportedKernel(ValueError):
    """The spec asks for something that its mainloop cannot generate; the message says what."""
