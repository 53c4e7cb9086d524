"""Solves one component: bound, greedy, integer program, and what ``build`` says to it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Literal

from jevt.partition import apart, greedy, ilp, order, refusals
from jevt.partition.problem import Grouping, Problem, components
from jevt.partition.refusals import Oracle, Refusal

type Status = Literal["trivial", "optimal", "feasible", "greedy"]
type Stop = Literal["", "work", "clock"]

#: Solves of one component, each with the cuts that the refusals before it gave.
_ROUNDS = 16
#: Above this number of membership variables the program is not built: greedy has to do.
_LARGEST = 20_000


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a component may cost.

    Attributes:
      work: in the solver's deterministic seconds, the same on every machine and under any load.
      deadline: by ``time.monotonic``; if it is what ends the search, another run may end elsewhere.
      searching: see ``ilp.Limits``.
    """

    work: float = 1.0
    deadline: float = math.inf
    searching: ilp.Searching = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A valid grouping whose groups ``build`` takes.

    Attributes:
      cost: of the grouping.
      bound: no grouping costs less.
      rounds: number of solves.
      work: deterministic seconds that they took.
      stopped: what ended the search before optimality was proven, if a limit did.
      unit: of cost and bound, in microseconds.
    """

    groups: Grouping
    cost: int
    bound: int
    status: Status
    rounds: int = 0
    work: float = 0.0
    stopped: Stop = ""
    unit: float = 1e-3


def solve(problem: Problem, oracle: Oracle, limits: Limits) -> Outcome:
    """The best grouping that was found within the limits.

    Where a group's time was measured, that time replaces the predicted one, and the rest is solved
    again; cost and bound are those of the last problem.
    """
    work = 0.0
    while True:
        left = max(limits.work - work, limits.work / 4)
        outcome = _solve(problem, oracle, dataclasses.replace(limits, work=left))
        work += outcome.work
        known, copied = {nodes for nodes, _ in problem.known}, set(problem.copies)
        measured = [
            (nodes, time)
            for nodes in map(tuple, outcome.groups)
            if nodes not in known and copied.isdisjoint(nodes)
            if (time := oracle.measured(nodes)) is not None
        ]
        if not measured:
            return dataclasses.replace(outcome, work=work, unit=problem.unit)
        problem = problem.priced(measured)


def _solve(problem: Problem, oracle: Oracle, limits: Limits) -> Outcome:
    whole = [list(range(problem.size))]
    singles = [[node] for node in range(problem.size)]
    if problem.size == 1 or not (problem.edges or problem.siblings):
        cost = problem.cost(singles)
        return Outcome(singles, cost, cost, "trivial")
    floor = None if problem.known else problem.floor()
    one = floor is not None and problem.valid(whole) and problem.cost(whole) == floor
    if floor is not None and one and oracle.accepts(whole[0]):
        return Outcome(whole, floor, floor, "optimal")
    start = greedy.repair(problem, greedy.merge(problem), oracle.accepts)
    best = min(start, singles, key=problem.cost)
    if problem.size > _LARGEST or apart.variables(problem) > _LARGEST:
        return Outcome(best, problem.cost(best), floor or 0, "greedy", stopped="work")
    return _improve(problem, oracle, best, floor or 0, limits)


def _improve(
    problem: Problem, oracle: Oracle, best: Grouping, bound: int, limits: Limits
) -> Outcome:
    """Integer program and refusals in turn, until a solution is taken or a limit is reached.

    The bound stays valid through the rounds because a cut only removes what is not valid or what
    ``build`` refuses (see :mod:`.refusals` for the one assumption); it is not raised any more once
    a refusal concerns nodes in ``Problem.assumed``.
    """
    stopped: Stop = "work"
    found, proven = False, True
    work, rounds = 0.0, 0
    program: ilp.Program | None = None
    links = problem.links()
    while rounds < _ROUNDS and work < limits.work:
        if program is None:
            with contextlib.suppress(ilp.OutOfTime):
                program = ilp.Program(problem, limits.deadline)
        seconds = limits.deadline - time.monotonic()
        if program is None or seconds <= 0:
            stopped = "clock"
            break
        rounds += 1
        answer = program.solve(best, ilp.Limits(limits.work - work, seconds, limits.searching))
        work += answer.spent
        if answer.groups is not None:
            found = True
            if proven:
                bound = max(bound, answer.bound)
            mended, cuts = _mend(problem, oracle, program, answer.groups, links)
            proven = proven and not any(_hasty(problem, cut, links) for cut in cuts)
            best = min(best, mended, key=problem.cost)
            if problem.cost(best) <= max(bound, answer.bound):
                stopped = ""
                break
        if not answer.optimal:
            stopped = "clock" if time.monotonic() >= limits.deadline else "work"
            break
    cost = problem.cost(best)
    status: Status = "optimal" if bound >= cost else "feasible" if found else "greedy"
    return Outcome(best, cost, min(bound, cost), status, rounds, work, stopped)


def _pruned(problem: Problem, program: ilp.Program, groups: Grouping) -> Grouping:
    """The groups without copies that nobody reads, as a solution short of the optimum may have."""
    groups = _writers_first(problem, groups)
    ranks = order.schedule(groups, program.successors)
    if len(ranks) < len(groups):
        return groups
    groups = [list(groups[index]) for index in ranks]
    consumers = problem.consumers()
    for node in sorted(problem.copies, reverse=True):
        stored = problem.stored(groups)
        held = [index for index, group in enumerate(groups) if node in group]
        for index in held:
            kept = any(problem.tensors[t].producer == node for t in stored[index])
            if len(held) > 1 and not kept and consumers[node].isdisjoint(groups[index]):
                groups[index].remove(node)
    return [group for group in groups if group]


def _writers_first(problem: Problem, groups: Grouping) -> Grouping:
    """The groups sorted such that a copy without a reader in its group is the one that is written.

    The first to run writes, and of those that can run the first in this order does so first.
    """
    consumers = problem.consumers() if problem.copies else []

    def writes(group: list[int]) -> bool:
        return any(node in group and consumers[node].isdisjoint(group) for node in problem.copies)

    return sorted(groups, key=lambda group: (not writes(group), group))


def _hasty(problem: Problem, cut: Refusal, links: list[set[int]]) -> bool:
    """Whether a cut may remove a grouping that is valid.

    A group that is refused with one choice of what it stores is cut with all, if its nodes have
    copies. And a part of a node in ``Problem.assumed``, alone, could be with the nodes of a cut or
    help them.
    """
    whole = not cut.rest and any(node in cut.nodes for node in problem.copies)
    near = set(cut.nodes).union(*(links[node] for node in cut.nodes))
    return whole or not problem.assumed.isdisjoint(near)


def _mend(
    problem: Problem,
    oracle: Oracle,
    program: ilp.Program,
    groups: Grouping,
    links: list[set[int]],
) -> tuple[Grouping, list[Refusal]]:
    """The grouping made valid, with cuts in the program for what was not.

    Returns:
      The grouping, and the cuts for what ``build`` refused.
    """
    groups = _pruned(problem, program, groups) if problem.copies else groups
    pieces = [components(group, links) for group in groups]
    for split in pieces:
        for piece in split if len(split) > 1 else ():
            program.split(piece)
    connected = _writers_first(problem, [piece for split in pieces for piece in split])
    ranks = order.schedule(connected, program.successors)
    if problem.busy(connected):
        program.arithmetic()
    cyclic = len(ranks) < len(connected)
    if cyclic:
        program.acyclic()
    else:
        connected = [connected[index] for index in ranks]  # copies: the first to run writes
    kept = zip(connected, problem.stored(connected), strict=True)
    refused = [(g, s) for g, s in kept if len(g) > 1 and not oracle.takes(problem, g, s)]
    cuts = [cut for g, s in refused for cut in refusals.explain(problem, oracle, g, s, links)]
    for cut in cuts:
        program.refused(cut)
    # A piece may hold a copy that was made for another, and have to write it now.
    hidden = problem.hidden(connected)
    if cyclic or refused or not all(len(g) == 1 or problem.fitting(g, hidden) for g in connected):
        connected = greedy.repair(problem, connected, oracle.accepts)
    return connected, cuts
