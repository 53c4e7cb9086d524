"""Thousands of random partitioning problems and programs, against oracles.

    PYTHONPATH=tests .venv/bin/python -m many_partitions                all of it, hours
    PYTHONPATH=tests .venv/bin/python -m many_partitions large          only one part
    PYTHONPATH=tests .venv/bin/python -m many_partitions large:200:300  some of its seeds

The test suite runs a few of each part (``tests/jevt/partition/test_many.py``). Each part yields a
word on every case, and raises where something is not as it should be.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import time
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import pairwise
import random_programs
from partitions import brute_force, cheaper, context, random_problem, trace, traffic_only

from jevt.lowering import rules, spec
from jevt.partition import components, copies, partition, prices, solve
from jevt.partition import graph as graphs
from jevt.partition.build import Builder
from jevt.partition.contract import contract
from jevt.partition.duplicate import duplicate, merge_copies
from jevt.partition.reach import Reach
from jevt.partition.recompute import recompute
from jevt.partition.refusals import Oracle

ANYTHING = Oracle(lambda nodes: True, lambda nodes, stored: True)
#: Seconds for all but the search: writing a program down, greedy groups, stages.
SLACK = 3.0
SHAPE = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)


def exhaustive(seeds: range) -> Iterator[str]:
    """Up to 12 nodes: no valid grouping is cheaper; and EVT's pairwise program and objective."""
    for seed in seeds:
        problem = random_problem(seed, (7, 8, 9, 10, 11, 12)[seed % 6], products=seed % 3)
        outcome = solve.solve(problem, ANYTHING, solve.Limits(60.0))
        assert outcome.status in ("optimal", "trivial"), seed
        assert problem.valid(outcome.groups), seed
        assert outcome.cost == outcome.bound == problem.cost(outcome.groups), seed
        assert cheaper(problem, outcome.cost) is None, seed
        plain = traffic_only(problem)
        found = solve.solve(plain, ANYTHING, solve.Limits(60.0))
        assert found.cost == found.bound == pairwise.optimum(plain), seed
        yield outcome.status


def duplicated(seeds: range) -> Iterator[str]:
    """Up to 6 nodes of which up to 3 may be copied, against all groupings with all copies."""
    for seed in seeds:
        problem = random_problem(seed, (4, 5, 6)[seed % 3], copies=3, products=seed % 2)
        outcome = solve.solve(problem, ANYTHING, solve.Limits(60.0))
        assert problem.valid(outcome.groups), seed
        assert outcome.cost == problem.cost(outcome.groups), seed
        expected = brute_force(problem, lambda nodes: True)
        assert outcome.bound <= expected <= outcome.cost, seed
        if outcome.status not in ("optimal", "trivial"):
            yield "not proven"
            continue
        assert outcome.cost == expected, seed
        yield "with copies" if sum(map(len, outcome.groups)) > problem.size else "without"


def large(seeds: range, seconds: float = 10.0) -> Iterator[str]:
    """20 to 500 nodes in one component: acyclic, never above the limit, never worse than greedy.

    What counts is the processor's time: others may use it meanwhile.
    """
    for seed in seeds:
        size = round(20 * 25 ** (seed % 100 / 99))
        problem = random_problem(
            seed, size, near=(6, 12, size)[seed % 3], products=size // 20, copies=size // 10
        )
        started = time.process_time()
        limits = solve.Limits(work=0.2, deadline=time.monotonic() + seconds)
        outcome = solve.solve(problem, ANYTHING, limits)
        spent = time.process_time() - started
        assert problem.valid(outcome.groups), seed
        assert outcome.bound <= outcome.cost == problem.cost(outcome.groups), seed
        assert outcome.cost <= problem.cost([[n] for n in range(size)]), seed
        yield outcome.status + (" above the limit" if spent > seconds else "")


