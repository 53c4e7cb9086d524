"""Groups that do the same for tensors of their own become one group: a launch instead of many.

The optimizer's updates are the case in point: for each parameter the same pointwise tree, and for
most parameters a launch costs more than the update. Such groups share no value, so nothing in the
integer program, which counts bytes between nodes, would join them; they are merged here, once every
group and its kernel are known.

    before  g7 = update p0 d0 r;  g8 = update p1 d1 r;  g9 = update p2 d2 r      a kernel each
    after   g7 = multi_tensor update [p0 d0] [p1 d1] [p2 d2] r                   one kernel

Groups may be merged if their kernels compute the same in the same types, over tensors in memory
order, perhaps with sums of these, as LAMB's norms, or with nothing but sums as results, as for the
norm of all gradients (``jevt_kernels.multi_tensor``), with the same donated operands (one that is
not could not be written in place, and then none would be), and with sizes that are all multiples of
16 or none (one that is not would cost all others their vector loads). Those that XLA would fuse
with others left to it stay. The rest is merged if that is predicted faster than what they are now,
kernels of ours and XLA's fusions.

Memory. A merged group runs when the last of its members can, so what the others read has to be kept
until then. Candidates are therefore taken in the order in which they become ready, not in that of
the program, which updates parameters in the order of their names: then neighbours become ready one
after the other. And a merge is closed before what its members keep waiting, with what they make for
other groups, is more than the last-level cache holds. What is read again after the merge could run,
as gradients are once their norm is known, is kept in any case and does not count.

Order. Groups are gone through in an executable order, and a merge is closed before a group that
reads from it. So each merge can run where it is closed, whatever its members: merged groups are
acyclic, and independent of each other without a look at paths. One pass, linear in the program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator, Sequence

from jax.extend.core import Jaxpr, Var

from jevt._context import Context
from jevt.lowering import multi_tensor as lowering
from jevt.lowering.alias import donated_inputs
from jevt.partition import cost, fusions, names, order, targets
from jevt.partition.graph import elements, nbytes
from jevt.partition.joining import joined
from jevt.partition.plan import Group
from jevt_kernels import visitor
from jevt_kernels.mainloops import multi_tensor_sums as sums
from jevt_kernels.mainloops.multi_tensor import MAX_POINTERS
from jevt_kernels.multi_tensor import Flat, flat, launches

#: Elements at the end of a tensor that keep accesses from being 16 bytes wide.
_VECTOR = 16


def merge(
    groups: Sequence[Group], successors: Sequence[Sequence[int]], jaxpr: Jaxpr, context: Context
) -> tuple[Group, ...]:
    """The groups of a plan with those merged that do the same.

    Args:
      groups: in an executable order.
      successors: for each of them, those that depend on it.
      jaxpr: the program.
      context: device, backend and donated inputs.

    Returns:
      Groups in an executable order, named after their places in it.
    """
    program = _Program(groups, successors, jaxpr, context)
    merged: list[Group] = []
    keys: list[int] = []
    owner = [0] * len(groups)
    for members in program.sets():
        together = _joined([groups[m] for m in sorted(members)], context)
        for own in [members] if together else [[m] for m in members]:
            for member in own:
                owner[member] = len(merged)
            merged.append(together or groups[own[0]])
            # Behind what stands where its last member becomes ready.
            keys.append(2 * max(program.ready[m] for m in own) + 1 if together else 2 * own[0])
    if len(merged) == len(groups):
        return tuple(groups)
    after: list[set[int]] = [set() for _ in merged]
    for group, following in enumerate(program.successors):
        after[owner[group]].update(owner[other] for other in following)
    ranks = order.executable(keys, [sorted(s - {own}) for own, s in enumerate(after)])
    assert ranks is not None, "each merged group can run where it was closed"
    return tuple(
        dataclasses.replace(merged[rank], name=names.moved(merged[rank].name, index))
        for index, rank in enumerate(ranks)
    )


def _joined(groups: Sequence[Group], context: Context) -> Group | None:
    """One group in place of several, None if that is not predicted to be faster."""
    if len(groups) < 2:
        return None
    launch = context.device.triton_launch_us
    specs = [g.spec for g in groups if g.spec is not None]
    jaxpr, spec = lowering.join([g.jaxpr for g in groups], specs, "candidate")
    predicted = launches(spec) * launch
    predicted += sum(cost.predict_us(g.jaxpr, context.device) - launch for g in groups)
    if sums.read_late(spec.tree):
        predicted += sum(operand.nbytes for operand in spec.inputs) / context.device.bytes_per_us
    return joined(groups, jaxpr, spec, predicted, context)


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A tensor that a group reads and the program makes.

    Attributes:
      nbytes: its size.
      ready: when the group can run.
      kept: until when other readers keep it.
    """

    nbytes: int
    ready: int
    kept: float


