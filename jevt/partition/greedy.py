"""A valid grouping in near-linear time: the integer program's starting point, and its substitute.

Merges along candidate edges, the largest saving first. A merge is taken if a space is left that has
a place for every node and if the groups stay acyclic. The groups' topological order is maintained,
and the search for a path only walks what lies between the two in it, so that the cost follows the
distance of neighbours and not the size of the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from jevt.partition.order import executable, on_cycles, quotient
from jevt.partition.problem import Grouping, Problem, components

type Accepts = Callable[[Sequence[int]], bool]


def merge(problem: Problem) -> Grouping:
    """Groups by merging along the largest savings."""
    state = _State(problem, [[node] for node in range(problem.size)])
    pairs = _by_saving(problem)
    while state.merge_all(pairs):
        pass  # a small producer joins only once all its readers are together
    return state.groups()


def merge_along(
    problem: Problem, start: Grouping, pairs: Sequence[tuple[int, int]], accepts: Accepts
) -> Grouping:
    """Merges the groups of each pair of nodes in the given order, where the result is accepted."""
    state = _State(problem, start)
    state.merge_all(pairs, accepts)
    return state.groups()


def repair(problem: Problem, groups: Grouping, accepts: Accepts) -> Grouping:
    """The groups, those that ``accepts`` refuses replaced by pieces that it takes.

    A node that several groups hold stays in the first of them, and what then forms a cycle, does
    not hang together or has no space in common is taken apart like what is refused.
    """
    groups = _disjoint(groups)
    links, successors = problem.links(), problem.successors()
    whole = [group for group in groups if len(components(group, links)) == 1]
    cyclic = {tuple(group) for group in on_cycles(groups, successors)}
    hidden = problem.hidden(groups)
    kept, refused = [], set[int]()
    for group in groups:
        fine = group in whole and tuple(group) not in cyclic and problem.fitting(group, hidden)
        if len(group) == 1 or (fine and accepts(group)):
            kept.append(group)
        else:
            refused.update(group)
    state = _State(problem, kept + [[node] for node in sorted(refused)])
    owner = {node: index for index, group in enumerate(groups) for node in group}
    state.merge_all(
        [(a, b) for a, b in _by_saving(problem) if owner[a] == owner[b] and a in refused], accepts
    )
    return state.groups()


def _disjoint(groups: Grouping) -> Grouping:
    """The groups, each node in the first that holds it."""
    seen: set[int] = set()
    result: Grouping = []
    for group in groups:
        rest = [node for node in group if node not in seen]
        seen.update(rest)
        if rest:
            result.append(rest)
    return result


def _by_saving(problem: Problem) -> list[tuple[int, int]]:
    """Candidate pairs, the one that saves the most bytes first, ties in program order.

    Of a matrix product less what it takes longer in a kernel of ours.
    """
    saving: dict[tuple[int, int], int] = dict.fromkeys((*problem.edges, *problem.siblings), 0)
    for tensor in problem.tensors:
        for index, (node, amount) in enumerate(
            zip(tensor.consumers, tensor.read_bytes, strict=True)
        ):
            if tensor.producer is not None and (tensor.producer, node) in saving:
                only = len(tensor.consumers) == 1 and not tensor.leaves
                saving[tensor.producer, node] += amount + (tensor.nbytes if only else 0)
            for other in tensor.consumers[index + 1 :]:
                if (node, other) in saving:
                    saving[node, other] += amount
    launch = problem.launch.ours
    dearer = {p.node: p.mainloop + launch - p.calls[0][1] for p in problem.products if p.calls}
    for pair in saving:
        saving[pair] -= max(0, dearer.get(pair[0], 0))
    worth = (pair for pair, saved in saving.items() if saved >= 0)
    return sorted(worth, key=lambda pair: (-saving[pair], pair))


class _State:
    """Groups under construction, with a topological order of their quotient kept up to date.

    The order is the one of Pearce and Kelly's dynamic algorithm (2007): a merge of two groups only
    looks at, and only moves, what lies between them in it. What is known of groups is merged the
    smaller into the larger.
    """

    def __init__(self, problem: Problem, start: Grouping) -> None:
        self.problem = problem
        successors = problem.successors()
        self.consumers = problem.consumers()
        self.apart: list[set[int]] = [set() for _ in range(problem.size)]
        products = [product.node for product in problem.products]
        for a, b in (*problem.ordered, *itertools.combinations(products, 2)):
            self.apart[a].add(b)
            self.apart[b].add(a)
        self.members = {group[0]: list(group) for group in start}
        self.owner = [0] * problem.size
        for name, group in self.members.items():
            for node in group:
                self.owner[node] = name
        self.following = {
            name: {s for node in group for s in successors[node]}
            for name, group in self.members.items()
        }
        everywhere = (1 << len(problem.labels)) - 1
        self.firm = dict.fromkeys(
            self.members, everywhere
        )  # labels of the nodes that are never small
        self.small: dict[int, list[int]] = {name: [] for name in self.members}
        for node in range(problem.size):
            if problem.inner[node]:
                self.small[self.owner[node]].append(node)
            else:
                self.firm[self.owner[node]] &= problem.firm[node]
        names = list(self.members)
        ranks = executable(names, quotient(start, successors))
        assert ranks is not None, "splitting groups of an acyclic grouping keeps it acyclic"
        self.ranked: list[int | None] = [names[index] for index in ranks]
        self.rank = {name: rank for rank, name in enumerate(self.ranked) if name is not None}

    def groups(self) -> Grouping:
        return sorted(sorted(members) for members in self.members.values())

    def merge_all(self, pairs: Sequence[tuple[int, int]], accepts: Accepts | None = None) -> bool:
        """Tries each pair once, in order; whether anything was merged."""
        before = len(self.members)
        for a, b in pairs:
            first, second = self.owner[a], self.owner[b]
            if first != second:
                self._try_merge(first, second, accepts)
        return len(self.members) < before

    def _try_merge(self, first: int, second: int, accepts: Accepts | None) -> None:
        if self.rank[first] > self.rank[second]:
            first, second = second, first
        if not self._fit(first, second) or self._apart(first, second):
            return
        after = self._between(first, second)
        if after is None:
            return
        if accepts is None or accepts(sorted(self.members[first] + self.members[second])):
            self._join(first, second, after)

    def _fit(self, first: int, second: int) -> int:
        """The labels that hold the union, see ``Problem.fitting``."""
        mask = self.firm[first] & self.firm[second]
        if not {first, second} & {self.owner[p.node] for p in self.problem.products}:
            mask &= ~self.problem.product_labels()
        for node in (*self.small[first], *self.small[second]):
            here = self.problem.firm[node]
            if all(self.owner[c] in (first, second) for c in self.consumers[node]):
                here |= self.problem.inner[node]
            mask &= here
        return mask

    def _apart(self, first: int, second: int) -> bool:
        """Whether two nodes of the union must not share a group."""
        fewer, more = sorted((first, second), key=lambda name: len(self.members[name]))
        return any(self.owner[n] == more for node in self.members[fewer] for n in self.apart[node])

    def _between(self, first: int, second: int) -> set[int] | None:
        """Groups that depend on ``first`` and precede ``second``; None if it depends on one."""
        limit = self.rank[second]
        seen: set[int] = set()
        stack = [first]
        while stack:
            group = stack.pop()
            self.following[group] = {n for n in self.following[group] if self.owner[n] != group}
            for target in {self.owner[n] for n in self.following[group]}:
                if target == second and group != first:
                    return None
                if target != first and target not in seen and self.rank[target] < limit:
                    seen.add(target)
                    stack.append(target)
        return seen

    def _join(self, first: int, second: int, after: set[int]) -> None:
        low, high = self.rank[first], self.rank[second]
        between = [g for g in self.ranked[low + 1 : high] if g is not None]
        gone, keep = sorted((first, second), key=lambda name: len(self.members[name]))
        order = [g for g in between if g not in after] + [keep]
        order += [g for g in between if g in after]
        for node in self.members[gone]:
            self.owner[node] = keep
        self.members[keep] += self.members.pop(gone)
        self.following[keep] |= self.following.pop(gone)
        self.firm[keep] &= self.firm.pop(gone)
        self.small[keep] += self.small.pop(gone)
        del self.rank[gone]
        for position, group in enumerate(order, low):
            self.ranked[position] = group
            self.rank[group] = position
        self.ranked[low + len(order) : high + 1] = [None] * (high + 1 - low - len(order))
