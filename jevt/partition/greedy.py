"""A valid grouping in near-linear time: the integer program's starting point, and its substitute.

Merges along candidate edges, the largest saving first. A merge is taken if a space is left that has a place
for every node and if the groups stay acyclic. The groups' topological order is maintained, and the search
for a path only walks what lies between the two in it, so that the cost follows the distance of
neighbours and not the size of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jevt.partition.order import executable, quotient
from jevt.partition.problem import Grouping, Problem

type Accepts = Callable[[Sequence[int]], bool]

_NONE: frozenset[int] = frozenset()


def merge(problem: Problem, nodes: Sequence[int] | None = None, accepts: Accepts | None = None) -> Grouping:
    """Groups by merging along the largest savings.

    Args:
      nodes: merge only these; all others stay alone.
      accepts: asked before each merge, in addition to the problem's own rules.
    """
    state = _State(problem, [[node] for node in range(problem.size)])
    allowed = set(range(problem.size) if nodes is None else nodes)
    order = [pair for pair in _by_saving(problem) if allowed.issuperset(pair)]
    while any([state.try_merge(a, b, accepts) for a, b in order]):
        pass  # a small producer joins only once all its readers are together
    return state.groups()


def repair(problem: Problem, groups: Grouping, accepts: Accepts) -> Grouping:
    """The groups that ``accepts`` takes, and in place of each other one the best pieces that it takes."""
    kept, refused = [], set[int]()
    for group in groups:
        if len(group) == 1 or accepts(group):
            kept.append(group)
        else:
            refused.update(group)
    state = _State(problem, kept + [[node] for node in sorted(refused)])
    owner = {node: index for index, group in enumerate(groups) for node in group}
    for a, b in _by_saving(problem):
        if owner[a] == owner[b] and a in refused:
            state.try_merge(a, b, accepts)
    return state.groups()


def _by_saving(problem: Problem) -> list[tuple[int, int]]:
    """Candidate pairs, the one that saves the most bytes first, ties in program order."""
    saving: dict[tuple[int, int], int] = {pair: 0 for pair in (*problem.edges, *problem.siblings)}
    for tensor in problem.tensors:
        for index, (node, amount) in enumerate(zip(tensor.consumers, tensor.read_bytes, strict=True)):
            if tensor.producer is not None and (tensor.producer, node) in saving:
                only = len(tensor.consumers) == 1 and not tensor.leaves
                saving[tensor.producer, node] += amount + (tensor.nbytes if only else 0)
            for other in tensor.consumers[index + 1 :]:
                if (node, other) in saving:
                    saving[node, other] += amount
    return sorted(saving, key=lambda pair: (-saving[pair], pair))


class _State:
    """Groups under construction, with a topological order of their quotient that merges keep up to date.

    The order is the one of Pearce and Kelly's dynamic algorithm (2007): a merge of two groups only looks at,
    and only moves, what lies between them in the order.
    """

    def __init__(self, problem: Problem, start: Grouping) -> None:
        self.problem = problem
        self.successors = problem.successors()
        self.consumers = problem.consumers()
        self.apart: dict[int, set[int]] = {}
        for a, b in problem.ordered:
            self.apart.setdefault(a, set()).add(b)
            self.apart.setdefault(b, set()).add(a)
        self.members = {group[0]: list(group) for group in start}
        self.owner = [0] * problem.size
        for name, group in self.members.items():
            for node in group:
                self.owner[node] = name
        names = list(self.members)
        ranks = executable(names, quotient(start, self.successors))
        assert ranks is not None, "splitting groups of an acyclic grouping keeps it acyclic"
        self.ranked: list[int | None] = [names[index] for index in ranks]
        self.rank = {name: rank for rank, name in enumerate(self.ranked) if name is not None}

    def groups(self) -> Grouping:
        return sorted(sorted(m) for m in self.members.values())

    def try_merge(self, a: int, b: int, accepts: Accepts | None) -> bool:
        first, second = self.owner[a], self.owner[b]
        if first == second:
            return False
        if self.rank[first] > self.rank[second]:
            first, second = second, first
        union = self.members[first] + self.members[second]
        if any(not self.apart.get(n, _NONE).isdisjoint(self.members[second]) for n in self.members[first]):
            return False
        if not self.problem.fitting(set(union), self.consumers):
            return False
        after = self._between(first, second)
        if after is None or (accepts is not None and not accepts(sorted(union))):
            return False
        self._join(first, second, after)
        return True

    def _between(self, first: int, second: int) -> set[int] | None:
        """Groups before ``second`` that depend on ``first``; None if ``second`` depends on one of them."""
        limit = self.rank[second]
        seen: set[int] = set()
        stack = [first]
        while stack:
            group = stack.pop()
            for node in self.members[group]:
                for following in self.successors[node]:
                    target = self.owner[following]
                    if target == second and group != first:
                        return None
                    if target != first and target not in seen and self.rank[target] < limit:
                        seen.add(target)
                        stack.append(target)
        return seen

    def _join(self, first: int, second: int, after: set[int]) -> None:
        low, high = self.rank[first], self.rank[second]
        between = [g for g in self.ranked[low + 1 : high] if g is not None]
        order = [g for g in between if g not in after] + [first] + [g for g in between if g in after]
        for node in self.members[second]:
            self.owner[node] = first
        self.members[first] += self.members.pop(second)
        for position, group in enumerate(order, low):
            self.ranked[position] = group
            self.rank[group] = position
        for position in range(low + len(order), high + 1):
            self.ranked[position] = None