@dataclasses.dataclass
class _Set:
    """Groups to be merged, as long as others may join.

    Attributes:
      members: positions of the groups.
      tree: what all of them compute.
      ready: when the last of them can run.
      operands: the tensors that they read and the program makes.
      made: bytes that members write for other groups.
      tensors, numbers: how many of their results have many elements, and one.
      read: their operands.
      large: those that are no scalars.
    """

    members: list[int]
    tree: visitor.Tree
    ready: int
    operands: list[_Operand]
    made: int
    tensors: int
    numbers: int
    read: set[Var]
    large: set[Var]

    def add(self, other: _Set) -> None:
        """Takes in another one, which becomes ready no earlier."""
        self.members += other.members
        self.ready = other.ready
        self.operands += other.operands
        self.made += other.made
        self.tensors += other.tensors
        self.numbers += other.numbers
        self.read |= other.read
        self.large |= other.large

    def takes(self, other: _Set, cache: int) -> bool:
        """Whether another one, which becomes ready no earlier, may be taken in."""
        late = other.ready
        waiting = sum(o.nbytes for o in self.operands if o.ready < late and o.kept < late)
        read, tensors = len(self.read | other.read), self.tensors + other.tensors
        pointers = sums.pointers(self.tree, read, tensors, self.numbers + other.numbers)
        return (
            pointers <= MAX_POINTERS
            and waiting + self.made + other.made <= cache
            and self.large.isdisjoint(other.large)
        )


def _fuses(group: Group) -> bool:
    """Whether XLA fuses what this group reads into it."""
    return group.target == "xla" and group.kind in ("pointwise", "rowwise", "columnwise")


def _passes_on(group: Group) -> bool:
    """Whether XLA fuses this group into its only reader; a reduction ends a fusion."""
    computes = any(not fusions.relabels(eqn) for eqn in group.jaxpr.eqns)
    return group.target == "xla" and group.kind == "pointwise" and computes


