"""Several kernels that compute the same, as one kernel of the multi_tensor mainloop.

They are pointwise, or rowwise with one row: then they may need sums of their own tensors, or have
these as results.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence

from jevt_kernels import codegen, visitor
from jevt_kernels.index_map import Digit, IndexMap, Space, TileAxis
from jevt_kernels.mainloops import multi_tensor_sums as sums
from jevt_kernels.mainloops.multi_tensor_sums import FULL, SCALAR
from jevt_kernels.mainloops.reduction import OPERATIONS
from jevt_kernels.ops import is_float
from jevt_kernels.spec import KernelSpec, Member, TensorType

#: An index map of a tensor in memory order, an element a point.
_MEMORY_ORDER = (Digit(1, None, 1),)


@dataclasses.dataclass(frozen=True)
class Flat:
    """What a kernel computes, whatever the shape and the order of its operands.

    Attributes:
      tree: its tree, whose inputs and outputs are numbered in the order in which it names them.
      key: equal for kernels that compute the same in the same types.
      inputs, outputs: positions in the kernel of the tree's inputs and outputs.
      size: elements of its tensors.
    """

    tree: visitor.Tree
    key: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    size: int


def flat(spec: KernelSpec) -> Flat | None:
    """A kernel over flat tensors; None if the kernel depends on their shapes.

    It does not where each operand is read or written in memory order, an element a point, or has
    one element; where all reductions are of everything, and none needs another, those that tensors
    need being of floats; and where what is written and has one element is made of these.
    """
    along = _along(spec)
    if along is None or spec.space.size < 2:
        return None
    digests: list[str] = []
    levels, varies = visitor.levels(spec.tree), visitor.dependencies(spec.tree, spec.space)
    for position, node in enumerate(spec.tree):
        text = _describe(node, spec, along, digests)
        match node:
            case visitor.Reduce(operand=operand):
                if levels[position] > 1 or along.name not in varies[operand]:
                    return None
            case visitor.Store(operand=operand) if not any(node.index.strides):
                if along.name in varies[operand] or not levels[operand]:
                    return None
        if not text:
            return None
        # Of the node and all below it, so that stores come in one order however they were given.
        digests.append(hashlib.blake2b(text.encode(), digest_size=12).hexdigest())
    stores = [i for i, node in enumerate(spec.tree) if isinstance(node, visitor.Store)]
    stores.sort(key=lambda position: digests[position])
    nodes, inputs, outputs = _renumbered(spec, stores)
    if len(inputs) < len(spec.inputs) or len(stores) != len(spec.outputs):
        return None
    types = [spec.inputs[i].dtype.name for i in inputs]
    types += [spec.outputs[o].dtype.name for o in outputs]
    late = sums.read_late(nodes)
    if late and spec.space.size > sums.LARGEST:
        return None
    if not all(is_float(sums.sums_of(nodes)[position].dtype) for position in late):
        return None  # their parts are of another type
    # As text, since 0.0 equals -0.0 and NaN does not equal itself.
    return Flat(nodes, f"{nodes!r} {types}", inputs, outputs, spec.space.size)


def _along(spec: KernelSpec) -> TileAxis | None:
    """The tile axis that a kernel's tensors lie along; None if there are two."""
    if spec.mainloop == "pointwise" and len(spec.space.tile) == 1:
        return spec.space.tile[0]
    if spec.mainloop == "rowwise" and spec.space.extent(spec.space.tile_axis("row")) == 1:
        return spec.space.tile_axis("col")
    return None


