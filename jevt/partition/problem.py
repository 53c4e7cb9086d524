"""One partitioning problem: a component of the graph, with costs and with what makes a group legal.

The greedy partitioner, the integer program and the brute-force oracle of the tests all read this
one description, so that they agree on what is optimised:

    cost = launch · (number of groups)
         + bytes of tensors written (once each, if anything outside the producer's group needs them)
         + bytes of tensors read (once by each group that reads them from memory)
         + what a matrix product takes longer in a group with others than alone
         + the arithmetic of every copy of a node beyond the first

in bytes, a launch counted as the bytes that the device moves in its time. EVT's objective is the
second and third line ("minimize the data movement between partitions", ASPLOS 2024, section 5);
training graphs also hold many small tensors for which the launch is what matters. A free node (a
row-major reshape) that is a group by itself costs nothing: XLA gives its result the operand's
buffer.

A node of ``copies`` may be in several groups, each of which then computes it for itself. One of
them, the first to run, writes its result if a group without it needs that; a group with a copy
reads what the node reads. So *whether* and *where* something is computed again is decided with the
groups and by the same objective, not before.
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
      producer: local node, None if it comes from outside.
      consumers: local nodes, ascending.
      read_bytes: for each consumer.
      leaves: it is needed outside the component.
    """

    nbytes: int
    producer: int | None
    consumers: tuple[int, ...]
    read_bytes: tuple[int, ...]
    leaves: bool


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
      launch: bytes that a launch is worth.
      assumed: nodes that hold more than is proven to belong together (see :mod:`.absorb`): a
        refusal of a group with one of them says nothing of groups without.
      products: the matrix products, of which a group holds one at most, each with the bytes that it
        is dearer with others than alone, where cuBLAS runs it.
      copies: the nodes that several groups may hold, each with the bytes that the device could move
        in the time of its arithmetic, at least 1.
      operands: tensors that a group of several nodes reads and writes, at most; 0 if any number.
        ``build`` refuses more in any case.
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
    launch: int
    assumed: frozenset[int] = frozenset()
    products: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    operands: int = 0

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
        dearer, price = dict(self.products), dict(self.copies)
        arithmetic = sum(price.get(node, 0) for group in groups for node in group)
        return (
            self._moved(groups)
            + sum(dearer.get(node, 0) for group in groups if len(group) > 1 for node in group)
            + (arithmetic - sum(price.values()))
        )

    def _moved(self, groups: Sequence[Sequence[int]]) -> int:
        """Bytes and launches of a grouping."""
        holders: list[list[int]] = [[] for _ in range(self.size)]
        for index, group in enumerate(groups):
            for node in group:
                holders[node].append(index)
        idle = {i for i, group in enumerate(groups) if len(group) == 1 and self.free[group[0]]}
        total = self.launch * (len(groups) - len(idle))
        for tensor in self.tensors:
            homes: Sequence[int] = () if tensor.producer is None else holders[tensor.producer]
            reading: dict[int, int] = {}
            for node, amount in zip(tensor.consumers, tensor.read_bytes, strict=True):
                for reader in holders[node]:
                    if reader not in homes:
                        reading[reader] = max(reading.get(reader, 0), amount)
            total += sum(amount for group, amount in reading.items() if group not in idle)
            if homes and homes[0] not in idle and (tensor.leaves or reading):
                total += tensor.nbytes
        return total

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
        return self._moved([list(range(self.size))])

    def without(self, product: int) -> Problem:
        """The problem with a matrix product that is to be alone."""
        after = [b for a, b in self.edges if a == product]
        return dataclasses.replace(
            self,
            edges=tuple(e for e in self.edges if e[0] != product),
            ordered=tuple(sorted({*self.ordered, *((product, b) for b in after)})),
        )

    def product_labels(self) -> int:
        """The labels that take a matrix product, as a bit mask."""
        return sum(label.product << bit for bit, label in enumerate(self.labels))

    def fitting(self, group: Iterable[int], hidden: Collection[int]) -> int:
        """The labels under which every node of the group has its place, as a bit mask.

        ``hidden`` are the nodes whose results no group writes.
        """
        members = group if isinstance(group, (set, frozenset)) else set(group)
        mask = (1 << len(self.labels)) - 1
        if not any(node in members for node, _ in self.products):
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
        copied = {node for node, _ in self.copies}
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
        if any(sum(node in s for node, _ in self.products) > 1 for s in sets):
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
        """A node that tells groups apart: the first that only one group holds, else the first."""
        copied = {node for node, _ in self.copies}
        return min(group, key=lambda node: (node in copied, node))

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
            self.assumed,
            self.products,
            self.copies,
            self.operands,
        )


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
