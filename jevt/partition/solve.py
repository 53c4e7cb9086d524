"""Solves one component: bound, greedy, integer program, and what ``build`` says to it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal

from jevt.partition import greedy, ilp
from jevt.partition.problem import Grouping, Problem, components

type Status = Literal["trivial", "optimal", "feasible", "greedy"]

#: Solves of one component, each with the cuts that the refusals before it gave.
_ROUNDS = 16
#: Deterministic seconds for one component, all rounds together.
_DETERMINISTIC = 1.0
#: Above this number of membership variables the program is not built: greedy has to do.
_LARGEST = 8000


@dataclasses.dataclass(frozen=True)
class Oracle:
    """What only ``lowering.spec.build`` knows, for local nodes of one component.

    Attributes:
      accepts: whether these nodes can be one group.
      holds: whether these nodes can be part of one group, whatever else is in it: the same question
        with only those results as outputs that nothing in the set reads.
    """

    accepts: Callable[[Sequence[int]], bool]
    holds: Callable[[Sequence[int]], bool]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A valid grouping whose groups ``build`` takes, its cost and a lower bound on any's."""

    groups: Grouping
    cost: int
    bound: int
    status: Status
    rounds: int = 0


def solve(problem: Problem, oracle: Oracle, deadline: float) -> Outcome:
    """The best grouping that was found by ``deadline`` (``time.monotonic``)."""
    whole = [list(range(problem.size))]
    singles = [[node] for node in range(problem.size)]
    if problem.size == 1 or not (problem.edges or problem.siblings):
        cost = problem.cost(singles)
        return Outcome(singles, cost, cost, "trivial")
    floor = problem.floor()
    if floor is not None and problem.valid(whole) and oracle.accepts(whole[0]):
        return Outcome(whole, floor, floor, "optimal")
    start = greedy.repair(problem, greedy.merge(problem), oracle.accepts)
    best = min(start, singles, key=problem.cost)
    if problem.size > _LARGEST or ilp.variables(problem) > _LARGEST:
        return Outcome(best, problem.cost(best), floor or 0, "greedy")
    return _improve(problem, oracle, best, floor or 0, deadline)


def _improve(
    problem: Problem, oracle: Oracle, best: Grouping, floor: int, deadline: float
) -> Outcome:
    """Integer program and refusals in turn, until a solution is taken or the time is over.

    The bound stays valid through the rounds because a cut only removes what ``build`` refuses. It
    assumes that a group that holds a refused set (see ``Oracle.holds``) is refused too.
    """
    program = ilp.Program(problem)
    links = problem.links()
    bound, left, rounds = floor, _DETERMINISTIC, 0
    found = False
    while rounds < _ROUNDS and left > 0 and (wall := deadline - time.monotonic()) > 0:
        rounds += 1
        answer = program.solve(best, ilp.Limits(left, wall))
        left -= answer.spent
        if answer.groups is None:
            break
        found = True
        bound = max(bound, answer.bound)
        pieces = [components(group, links) for group in answer.groups]
        groups = sorted(piece for split in pieces for piece in split)
        refused = [g for g in groups if len(g) > 1 and not oracle.accepts(g)]
        mended = greedy.repair(problem, groups, oracle.accepts) if refused else groups
        best = min(best, mended, key=problem.cost)
        if (not refused and len(groups) == len(pieces)) or bound >= problem.cost(best):
            break
        for split in pieces:
            for piece in split if len(split) > 1 else ():
                program.split(piece)
        for group in refused:
            program.refused(_cut(oracle, group, links))
    cost = problem.cost(best)
    status: Status = "optimal" if bound >= cost else "feasible" if found else "greedy"
    return Outcome(best, cost, min(bound, cost), status, rounds)


def _cut(oracle: Oracle, group: Sequence[int], links: Sequence[set[int]]) -> ilp.Cut:
    """Few nodes of a refused group that are refused already, by deleting ever smaller pieces."""
    if oracle.holds(group):  # only the outputs are at fault: other neighbours may mend that
        return ilp.Cut(tuple(group), hard=False)
    core = list(group)
    piece = len(core) // 2
    while piece:
        index = 0
        while index < len(core):
            rest = core[:index] + core[index + piece :]
            # Pieces that do not touch would be refused for that alone.
            touching = len(rest) > 1 and len(components(rest, links)) == 1
            if touching and not oracle.holds(rest):
                core = rest
            else:
                index += piece
        piece //= 2
    return ilp.Cut(tuple(core), hard=True)
