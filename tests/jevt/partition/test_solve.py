"""The integer program and the greedy partitioner against brute force."""

import itertools
import math
import random
import time

import pytest
from partitions import brute_force, random_problem

from jevt.partition import greedy, ilp, solve
from jevt.partition.problem import Label, Launches, Problem, Traffic, Work
from jevt.partition.refusals import Oracle

ANYTHING = Oracle(lambda nodes: True, lambda nodes, stored: True)
LONG = solve.Limits(60.0)


def problems(count, sizes):
    for seed in range(count):
        problem = random_problem(seed, sizes[seed % len(sizes)])
        if problem.edges or problem.siblings:
            yield seed, problem


def test_equals_brute_force():
    for seed, problem in problems(120, (3, 4, 5, 6)):
        outcome = solve.solve(problem, ANYTHING, LONG)
        assert problem.valid(outcome.groups), seed
        assert outcome.status == "optimal", seed
        assert outcome.cost == outcome.bound == problem.cost(outcome.groups), seed
        assert outcome.cost == brute_force(problem, lambda nodes: True), seed


def test_equals_brute_force_on_larger_ones():
    for seed, problem in problems(8, (8,)):
        outcome = solve.solve(problem, ANYTHING, LONG)
        assert outcome.cost == brute_force(problem, lambda nodes: True), seed


def test_refusals_are_cut_and_the_rest_stays_optimal():
    for seed, problem in problems(60, (4, 5, 6)):
        rng = random.Random(seed)
        pairs = list(itertools.combinations(range(problem.size), 2))
        forbidden = [set(p) for p in rng.sample(pairs, min(3, len(pairs)))]

        def accepts(nodes, forbidden=forbidden):
            return not any(f <= set(nodes) for f in forbidden)

        outcome = solve.solve(problem, Oracle(accepts, lambda nodes, stored: accepts(nodes)), LONG)
        assert problem.valid(outcome.groups), seed
        assert all(accepts(g) for g in outcome.groups), seed
        assert outcome.status == "optimal", seed
        assert outcome.cost == brute_force(problem, accepts), seed


def test_a_refusal_of_outputs_only_forbids_exactly_that_group():
    for seed, problem in problems(30, (4, 5)):
        whole = list(range(problem.size))

        def accepts(nodes, whole=whole):
            return len(nodes) % 2 == 1 or list(nodes) == whole[: len(nodes)]

        oracle = Oracle(accepts, lambda nodes, stored: True)
        outcome = solve.solve(problem, oracle, LONG)
        assert problem.valid(outcome.groups), seed
        assert all(len(g) == 1 or accepts(g) for g in outcome.groups), seed
        if outcome.status == "optimal":
            assert outcome.cost == brute_force(problem, accepts), seed
        assert outcome.bound <= brute_force(problem, accepts), seed


def test_greedy_is_valid_and_floor_is_a_bound():
    for seed, problem in problems(200, (5, 8, 12, 20)):
        groups = greedy.merge(problem)
        assert problem.valid(groups), seed
        floor = problem.floor()
        assert floor is None or floor <= problem.cost(groups), seed

        def small(nodes):
            return len(nodes) <= 3

        repaired = greedy.repair(problem, groups, small)
        assert problem.valid(repaired), seed
        assert all(small(g) for g in repaired), seed


def test_convex_groups_that_are_cyclic_together_are_not_valid():
    # a0 -> b1 and b0 -> a1: {a0, a1} and {b0, b1} are convex, but each waits for the other.
    def tensor(producer, consumer):
        return Traffic(8, producer, (consumer,), (8,), False)

    shared = [
        Traffic(1000, None, (0, 3), (1000, 1000), False),
        Traffic(1000, None, (1, 2), (1000, 1000), False),
    ]
    problem = Problem(
        4, (), ((0, 3), (1, 2)), ((0, 2), (1, 3)),
        (tensor(0, 2), tensor(1, 3), *shared), (Label(8, 0),), (1,) * 4, (0,) * 4,
        (False,) * 4, Launches(10), (Work(),) * 4,
    )  # fmt: skip
    assert not problem.valid([[0, 3], [1, 2]])
    outcome = solve.solve(problem, ANYTHING, LONG)
    assert problem.valid(outcome.groups)
    assert len(outcome.groups) == 3


def chain(length):
    """A chain of equal nodes, each of which also reads a large tensor of its own."""
    tensors = [
        Traffic(
            100,
            v,
            (v + 1,) if v + 1 < length else (),
            (100,) if v + 1 < length else (),
            v + 1 == length,
        )
        for v in range(length)
    ]
    edges = tuple((v, v + 1) for v in range(length - 1))
    return Problem(
        length, edges, (), (), tuple(tensors), (Label(8, 0),), (1,) * length, (0,) * length,
        (False,) * length, Launches(10), (Work(),) * length,
    )  # fmt: skip


def test_a_chain_that_fits_is_one_group_without_a_solver():
    outcome = solve.solve(chain(500), ANYTHING, solve.Limits(0.0))
    assert outcome.status == "optimal"
    assert outcome.groups == [list(range(500))]
    assert outcome.rounds == 0


def test_greedy_follows_a_long_chain():
    assert len(greedy.merge(chain(8000))) == 1


def test_no_time_left_gives_a_valid_grouping():
    problem = chain(40)
    oracle = Oracle(lambda nodes: len(nodes) <= 7, lambda nodes, stored: len(nodes) <= 7)
    outcome = solve.solve(problem, oracle, solve.Limits(deadline=time.monotonic()))
    assert (outcome.status, outcome.stopped) == ("greedy", "clock")
    assert problem.valid(outcome.groups)
    assert outcome.bound <= outcome.cost == problem.cost(outcome.groups)


def test_a_program_is_not_written_down_beyond_the_limit(monkeypatch):
    """Each look at the clock takes a second, and there is one for each of the nodes."""
    problem = random_problem(3, 200, near=12, products=10, copies=20)
    clock = itertools.count()
    monkeypatch.setattr(ilp, "monotonic", lambda: float(next(clock)))
    with pytest.raises(ilp.OutOfTime):
        ilp.Program(problem, deadline=300.0)
    assert next(clock) == 302
    monkeypatch.setattr(ilp, "monotonic", lambda: math.inf)
    outcome = solve.solve(problem, ANYTHING, solve.Limits(deadline=time.monotonic() + 60.0))
    assert (outcome.status, outcome.stopped, outcome.rounds) == ("greedy", "clock", 0)
    assert problem.valid(outcome.groups)