def programs(seeds: range, seconds: float = 1.0) -> Iterator[str]:
    """Jaxprs of 20 to 500 equations: every equation once, acyclic, within the limit.

    The limit is short, because with the default of 10 s a thousand of them take more than an hour.
    It is the solver's; what comes before and after it is linear. What counts is the processor's
    time: others may use it meanwhile.
    """
    where = dataclasses.replace(context("triton"), partition_seconds=seconds)
    for seed in seeds:
        size = round(20 * 25 ** (seed % 100 / 99))
        jaxpr, _ = trace(random_programs.dag(seed, size), SHAPE, SHAPE)
        started = time.process_time()
        plan = partition(jaxpr, where, workers=1)
        spent = time.process_time() - started
        assert sorted(p for g in plan.groups for p in g.eqns) == [*range(len(plan.jaxpr.eqns))]
        made = {*plan.jaxpr.invars, *plan.jaxpr.constvars}
        for group in plan.groups:  # in an order in which each finds what it reads
            assert made.issuperset(group.jaxpr.invars), seed
            made.update(group.jaxpr.outvars)
        above = spent > seconds + SLACK
        yield plan.solution.status + (" above the limit" if above else "")


def two_steps(seeds: range, contracted: bool = True) -> Iterator[str]:
    """Programs as components, and as one problem: the same objective, copies of nodes left out.

    Where the bound is below the objective, by what `absorb` assumes, it bounds the one problem.
    Not ``contracted``, that has a node for each equation.
    """
    where = context("triton")
    with mock.patch.object(copies, "candidates", return_value=frozenset()):
        for seed in seeds:
            jaxpr, _ = trace(random_programs.dag(seed, 6 + seed % 7), SHAPE, SHAPE)
            plan = partition(jaxpr, where, workers=1)
            whole, slack = in_one(jaxpr, where, contracted)
            if whole.status not in ("optimal", "trivial"):
                yield "whole not proven"
                continue
            solution = plan.solution
            split, bound = (
                round(us / whole.unit) for us in (solution.objective_us, solution.bound_us)
            )
            assert bound - slack - 1 <= whole.cost <= split + 1, (seed, bound, split, whole.cost)
            if solution.status not in ("optimal", "trivial"):
                yield "bounded"
                continue
            assert split <= whole.cost + slack + 1, (seed, split, whole.cost)
            yield "equal"


def equations(seeds: range) -> Iterator[str]:
    """What `contract` joins, too, costs no optimum."""
    return two_steps(seeds, contracted=False)


def in_one(jaxpr, where, contracted=True):
    """The program as one problem, without both steps, and what the two may lose by their proofs."""
    jaxpr = recompute(graphs.read(jaxpr, rules.classify), where.device)
    jaxpr = duplicate(graphs.read(jaxpr, rules.classify))
    builder = Builder(spec.build)

    def accepts(inner):
        return builder.accepts(merge_copies(inner))

    single = graphs.from_jaxpr(jaxpr, rules.classify)
    graph = single
    if contracted:
        graph = contract(single, lambda positions: accepts(single.extract(positions)))
    costs = prices.prices(graph, single, where)
    reach = Reach.of(graph)
    fusible = [n for n, node in enumerate(graph.nodes) if not node.opaque]
    opaque = set(range(len(graph.nodes))).difference(fusible)
    links = components._candidates(graph, opaque)
    problem = components.pose(graph, reach, fusible, links, costs)

    def whole(local):
        return accepts(graph.extract(p for n in local for p in graph.nodes[fusible[n]].eqns))

    # Each refusal forbids one group only: slower than the real oracle, and nothing assumed.
    outcome = solve.solve(problem, Oracle(whole, lambda n, s: True), solve.Limits(30.0))
    return outcome, len(fusible) * (problem.launch.ours // 1000)


#: Each part with the number of cases of a whole run.
PARTS = {
    "exhaustive": (exhaustive, 2000),
    "duplicated": (duplicated, 2000),
    "large": (large, 1000),
    "programs": (programs, 1000),
    "two_steps": (two_steps, 1000),
    "equations": (equations, 1000),
}


def main(names: list[str]) -> None:
    """Runs the named parts, or all."""
    for name in names or PARTS:
        name, *seeds = name.split(":")
        part, count = PARTS[name]
        chosen = range(*map(int, seeds or [str(count)]))
        started = time.monotonic()
        words = collections.Counter(part(chosen))
        spent = time.monotonic() - started
        found = f"{name}: {sum(words.values())} cases in {spent:.0f} s: {dict(words)}"
        sys.stdout.write(found + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