def merge(
    specs: Sequence[KernelSpec], operands: Sequence[Sequence[Hashable]], name: str
) -> KernelSpec:
    """One kernel that does what several do, each for tensors of its own.

    Args:
      specs: pointwise kernels, or rowwise ones with one row.
      operands: for each of them, what its inputs are; equal ones are the same tensor.
      name: of the kernel.

    Returns:
      A kernel whose inputs are the different ``operands`` in the order of their first appearance,
      and whose outputs are those of the kernels one after the other.

    Raises:
      ValueError: the kernels do not compute the same over flat tensors.
    """
    known = {id(spec): flat(spec) for spec in {id(spec): spec for spec in specs}.values()}
    parts = [part for spec in specs if (part := known[id(spec)]) is not None]
    if not parts or len(parts) < len(specs) or len({part.key for part in parts}) > 1:
        raise ValueError("expected kernels that compute the same over tensors in memory order")
    at: dict[Hashable, int] = {}
    inputs: list[TensorType] = []
    outputs: list[TensorType] = []
    members: list[Member] = []
    for part, spec, given in zip(parts, specs, operands, strict=True):
        for operand, kind in zip(given, spec.inputs, strict=True):
            if operand not in at:
                at[operand] = len(inputs)
                inputs.append(kind)
        mine = tuple(len(outputs) + o for o in part.outputs)
        members.append(Member(part.size, tuple(at[given[i]] for i in part.inputs), mine))
        outputs += spec.outputs
    return KernelSpec(
        name=name,
        mainloop="multi_tensor",
        space=Space((max(part.size for part in parts),), (TileAxis("i", (0,)),)),
        tree=parts[0].tree,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        members=tuple(members),
    )


def launches(spec: KernelSpec) -> int:
    """The number of kernels, one after another, that a kernel is."""
    stages = codegen.generate(spec).stages
    return 1 if stages is None else sum(launches(step.spec) for step in stages.steps)


def _describe(node: visitor.Node, spec: KernelSpec, along: TileAxis, digests: Sequence[str]) -> str:
    """A node as text, without saying which inputs it reads; "" if it depends on shapes."""
    match node:
        case visitor.Load():
            index = _seen(node.index, spec, along, spec.inputs[node.input])
            return f"load {index} {spec.inputs[node.input].dtype}" if index else ""
        case visitor.Store():
            kind = spec.outputs[node.output]
            index = _seen(node.index, spec, along, kind)
            what = "store" if index == FULL else "number"
            return f"{what} {digests[node.operand]} {kind.dtype}" if index else ""
        case visitor.Constant():
            return f"{node}"
        case visitor.Compute():
            below = [digests[o] for o in node.operands]
            return f"{node.op} {below} {node.dtype} {node.result}"
        case visitor.Reduce() if node.op in OPERATIONS:
            return f"{node.op} {digests[node.operand]} {node.dtype}"
        case _:
            return ""


def _seen(
    index: IndexMap, spec: KernelSpec, along: TileAxis, tensor: TensorType
) -> IndexMap | None:
    digits = index.digits(spec.space, along)
    if index.offset:
        return None
    if digits == _MEMORY_ORDER and tensor.size == spec.space.size:
        return FULL
    return SCALAR if not digits and tensor.size == 1 else None


def _renumbered(
    spec: KernelSpec, stores: Sequence[int]
) -> tuple[visitor.Tree, tuple[int, ...], tuple[int, ...]]:
    """The tree in the order in which these stores need its nodes; its inputs and outputs."""
    nodes: list[visitor.Node] = []
    place: dict[int, int] = {}
    inputs: dict[int, int] = {}
    outputs: dict[int, int] = {}
    stack = list(reversed(stores))
    while stack:
        position = stack[-1]
        node = spec.tree[position]
        missing = [o for o in visitor.operands(node) if o not in place]
        if missing:
            stack += reversed(missing)
            continue
        stack.pop()
        if position in place:
            continue
        match node:
            case visitor.Load():
                whole = any(node.index.strides)
                slot = inputs.setdefault(node.input, len(inputs))
                node = visitor.Load(slot, FULL if whole else SCALAR)
            case visitor.Compute():
                node = dataclasses.replace(node, operands=tuple(place[o] for o in node.operands))
            case visitor.Reduce():
                node = dataclasses.replace(node, operand=place[node.operand], over="i")
            case visitor.Store():
                whole = any(node.index.strides)
                output = outputs.setdefault(node.output, len(outputs))
                node = visitor.Store(output, place[node.operand], FULL if whole else SCALAR)
        place[position] = len(nodes)
        nodes.append(node)
    return tuple(nodes), tuple(inputs), tuple(outputs)
