"""Reductions of each member's tensors in multi-tensor kernels: a few launches for all members.

LAMB scales each parameter's update by two norms; clipping by the norm of all gradients needs the
sum of squares of each. The first kernel leaves what is reduced of each block, a block a program;
the second combines that of a member, in a fixed order, and computes what needs nothing else; the
third runs the rest of the tree with a member's sums as numbers.

    sums alone            parts, sums            2 launches for as many members as have pointers
    update with norms     parts, sums, rest      3 launches

What is written and needs no sum is written by the first kernel, if there is no third. What the
first and the third both read is read twice. Parts are one tensor for all members, in which those of
a member follow each other, and so are sums that the third kernel reads: they take no pointers.

Members that are all short take one launch, in which a program reduces all that a member has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap, Space
from jevt_kernels.mainloops.reduction import partial_dtype
from jevt_kernels.spec import KernelSpec, Member, Stages, Step, TensorType
from jevt_kernels.visitor import Compute, Load, Node, Reduce, Store

#: How the tree sees a tensor: an element a point, or one element for all points.
FULL, SCALAR = IndexMap((1,)), IndexMap((0,))

#: Elements of a tensor at most: the second kernel holds the parts of its sums on chip.
LARGEST = 1 << 26

#: Elements that one program reduces at most, of all tensors of a member; the same if nothing is
#: computed of them before, so that registers hold nothing else.
_SHORT, _SHORT_PARTS = 1 << 14, 1 << 15


@dataclasses.dataclass(frozen=True)
class Place:
    """The blocks of a member in the grid, from ``first`` up to ``end``."""

    member: int
    first: int
    end: int


def places(sizes: Sequence[int], block: int) -> list[Place]:
    """The blocks of members of these sizes, the longest first; those without elements have none."""
    order = sorted((m for m, size in enumerate(sizes) if size), key=lambda m: -sizes[m])
    result: list[Place] = []
    for member in order:
        first = result[-1].end if result else 0
        result.append(Place(member, first, first - (-sizes[member] // block)))
    return result


def sums_of(tree: Sequence[Node]) -> dict[int, Reduce]:
    """The reductions by their positions, ascending."""
    return {position: node for position, node in enumerate(tree) if isinstance(node, Reduce)}


def read_late(tree: Sequence[Node]) -> list[int]:
    """The sums that a tensor needs which is written."""
    full = [p for p, n in enumerate(tree) if isinstance(n, Store) and n.index == FULL]
    return [p for p in visitor.ancestors(tree, *full) if isinstance(tree[p], Reduce)]


def pointers(tree: Sequence[Node], inputs: int, tensors: int, numbers: int) -> int:
    """Pointers of the launch that takes the most, of a kernel with sums.

    Args:
      tree: the tree.
      inputs: of all members.
      tensors: outputs of all members that have an element a point.
      numbers: those that have one element.
    """
    scalars = inputs if any(isinstance(n, Load) and n.index == SCALAR for n in tree) else 0
    return len(sums_of(tree)) + max(inputs + tensors, scalars + numbers + len(read_late(tree)))


def in_one_program(tree: Sequence[Node], size: int) -> bool:
    """Whether a program holds all that a member of so many elements has, and its sums with it."""
    loaded = {n.input for n in tree if isinstance(n, Load) and n.index == FULL}
    varying = {p for p, n in enumerate(tree) if isinstance(n, Load) and n.index == FULL}
    computed = any(
        not varying.isdisjoint(visitor.operands(n)) for n in tree if isinstance(n, Compute)
    )
    return size * max(1, len(loaded)) <= (_SHORT if computed else _SHORT_PARTS)


def leaves_parts(spec: KernelSpec) -> bool:
    """Whether each program leaves what it has reduced, in outputs that all members share."""
    return bool(shared_outputs(spec))


def shared_outputs(spec: KernelSpec) -> list[int]:
    """The outputs, as the tree numbers them, of which all members have one: parts of sums."""
    slots = range(len(spec.members[0].outputs)) if spec.members and sums_of(spec.tree) else ()
    return [slot for slot in slots if _is_shared(spec, slot)]


def _is_shared(spec: KernelSpec, slot: int) -> bool:
    store = next(n for n in spec.tree if isinstance(n, Store) and n.output == slot)
    if store.index != SCALAR or not isinstance(spec.tree[store.operand], Reduce):
        return False
    first = spec.members[0].outputs[slot]
    if len(spec.members) > 1:
        return all(member.outputs[slot] == first for member in spec.members)
    return spec.outputs[first].size > 1


def stages(spec: KernelSpec, block: int) -> Stages:
    """The kernels that compute ``spec``, the first of them in blocks of so many elements."""
    return _Staging(spec, block).stages()


#: What an input of a member is: a value, and the element at which the member's part begins in it.
type _Given = tuple[int, int]


class _Staging:
    """The steps so far.

    Attributes:
      values: types of the inputs of the whole and the outputs of the steps.
      made: for each output of the whole, where it is among them.
    """

    def __init__(self, spec: KernelSpec, block: int) -> None:
        self.spec = spec
        self.sums = sums_of(spec.tree)
        self.late = read_late(spec.tree)
        self.sizes = [member.size for member in spec.members]
        self.places = places(self.sizes, block)
        self.values: list[TensorType] = list(spec.inputs)
        self.made: dict[int, int] = {}
        self.steps: list[Step] = []
        self.given = [list(member.parts) for member in spec.members]

    def stages(self) -> Stages:
        parts = self._parts()
        totals = self._totals(parts)
        if self.late:
            self._rest(totals)
        results = tuple(self.made[output] for output in range(len(self.spec.outputs)))
        return Stages(tuple(self.steps), results)

    def _stores(self, index: IndexMap) -> list[Store]:
        return [n for n in self.spec.tree if isinstance(n, Store) and n.index == index]

    def _parts(self) -> list[list[_Given]]:
        """Adds the kernel that reduces blocks; for each member, where its parts are."""
        stores = [] if self.late else self._stores(FULL)
        at = _places_without_stores(self.spec.tree)
        nodes = [visitor.reading(self.spec.tree[position], at) for position in at]
        first = len(self.sums)
        nodes += [Store(k, at[position], SCALAR) for k, position in enumerate(self.sums)]
        nodes += [Store(first + k, at[n.operand], FULL) for k, n in enumerate(stores)]
        kinds = [partial_dtype(node) for node in self.sums.values()]
        shared = [TensorType((self.places[-1].end,), kind) for kind in kinds]
        values = self._step(nodes, self.sizes, self.given, shared, stores, "_parts")
        starts = {place.member: place.first for place in self.places}
        return [[(value, starts.get(m, 0)) for value in values] for m in range(len(self.sizes))]

    def _totals(self, parts: list[list[_Given]]) -> list[list[_Given]]:
        """Adds the kernel that combines a member's parts; where the sums are that are read late."""
        counts = [0] * len(self.sizes)
        for place in self.places:
            counts[place.member] = place.end - place.first
        stores, slots = self._stores(SCALAR), len(self.spec.members[0].inputs)
        nodes: list[Node] = []
        at: dict[int, int] = {}
        for position, node in enumerate(self.spec.tree):
            if isinstance(node, Store) or (isinstance(node, Load) and node.index == FULL):
                continue
            if position in self.sums:
                nodes.append(Load(slots + list(self.sums).index(position), FULL))
                node = dataclasses.replace(self.sums[position], operand=len(nodes) - 1)
            elif any(o not in at for o in visitor.operands(node)):
                continue  # it varies
            else:
                node = visitor.reading(node, at)
            at[position] = len(nodes)
            nodes.append(node)
        nodes += [Store(k, at[position], SCALAR) for k, position in enumerate(self.late)]
        first = len(self.late)
        nodes += [Store(first + k, at[n.operand], SCALAR) for k, n in enumerate(stores)]
        given = [[*own, *ours] for own, ours in zip(self.given, parts, strict=True)]
        kinds = [partial_dtype(self.sums[position]) for position in self.late]
        shared = [TensorType((len(self.places),), kind) for kind in kinds]
        values = self._step(nodes, counts, given, shared, stores, "_sums")
        ranks = {place.member: rank for rank, place in enumerate(places(counts, max(counts)))}
        return [[(value, ranks.get(m, 0)) for value in values] for m in range(len(counts))]

    def _rest(self, totals: list[list[_Given]]) -> None:
        """Adds the kernel that runs the tree with sums as numbers."""
        slots = len(self.spec.members[0].inputs)
        place = {position: slots + k for k, position in enumerate(self.late)}
        stores = self._stores(FULL)
        at = _places_without_stores(self.spec.tree)
        nodes: list[Node] = [
            Load(place[position], SCALAR)
            if position in place
            else visitor.reading(self.spec.tree[position], at)
            for position in at
        ]
        nodes += [Store(k, at[n.operand], FULL) for k, n in enumerate(stores)]
        given = [[*own, *ours] for own, ours in zip(self.given, totals, strict=True)]
        self._step(nodes, self.sizes, given, [], stores, "_rest")

    def _step(
        self,
        nodes: list[Node],
        sizes: Sequence[int],
        given: Sequence[Sequence[_Given]],
        shared: Sequence[TensorType],
        stores: Sequence[Store],
        suffix: str,
    ) -> list[int]:
        """Adds a kernel; where the outputs are that its members share.

        Args:
          nodes: the tree, in the slots of ``given``; those that no store needs are left out.
          sizes: of the members.
          given: for each of them, its inputs.
          shared: the outputs that members share, the first ones of the tree.
          stores: those of the whole's tree that write the others.
          suffix: of the kernel's name.
        """
        tree, slots = _compact(nodes)
        reads = list(dict.fromkeys(own[slot][0] for own in given for slot in slots))
        at = {value: position for position, value in enumerate(reads)}
        own = [[m.outputs[n.output] for n in stores] for m in self.spec.members]
        written = [output for outputs in own for output in outputs]
        own_at = {output: len(shared) + position for position, output in enumerate(written)}
        cut = any(inputs[slot][1] for inputs in given for slot in slots)
        members = tuple(
            Member(
                size,
                tuple(at[inputs[slot][0]] for slot in slots),
                (*range(len(shared)), *(own_at[output] for output in outputs)),
                tuple(inputs[slot][1] for slot in slots) if cut else (),
            )
            for size, inputs, outputs in zip(sizes, given, own, strict=True)
        )
        aliases = tuple((at[i], own_at[o]) for i, o in self.spec.aliases if o in own_at and i in at)
        outputs = (*shared, *(self.spec.outputs[output] for output in written))
        spec = dataclasses.replace(
            self.spec,
            name=self.spec.name + suffix,
            space=Space((max(sizes),), self.spec.space.tile),
            tree=tree,
            inputs=tuple(self.values[i] for i in reads),
            outputs=outputs,
            aliases=aliases,
            members=members,
        )
        first = len(self.values)
        self.values += outputs
        self.steps.append(Step(spec, tuple(reads)))
        self.made.update((output, first + position) for output, position in own_at.items())
        return list(range(first, first + len(shared)))


def _places_without_stores(tree: Sequence[Node]) -> dict[int, int]:
    """Where each node is in a tree once the stores are left out."""
    kept = (p for p, node in enumerate(tree) if not isinstance(node, Store))
    return {position: at for at, position in enumerate(kept)}


def _compact(nodes: Sequence[Node]) -> tuple[visitor.Tree, list[int]]:
    """The nodes that stores need, and the slots of the inputs that they read, renumbered."""
    stores = [p for p, node in enumerate(nodes) if isinstance(node, Store)]
    needed = visitor.ancestors(nodes, *stores)
    place = {position: at for at, position in enumerate(needed)}
    slots: list[int] = []
    tree: list[Node] = []
    for position in needed:
        node = visitor.reading(nodes[position], place)
        if isinstance(node, Load):
            if node.input not in slots:
                slots.append(node.input)
            node = dataclasses.replace(node, input=slots.index(node.input))
        assert isinstance(node, Load | Store | Compute | Reduce | visitor.Constant)
        tree.append(node)
    return tuple(tree), slots
