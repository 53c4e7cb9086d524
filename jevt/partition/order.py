"""An executable order of groups, or the cycle that prevents one."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def executable(keys: Sequence[int], successors: Sequence[Sequence[int]]) -> list[int] | None:
    """Topological order, smallest key first among what is ready; None if there is a cycle."""
    waiting = [0] * len(keys)
    for targets in successors:
        for target in targets:
            waiting[target] += 1
    ready = [(keys[n], n) for n, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    result: list[int] = []
    while ready:
        _, node = heapq.heappop(ready)
        result.append(node)
        for target in successors[node]:
            waiting[target] -= 1
            if not waiting[target]:
                heapq.heappush(ready, (keys[target], target))
    return result if len(result) == len(keys) else None


def quotient(
    groups: Sequence[Sequence[int]], successors: Sequence[Sequence[int]]
) -> list[list[int]]:
    """For each group, the groups that depend on it."""
    owner = {node: index for index, group in enumerate(groups) for node in group}
    return [
        sorted({owner[s] for node in group for s in successors[node]} - {index})
        for index, group in enumerate(groups)
    ]


def cycle(successors: Sequence[Sequence[int]]) -> list[int] | None:
    """The nodes of a strongly connected set of two or more nodes, None if the graph is acyclic."""
    remaining = [0] * len(successors)
    for targets in successors:
        for target in targets:
            remaining[target] += 1
    stack = [n for n, count in enumerate(remaining) if not count]
    alive = set(range(len(successors)))
    while stack:
        node = stack.pop()
        alive.discard(node)
        for target in successors[node]:
            remaining[target] -= 1
            if not remaining[target]:
                stack.append(target)
    if not alive:
        return None
    # Every live node has a live predecessor, so walking backwards must come round.
    predecessor = {t: n for n in sorted(alive) for t in successors[n] if t in alive}
    path: dict[int, int] = {}
    node = min(alive)
    while node not in path:
        path[node] = len(path)
        node = predecessor[node]
    return [n for n, step in path.items() if step >= path[node]]


def on_cycles(
    groups: Sequence[Sequence[int]], successors: Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """Groups without which, their nodes standing alone, no groups form a cycle."""
    broken: list[Sequence[int]] = []
    left = list(groups)
    while (found := cycle(quotient(left, successors))) is not None:
        large = [left[index] for index in found if len(left[index]) > 1]
        broken += large
        left = [g for g in left if g not in large] + [[node] for g in large for node in g]
    return broken


def schedule(groups: Sequence[Sequence[int]], successors: Sequence[Sequence[int]]) -> list[int]:
    """The groups that can run, in an executable order, where several may hold the same node.

    A group can run once everything that its nodes depend on is in it or in a group that has run.
    Running more never prevents anything, so all that can run do.
    """
    waiting: list[set[int]] = [set() for _ in groups]
    holders: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        for node in group:
            holders.setdefault(node, []).append(index)
    readers: dict[int, list[int]] = {}
    for node, following in enumerate(successors):
        makers = holders.get(node, ())
        for index in {h for other in following for h in holders.get(other, ())}:
            if index not in makers:
                waiting[index].add(node)
                readers.setdefault(node, []).append(index)
    ready = [index for index, needed in enumerate(waiting) if not needed]
    heapq.heapify(ready)
    result: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        result.append(index)
        for node in groups[index]:
            for reader in readers.pop(node, ()):
                waiting[reader].discard(node)
                if not waiting[reader]:
                    heapq.heappush(ready, reader)
    return result
