"""A few of the random problems and programs of ``tests/many_partitions.py``."""

import collections

import many_partitions
import pytest

COUNTS = {"exhaustive": 12, "duplicated": 60, "large": 15, "programs": 12, "two_steps": 40}


@pytest.mark.parametrize("name", many_partitions.PARTS)
def test_against_oracles(name):
    part, _ = many_partitions.PARTS[name]
    words = collections.Counter(part(range(COUNTS[name])))
    assert words.total() == COUNTS[name]
    if name == "duplicated":
        assert words["with copies"] > 1
    if name == "two_steps":
        assert words["equal"] > 30
