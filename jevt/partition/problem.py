"""One partitioning problem: a component of the graph, with costs and with what makes a group legal.

The greedy partitioner, the integer program and the brute-force oracle of the tests all read this
one description, so that they agree on what is optimised: predicted microseconds, in whole numbers
of a unit that is a nanosecond unless the component takes very long. A group is one kernel, and
costs the less of

    ours   max(traffic, arithmetic) + launch + second stage of sums along rows
    XLA's  max(traffic, arithmetic) + launch, sums along rows at 3/4 of the bandwidth

around a matrix product

    ours   max(mainloop + exposed · (epilogue's traffic and arithmetic), traffic) + launch + stage
    XLA's  what the call of cuBLAS takes, alone or with what it takes along

Traffic is the time of moving the tensors that the group writes (once each, if anything outside the
producer's group needs them) and reads (once by each group that reads them from memory): EVT's "data
movement between partitions" (ASPLOS 2024, section 5), of which :mod:`.cost`, :mod:`.fusions` and
:mod:`.products` make times. XLA runs a group as one kernel if nothing in it reads what is reduced
there, and if it writes nothing beside sums along rows. Whatever XLA would run as several kernels is
several groups. A free node (a row-major reshape) that is a group by itself costs nothing: XLA gives
its result the operand's buffer.

A node of ``copies`` may be in several groups, each of which then computes it for itself. One of
them, the first to run, writes its result if a group without it needs that; a group with a copy
reads what the node reads. So *whether* and *where* something is computed again is decided with the
groups and by the same objective, not before. Which of several groups writes such a result depends
on the order of all of them; that traffic is added to the sum of the groups' times instead.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

from jevt.partition import order

type Grouping = list[list[int]]  # local node indices, each ascending


@dataclasses.dataclass(frozen=True)
class Label:
    """The iteration space of a group.

    Attributes:
      size: points.
      cols: length of its rows, 0 if nothing is reduced.
      late: sums along rows are among its results; such a kernel writes no values of rows.
      product: the space of a matrix product, with sums of any kind among its results.
    """

    size: int
    cols: int
    late: bool = False
    product: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A tensor as far as the component is concerned.

    Attributes:
      nbytes: its size, or the time in which the device moves so much.
      producer: local node, None if it comes from outside.
      consumers: local nodes, ascending.
      read_bytes: the same for each consumer, of what it reads.
      leaves: it is needed outside the component.
      late: a sum along rows, or made from one.
    """

    nbytes: int
    producer: int | None
    consumers: tuple[int, ...]
    read_bytes: tuple[int, ...]
    leaves: bool
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """What a node adds to the time of its group, beside what it moves.

    Attributes:
      ours: arithmetic in a kernel of ours; a matrix product's own is not counted.
      xla: in one of XLA's.
      more: launches beyond one that XLA takes for the node alone.
      sums: it reduces along rows.
      parts: partial results that a kernel of ours leaves of what it reduces: along rows, the same
        where the kernel holds whole rows, which is no less, and beside a matrix product.
      rows: it reduces rows.
    """

    ours: int = 0
    xla: int = 0
    more: int = 0
    sums: bool = False
    parts: tuple[int, int, int] = (0, 0, 0)
    rows: bool = False


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, of which a group holds one at most.

    Attributes:
      node: the node.
      mainloop: the time that its tiles take in a kernel of ours.
      moved: traffic of operands and result, which the mainloop's time covers.
      calls: groups that XLA runs as one call, with the time of each, launch included.
    """

    node: int
    mainloop: int
    moved: int
    calls: tuple[tuple[tuple[int, ...], int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Launches:
    """What is the same for all groups.

    Attributes:
      ours: of a kernel of ours.
      xla: the same of XLA's; None where XLA's kernels are no candidates.
      stage: of a second stage.
      exposed: percent of its time that an epilogue takes, because the mainloop does not hide it.
    """

    ours: int
    xla: int | None = None
    stage: int = 0
    exposed: int = 100

    @property
    def least(self) -> int:
        """Of any kernel."""
        return self.ours if self.xla is None else self.xla


@dataclasses.dataclass(frozen=True)
class Problem:
    """Local nodes are ``0 … size-1`` in an executable order.

    Attributes:
      size: number of nodes.
      edges: producer–consumer pairs that may share a group.
      siblings: pairs of readers of one tensor that may share a group, smaller index first.
      ordered: pairs (u, v) that never share a group; v runs after u, through a path outside the
        component or because no kernel holds both.
      tensors: what moves.
      labels: the spaces that occur.
      firm: for each node, the labels (as a bit mask) whose space it spans, or whose rows it spans.
      inner: for each node, the labels under which it is smaller than both, so that its results must
        not be needed outside the group.
      free: nodes that cost nothing alone.
      launch: what launches cost.
      works: for each node what it costs beside traffic.
      assumed: nodes that hold more than is proven to belong together (see :mod:`.absorb`): a
        refusal of a group with one of them says nothing of groups without.
      chained: pairs of nodes of which the second reads what the first reduces.
      products: the matrix products.
      copies: the nodes that several groups may hold, at one unit of time a copy, so that ties are
        decided against them.
      operands: tensors that a group of several nodes reads and writes, at most; 0 if any number.
        ``build`` refuses more in any case.
      known: times of groups that were measured, or that share their launches with others, which
        replace what the formula says of them. Their nodes have no copies.
      unit: of all times, in microseconds.
    """

    size: int
    edges: tuple[tuple[int, int], ...]
    siblings: tuple[tuple[int, int], ...]
    ordered: tuple[tuple[int, int], ...]
    tensors: tuple[Traffic, ...]
    labels: tuple[Label, ...]
    firm: tuple[int, ...]
    inner: tuple[int, ...]
    free: tuple[bool, ...]
    launch: Launches
    works: tuple[Work, ...]
    assumed: frozenset[int] = frozenset()
    chained: tuple[tuple[int, int], ...] = ()
    products: tuple[Product, ...] = ()
    copies: tuple[int, ...] = ()
    operands: int = 0
    known: tuple[tuple[tuple[int, ...], int], ...] = ()
    unit: float = 1e-3

    def successors(self) -> list[list[int]]:
        """For each node, the nodes that run after it, those of ``ordered`` included."""
        result: list[set[int]] = [set() for _ in range(self.size)]
        for tensor in self.tensors:
            if tensor.producer is not None:
                result[tensor.producer].update(tensor.consumers)
        for before, after in self.ordered:
            result[before].add(after)
        return [sorted(s) for s in result]

    def consumers(self) -> list[set[int]]:
        """For each node, the local nodes that read its results."""
        result: list[set[int]] = [set() for _ in range(self.size)]
        for tensor in self.tensors:
            if tensor.producer is not None:
                result[tensor.producer].update(tensor.consumers)
        return result

    def links(self) -> list[set[int]]:
        """For each node, the nodes with which a candidate edge joins it."""
        result: list[set[int]] = [set() for _ in range(self.size)]
        for a, b in (*self.edges, *self.siblings):
            result[a].add(b)
            result[b].add(a)
        return result

    def cost(self, groups: Sequence[Sequence[int]]) -> int:
        """What the module's formula says of a grouping."""
        traffic = self._traffic(groups)
        held = sum(len(group) for group in groups) - self.size
        times = (
            self.time(group, moved, spread)
            for group, moved, spread in zip(groups, traffic.moved, traffic.spread, strict=True)
        )
        return sum(times) + traffic.by_copies + held

    def time(self, group: Sequence[int], moved: int, spread: bool) -> int:
        """What one group costs.

        Args:
          group: its nodes.
          moved: its traffic.
          spread: whether it writes anything but sums along rows.
        """
        if len(group) == 1 and self.free[group[0]]:
            return 0
        for nodes, time in self.known:
            if nodes == tuple(group):
                return time
        members = set(group)
        works = [self.works[node] for node in group]
        work = sum(w.ours for w in works)
        launch = self.launch
        product = next((p for p in self.products if p.node in members), None)
        if product is not None:
            hidden = 100 * product.mainloop + launch.exposed * work
            epilogue = launch.exposed * max(0, moved - product.moved)
            ours = max(moved, -(-(hidden + epilogue) // 100)) + launch.ours
            parts = sum(w.parts[2] for w in works)
            ours += parts + launch.stage * (parts > 0)
            least = launch.least + moved
            calls = [time for nodes, time in product.calls if nodes == tuple(group)]
            return min([ours, *(max(time, least) for time in calls)])
        whole = any(w.rows for w in works)
        parts = sum(w.parts[whole] for w in works)
        ours = max(moved, work) + launch.ours + parts + launch.stage * (parts > 0)
        sums = any(w.sums for w in works)
        chained = any(a in members and b in members for a, b in self.chained)
        if launch.xla is None or chained or (sums and spread):
            return ours
        slow = -(-moved // 3) if sums else 0
        xla = max(moved + slow, work, sum(w.xla for w in works))
        return min(ours, xla + launch.xla + sum(w.more for w in works))

    def arithmetic(self) -> tuple[list[int], list[int]]:
        """For each node, its arithmetic in a kernel of ours and in one of XLA's."""
        return [w.ours for w in self.works], [w.xla for w in self.works]

    def busy(self, groups: Sequence[Sequence[int]]) -> bool:
        """Whether arithmetic of some group without a product may take longer than its traffic."""
        works = [max(pair) for pair in zip(*self.arithmetic(), strict=True)]
        products = {p.node for p in self.products}
        return any(
            sum(works[node] for node in group) > moved and products.isdisjoint(group)
            for group, moved in zip(groups, self._traffic(groups).moved, strict=True)
        )

    def traffic(self, group: Sequence[int]) -> tuple[int, bool]:
        """What a group without copies moves, and whether it writes anything but sums along rows."""
        others = [[n] for n in range(self.size) if n not in set(group)]
        found = self._traffic([group, *others])
        return found.moved[0], found.spread[0]

    def _traffic(self, groups: Sequence[Sequence[int]]) -> _Moved:
        """What each group of a grouping reads and writes; of groups with one node the first writes.

        A group that only relabels moves nothing.
        """
        holders: list[list[int]] = [[] for _ in range(self.size)]
        for index, group in enumerate(groups):
            for node in group:
                holders[node].append(index)
        idle = {i for i, group in enumerate(groups) if len(group) == 1 and self.free[group[0]]}
        moved, spread, by_copies = [0] * len(groups), [False] * len(groups), 0
        for tensor in self.tensors:
            homes: Sequence[int] = () if tensor.producer is None else holders[tensor.producer]
            reading: dict[int, int] = {}
            for node, amount in zip(tensor.consumers, tensor.read_bytes, strict=True):
                for reader in holders[node]:
                    if reader not in homes:
                        reading[reader] = max(reading.get(reader, 0), amount)
            for reader, amount in reading.items():
                moved[reader] += amount * (reader not in idle)
            if homes and homes[0] not in idle and (tensor.leaves or reading):
                if len(homes) > 1:
                    by_copies += tensor.nbytes
                else:
                    moved[homes[0]] += tensor.nbytes
                    spread[homes[0]] |= not tensor.late
        return _Moved(moved, spread, by_copies)

    def floor(self) -> int | None:
        """A cost below which no grouping is: one group for all; None where that is not a bound.

        Any grouping launches at least once, reads every outer tensor and writes every leaving one.
        Only a free node can beat that, where a tensor and its relabelled twin both leave: one write
        serves both.
        """
        if all(self.free):
            return None
        read: dict[int, int] = {}
        written: dict[int, int] = {}
        for index, tensor in enumerate(self.tensors):
            read.update((node, index) for node in tensor.consumers if self.free[node])
            if tensor.producer is not None:
                written[tensor.producer] = index
        buffer = list(range(len(self.tensors)))  # the tensor whose bytes a relabelled one shares
        for node in sorted(read):
            if node in written:
                buffer[written[node]] = buffer[read[node]]
        leaving = [buffer[i] for i, tensor in enumerate(self.tensors) if tensor.leaves]
        if len(set(leaving)) < len(leaving) or any(
            self.tensors[b].producer is None for b in leaving
        ):
            return None
        whole = self._traffic([range(self.size)])
        # What is reduced and then read is one kernel of ours or two of XLA's.
        several = self.chained or any(w.more for w in self.works)
        kernel = min(self.launch.ours, 2 * self.launch.least) if several else self.launch.least
        work = sum(w.ours for w in self.works)
        return max(whole.moved[0], work) + whole.by_copies + kernel

    def priced(self, known: Iterable[tuple[tuple[int, ...], int]]) -> Problem:
        """The problem with further measured times."""
        return dataclasses.replace(self, known=(*self.known, *known))

    def product_labels(self) -> int:
        """The labels that take a matrix product, as a bit mask."""
        return sum(label.product << bit for bit, label in enumerate(self.labels))

    def fitting(self, group: Iterable[int], hidden: Collection[int]) -> int:
        """The labels under which every node of the group has its place, as a bit mask.

        ``hidden`` are the nodes whose results no group writes.
        """
        members = group if isinstance(group, (set, frozenset)) else set(group)
        mask = (1 << len(self.labels)) - 1
        if not any(p.node in members for p in self.products):
            mask &= ~self.product_labels()
        for node in members:
            here = self.firm[node]
            if node in hidden:
                here |= self.inner[node]
            mask &= here
            if not mask:
                break
        return mask

    def valid(self, groups: Sequence[Sequence[int]]) -> bool:
        """Every node once, or more often if it may be and none is idle; groups connected, of one
        space each, and in an order in which each finds what it reads.

        Acyclicity of the quotient implies convexity of each group: EVT's "no path leaves a
        partition and comes back", but not the other way round.
        """
        if len({self.name(group) for group in groups}) < len(groups):
            return False
        held = collections.Counter(node for group in groups for node in group)
        copied = set(self.copies)
        if set(held) != set(range(self.size)):
            return False
        if any(count > 1 and node not in copied for node, count in held.items()):
            return False
        ranks = order.schedule(groups, self.successors())
        if len(ranks) < len(groups):
            return False
        groups = [groups[rank] for rank in ranks]
        stored = [{self.tensors[t].producer for t in found} for found in self.stored(groups)]
        hidden = self.hidden(groups)
        consumers = self.consumers()
        sets = [set(group) for group in groups]
        if any(len(s) < len(g) for s, g in zip(sets, groups, strict=True)):
            return False
        if any(a in s and b in s for a, b in self.ordered for s in sets):
            return False
        if any(sum(p.node in s for p in self.products) > 1 for s in sets):
            return False
        links = self.links()
        if any(len(components(g, links)) > 1 for g in groups):
            return False
        if any(
            node not in kept and consumers[node] and consumers[node].isdisjoint(s)
            for s, kept in zip(sets, stored, strict=True)
            for node in s & copied
        ):
            return False
        return all(len(g) == 1 or self.fitting(g, hidden) for g in groups)

    def stored(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tensors that each group writes; of groups with one node the first writes its result.

        That is what is needed outside, and what a group reads that does not make it.
        """
        home: dict[int, int] = {}
        holders: list[set[int]] = [set() for _ in range(self.size)]
        for index, group in enumerate(groups):
            for node in group:
                home.setdefault(node, index)
                holders[node].add(index)
        result: list[list[int]] = [[] for _ in groups]
        for index, tensor in enumerate(self.tensors):
            if tensor.producer is not None:
                makers = holders[tensor.producer]
                if tensor.leaves or any(not holders[c] <= makers for c in tensor.consumers):
                    result[home[tensor.producer]].append(index)
        return result

    def hidden(self, groups: Sequence[Sequence[int]]) -> set[int]:
        """The nodes whose results no group writes; of groups with one the first would."""
        written = (self.tensors[t].producer for found in self.stored(groups) for t in found)
        return set(range(self.size)).difference(written)

    def name(self, group: Iterable[int]) -> int:
        """A node that tells groups apart: the product, else the first, without copies if any is."""
        copied, products = set(self.copies), {p.node for p in self.products}
        return min(group, key=lambda node: (node not in products, node in copied, node))

    def key(self) -> Hashable:
        """Equal for problems that differ in nothing but where they sit."""
        return (
            self.edges,
            self.siblings,
            self.ordered,
            self.tensors,
            self.labels,
            self.firm,
            self.inner,
            self.free,
            self.launch,
            self.unit,
            self.assumed,
            self.works,
            self.chained,
            self.products,
            self.copies,
            self.operands,
            self.known,
        )


@dataclasses.dataclass(frozen=True)
class _Moved:
    """Of each group its traffic, whether it writes more than sums; traffic of copies' results."""

    moved: list[int]
    spread: list[bool]
    by_copies: int


def components(
    nodes: Iterable[int], links: Sequence[Iterable[int]] | Mapping[int, Iterable[int]]
) -> Grouping:
    """Connected components of ``nodes`` under ``links``, ordered by their smallest node."""
    remaining = set(nodes)
    result: Grouping = []
    for start in sorted(remaining):
        if start not in remaining:
            continue
        remaining.discard(start)
        stack, found = [start], [start]
        while stack:
            for other in links[stack.pop()]:
                if other in remaining:
                    remaining.discard(other)
                    stack.append(other)
                    found.append(other)
        result.append(sorted(found))
    return result
