"""Sums over each member's tensors in multi-tensor kernels: three launches for all members.

LAMB scales each parameter's update by two norms. The first kernel leaves the sums of each block, a
block a program; the second adds up those of a member, in a fixed order; the third runs the tree
with a member's sums as numbers. What the first and the third both read is read twice, and outputs
are all written by the third, as they may be in place.

    update with norms     parts, sums, rest      3 launches for as many members as have pointers
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

#: Launches of a kernel with sums.
LAUNCHES = 3


def is_in_stages(spec: KernelSpec) -> bool:
    """Whether something other than a store reads a sum."""
    sums = sums_of(spec.tree)
    return any(
        not sums.keys().isdisjoint(visitor.operands(node)) and not isinstance(node, Store)
        for node in spec.tree
    )


def sums_of(tree: Sequence[Node]) -> dict[int, Reduce]:
    """The sums by their positions, ascending."""
    return {position: node for position, node in enumerate(tree) if isinstance(node, Reduce)}


def stages(spec: KernelSpec, block: int) -> Stages:
    """The three kernels that compute ``spec``, the first of them in blocks of so many elements."""
    return _Staging(spec, block).stages()


class _Staging:
    """The steps so far.

    Attributes:
      values: types of the inputs of the whole and the outputs of the steps.
    """

    def __init__(self, spec: KernelSpec, block: int) -> None:
        self.spec = spec
        self.sums = sums_of(spec.tree)
        self.counts = [-(-member.size // block) for member in spec.members]
        self.values: list[TensorType] = list(spec.inputs)
        self.steps: list[Step] = []

    def stages(self) -> Stages:
        sizes = [member.size for member in self.spec.members]
        parts = self._sums(self._parts_tree(), sizes, self.counts, "_parts", None)
        loads: list[Node] = [Load(slot, FULL) for slot in range(len(self.sums))]
        for slot, node in enumerate(self.sums.values()):
            loads.append(dataclasses.replace(node, operand=slot))
        loads += [Store(k, len(self.sums) + k, SCALAR) for k in range(len(self.sums))]
        totals = self._sums(loads, self.counts, [1] * len(sizes), "_sums", parts)
        results = self._rest(totals)
        return Stages(tuple(self.steps), results)

    def _parts_tree(self) -> list[Node]:
        """What the sums are made of, the sums, and a store of each."""
        tree = self.spec.tree
        needed = visitor.ancestors(tree, *self.sums)
        place = {position: at for at, position in enumerate(needed)}
        nodes = [visitor.reading(tree[position], place) for position in needed]
        return [*nodes, *(Store(k, place[p], SCALAR) for k, p in enumerate(self.sums))]

    def _sums(
        self,
        nodes: list[Node],
        sizes: Sequence[int],
        counts: Sequence[int],
        suffix: str,
        parts: list[list[int]] | None,
    ) -> list[list[int]]:
        """Adds a kernel that leaves ``counts`` numbers of each sum; where they are in ``values``.

        Args:
          nodes: its tree.
          sizes: of the members.
          counts: of its results.
          suffix: of its name.
          parts: where its inputs are; None for those of the whole.
        """
        kinds = [partial_dtype(node) for node in self.sums.values()]
        outputs = [TensorType((count,), kind) for count in counts for kind in kinds]
        given = [list(member.inputs) for member in self.spec.members]
        return self._step(nodes, sizes, parts or given, outputs, suffix)

    def _rest(self, totals: list[list[int]]) -> tuple[int, ...]:
        """Adds the kernel that runs the tree; where the results of the whole are."""
        spec, slots = self.spec, len(self.spec.members[0].inputs)
        place = {position: slots + k for k, position in enumerate(self.sums)}
        nodes: list[Node] = [
            Load(place[position], SCALAR) if position in place else node
            for position, node in enumerate(spec.tree)
        ]
        given = [[*m.inputs, *own] for m, own in zip(spec.members, totals, strict=True)]
        order = [output for member in spec.members for output in member.outputs]
        sizes = [member.size for member in spec.members]
        outputs = [spec.outputs[output] for output in order]
        found = self._step(nodes, sizes, given, outputs, "_rest", order)
        places = dict(zip(order, (at for own in found for at in own), strict=True))
        return tuple(places[output] for output in range(len(spec.outputs)))

    def _step(
        self,
        nodes: list[Node],
        sizes: Sequence[int],
        given: Sequence[Sequence[int]],
        outputs: list[TensorType],
        suffix: str,
        order: Sequence[int] = (),
    ) -> list[list[int]]:
        """Adds a kernel; for each member, where its outputs are in ``values``.

        Args:
          nodes: the tree, in the slots of ``given``; those that no store needs are left out.
          sizes: of the members.
          given: for each of them, what its inputs are in ``values``.
          outputs: those of one member after the other.
          suffix: of the kernel's name.
          order: for each output, which of the whole's it is.
        """
        tree, slots = _compact(nodes)
        reads = list(dict.fromkeys(own[slot] for own in given for slot in slots))
        at = {value: position for position, value in enumerate(reads)}
        each = len(outputs) // len(sizes)
        members = tuple(
            Member(
                size,
                tuple(at[own[slot]] for slot in slots),
                tuple(range(each * number, each * (number + 1))),
            )
            for number, (size, own) in enumerate(zip(sizes, given, strict=True))
        )
        own_outputs = {output: position for position, output in enumerate(order)}
        spec = dataclasses.replace(
            self.spec,
            name=self.spec.name + suffix,
            space=Space((max(sizes),), self.spec.space.tile),
            tree=tree,
            inputs=tuple(self.values[i] for i in reads),
            outputs=tuple(outputs),
            aliases=tuple(
                (at[i], own_outputs[o]) for i, o in self.spec.aliases if o in own_outputs
            ),
            members=members,
        )
        first = len(self.values)
        self.values += outputs
        self.steps.append(Step(spec, tuple(reads)))
        return [[first + output for output in member.outputs] for member in members]


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
