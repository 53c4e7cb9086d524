"""A few of the random problems and programs of ``tests/many_partitions.py``."""

import collections

import many_partitions
import pytest
from partitions import brute_force, random_problem

from jevt.partition import solve

COUNTS = {
    "exhaustive": 12,
    "duplicated": 60,
    "large": 15,
    "programs": 12,
    "two_steps": 40,
    "equations": 20,
}


@pytest.mark.parametrize("name", many_partitions.PARTS)
def test_against_oracles(name):
    part, _ = many_partitions.PARTS[name]
    words = collections.Counter(part(range(COUNTS[name])))
    assert words.total() == COUNTS[name]
    if name == "duplicated":
        assert words["with copies"] > 1
    if name in ("two_steps", "equations"):
        assert words["equal"] > 0.75 * COUNTS[name]


@pytest.mark.parametrize("seed", [627, 1028])
def test_groups_with_copies_that_once_were_not_the_cheapest(seed):
    """In 627, a call of cuBLAS is not bound by what a kernel's epilogue takes; in 1028, a group
    with a copy that nobody in it reads runs before others with one.
    """
    problem = random_problem(seed, (4, 5, 6)[seed % 3], copies=3, products=seed % 2)
    outcome = solve.solve(problem, many_partitions.ANYTHING, solve.Limits(60.0))
    assert outcome.status == "optimal"
    assert outcome.cost == outcome.bound == problem.cost(outcome.groups)
    assert outcome.cost == brute_force(problem, lambda nodes: True)


SPLIT = [914, 1656, 2195, 2910, 3295, 4398, 4874, 4995, 5732, 6648, 7650, 7699, 7712]


@pytest.mark.parametrize("seed", SPLIT)
def test_two_steps_that_once_lost_something(seed):
    """A part of a group had been refused for what the rest of the group would have put right; in
    1656, a reduction had lost its place beside a product for making its operand of values of rows;
    in 6648 and 7650, a leaf was joined to its producer, beside a product or without one.
    """
    assert [*many_partitions.two_steps(range(seed, seed + 1))] == ["equal"]


@pytest.mark.parametrize("seed", [4095, 6341])
def test_nothing_is_proven_where_a_leaf_was_joined_on_an_assumption(seed):
    """In 6341, what the leaf is joined with alone could link two nodes that are refused; in 4095,
    it is refused with them, and would have cost less elsewhere than where it was assumed to be.
    """
    assert [*many_partitions.two_steps(range(seed, seed + 1))] == ["bounded"]
