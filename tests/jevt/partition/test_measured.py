"""Measured times of whole groups in place of the formula's: the program is solved again by them."""

from __future__ import annotations

import dataclasses
import random

import pytest
from partitions import brute_force, random_problem

from jevt.partition import solve
from jevt.partition.problem import Label, Launches, Problem, Traffic, Work
from jevt.partition.refusals import Oracle

LONG = solve.Limits(60.0)


def solved(problem, times):
    """The outcome, and the problem with all times that were asked for and known.

    ``times`` says of a group what it was measured to take, None if it was not.
    """
    found = {}

    def measured(nodes):
        assert tuple(nodes) not in found, "asked once"
        time = times(tuple(nodes))
        if time is not None:
            found[tuple(nodes)] = time
        return time

    oracle = Oracle(lambda nodes: True, lambda nodes, stored: True, measured)
    outcome = solve.solve(problem, oracle, LONG)
    return outcome, problem.priced(found.items())


def chain():
    """Three nodes in a row; predicted costs are 210, 420 and 460 with one cut, and 670."""
    sizes = (100, 120, 100)
    tensors = tuple(
        Traffic(amount, v, (v + 1,) * (v < 2), (amount,) * (v < 2), v == 2)
        for v, amount in enumerate(sizes)
    )
    outside = Traffic(100, None, (0,), (100,), False)
    return Problem(
        3, ((0, 1), (1, 2)), (), (), (*tensors, outside), (Label(8, 0),), (1,) * 3, (0,) * 3,
        (False,) * 3, Launches(10), (Work(),) * 3,
    )  # fmt: skip


WHOLE, FIRST, LAST = (0, 1, 2), (0, 1), (1, 2)


@pytest.mark.parametrize(
    ("times", "groups", "cost"),
    [
        ({}, [[0, 1, 2]], 210),
        ({WHOLE: 50}, [[0, 1, 2]], 50),
        ({WHOLE: 415}, [[0, 1, 2]], 415),
        ({WHOLE: 500}, [[0], [1, 2]], 420),
        ({WHOLE: 500, (0,): 60}, [[0], [1, 2]], 270),
        ({WHOLE: 500, (0,): 300}, [[0, 1], [2]], 460),
        ({WHOLE: 500, LAST: 300}, [[0, 1], [2]], 460),
        ({WHOLE: 500, LAST: 300, FIRST: 280}, [[0, 1, 2]], 500),
        ({WHOLE: 900, LAST: 500, FIRST: 500}, [[0], [1], [2]], 670),
    ],
)
def test_groups_give_way_where_they_were_measured_to_take_longer(times, groups, cost):
    outcome, priced = solved(chain(), times.get)
    assert (outcome.groups, outcome.cost, outcome.bound) == (groups, cost, cost)
    assert outcome.status == "optimal"
    assert priced.cost(groups) == cost


def test_a_time_is_that_of_exactly_this_group():
    """One of a group that is not chosen says nothing of its parts, nor of what holds it."""
    priced = chain().priced([(FIRST, 1), ((2,), 1)])
    assert priced.cost([[0, 1, 2]]) == 210
    assert priced.cost([[0], [1], [2]]) == 441
    assert priced.cost([[0, 1], [2]]) == 2


def test_equals_brute_force_under_the_times_that_were_asked_for():
    changed = 0
    for seed in range(60):
        problem = random_problem(seed, (4, 5, 6)[seed % 3], products=seed % 2)
        rng = random.Random(seed)
        likely = {}

        def times(nodes, problem=problem, rng=rng, likely=likely):
            if len(nodes) == 1 and problem.free[nodes[0]]:
                return None  # no kernel, so none is measured
            if nodes not in likely:
                predicted = problem.time(nodes, *problem.traffic(nodes))
                factor = rng.choice((None, 0.5, 1, 2, 4))
                likely[nodes] = None if factor is None else round(predicted * factor)
            return likely[nodes]

        outcome, priced = solved(problem, times)
        assert problem.valid(outcome.groups), seed
        assert outcome.cost == outcome.bound == priced.cost(outcome.groups), seed
        assert outcome.cost == brute_force(priced, lambda nodes: True), seed
        unmeasured, _ = solved(problem, lambda nodes: None)
        changed += outcome.groups != unmeasured.groups
        known = dict(priced.known)
        for group in map(tuple, outcome.groups):
            if group in known:
                moved, spread = problem.traffic(group)
                assert priced.time(group, moved, spread) == known[group], seed
    assert changed > 5, "some times are a reason for other groups"


def test_groups_with_copies_are_not_measured():
    """What such a group takes depends on which of them writes the copied node's result."""
    asked = []

    def times(nodes):
        asked.append(nodes)
        return 1

    held = set()
    for seed in range(30):
        problem = random_problem(seed, 5, copies=3)
        outcome, priced = solved(problem, times)
        assert all(set(nodes).isdisjoint(problem.copies) for nodes, _ in priced.known), seed
        assert problem.valid(outcome.groups), seed
        assert outcome.cost == priced.cost(outcome.groups), seed
        held.update(problem.copies)
    assert asked
    assert held


def test_the_unit_comes_along():
    problem = dataclasses.replace(chain(), unit=0.25)
    outcome, _ = solved(problem, {WHOLE: 50}.get)
    assert (outcome.cost, outcome.unit) == (50, 0.25)