class _Program:
    """The groups of a program, and which of them may be merged."""

    def __init__(
        self,
        groups: Sequence[Group],
        successors: Sequence[Sequence[int]],
        jaxpr: Jaxpr,
        context: Context,
    ) -> None:
        self.groups = groups
        self.context = context
        self.donated = donated_inputs(jaxpr, context)
        self.outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
        self.maker = {v: g for g in groups for v in g.jaxpr.outvars if isinstance(v, Var)}
        self.readers: dict[Var, list[int]] = {}
        for index, group in enumerate(groups):
            for var in group.jaxpr.invars:
                self.readers.setdefault(var, []).append(index)
        self._flat: dict[int, Flat | None] = {}
        self.keys = {i: key for i, g in enumerate(groups) if (key := self._key(i, g)) is not None}
        self.successors = self._in_place(successors)
        self.predecessors: list[list[int]] = [[] for _ in groups]
        for index, following in enumerate(self.successors):
            for other in following:
                self.predecessors[other].append(index)
        self.ready = self._ready()

    def sets(self) -> Iterator[list[int]]:
        """All groups, those together that may be merged, in an order in which these can run."""
        open_: dict[Hashable, _Set] = {}
        for index in sorted(range(len(self.groups)), key=lambda i: (self.ready[i], i)):
            for before in self.predecessors[index]:
                key = self.keys.get(before)
                if key in open_ and before in open_[key].members:
                    yield open_.pop(key).members
            if index not in self.keys:
                yield [index]
                continue
            key, alone = self.keys[index], self._alone(index)
            if key in open_ and not open_[key].takes(alone, self.context.device.l2_bytes):
                yield open_.pop(key).members
            if key in open_:
                open_[key].add(alone)
            else:
                open_[key] = alone
        for left in open_.values():
            yield left.members

    def _key(self, index: int, group: Group) -> Hashable | None:
        """Equal for groups that may be merged, None for one that may not."""
        spec = group.spec
        if spec is None or group.kind not in ("pointwise", "rowwise"):
            return None
        if group.target == "xla" and not self._movable(group):
            return None
        if id(spec) not in self._flat:  # one object for all equal groups
            self._flat[id(spec)] = flat(spec)
        found = self._flat[id(spec)]
        if found is None or len(lowering.split(group.jaxpr)) > 1:
            return None
        writes = any(elements(v.aval) > 1 for v in group.jaxpr.outvars)
        free = tuple(writes and self._free(group.jaxpr.invars[i], index) for i in found.inputs)
        return found.key, free, found.size % _VECTOR == 0

    def _movable(self, group: Group) -> bool:
        """Whether a group that is left to XLA may be a kernel.

        Not against the user's will, and not if XLA would fuse it with others that are left to it:
        what passes between them would have to be written then, and no launch be saved. (A sum ends
        a fusion, so that a group with one is a launch in any case.)
        """
        if group.fallback or not targets.chooses(self.context):
            return False
        made = (v for v in group.jaxpr.outvars if isinstance(v, Var))
        readers = (self.groups[r] for v in made for r in self.readers.get(v, ()))
        if group.kind == "pointwise" and any(map(_fuses, readers)):
            return False
        return not any(
            var in self.maker and len(self.readers[var]) == 1 and _passes_on(self.maker[var])
            for var in group.jaxpr.invars
            if elements(var.aval) > 1 and var not in self.outputs
        )

    def _free(self, var: Var, index: int) -> bool:
        """Whether a group may overwrite an input of the program: it is the last to read it."""
        return var in self.donated and var not in self.outputs and self.readers[var][-1] == index

    def _in_place(self, successors: Sequence[Sequence[int]]) -> list[list[int]]:
        """What runs after each group: what depends on it, and what may overwrite what it reads."""
        result = [list(following) for following in successors]
        for index in self.keys:
            for var in self.groups[index].jaxpr.invars:
                if elements(var.aval) > 1 and self._free(var, index):
                    for reader in self.readers[var][:-1]:
                        result[reader].append(index)
        return result

    def _ready(self) -> list[int]:
        """For each group its position; for one that may be merged, that of the last before it."""
        result: list[int] = []
        for index, before in enumerate(self.predecessors):
            last = max((result[p] for p in before), default=-1)
            result.append(last if index in self.keys else index)
        return result

    def _alone(self, index: int) -> _Set:
        jaxpr, ready = self.groups[index].jaxpr, self.ready[index]
        found = self._flat[id(self.groups[index].spec)]
        assert found is not None, "groups with a key are flat"
        large = {v for v in jaxpr.invars if elements(v.aval) > 1}
        results = [v for v in jaxpr.outvars if isinstance(v, Var)]
        tensors = sum(elements(v.aval) > 1 for v in results)
        return _Set(
            members=[index],
            tree=found.tree,
            ready=ready,
            operands=[
                _Operand(nbytes(v.aval), ready, self._kept(v, index))
                for v in jaxpr.invars
                if v in large and v in self.maker
            ],
            made=sum(nbytes(v.aval) for v in results if v not in self.outputs),
            tensors=tensors,
            numbers=len(results) - tensors,
            read=set(jaxpr.invars),
            large=large,
        )

    def _kept(self, var: Var, index: int) -> float:
        """When the last group but one reads a tensor; never before the end what is an output."""
        others = [self.ready[reader] for reader in self.readers[var] if reader != index]
        return math.inf if var in self.outputs else max(others, default=-1)
