"""Copies that the solver decides on: made where they pay, and nowhere else."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from many_partitions import ANYTHING
from partitions import check_valid, context, random_problem, trace

from jevt.partition import batch, copies, partition, solve, to_json
from jevt.partition.printing import traffic

SHAPE = (2048, 512)
RNG = np.random.default_rng(0)


def batch_norm_gradient(x, g):
    """The gradient behind a relu is summed along rows first, and used again after that."""
    gradient = jnp.where(x > 0, g, 0.0)
    return gradient - gradient.sum(0) / x.shape[0] - x * (gradient * x).sum(0)


def planned(function, *operands, where=None, **options):
    jaxpr, consts = trace(function, *operands)
    plan = partition(jaxpr, where or context("triton"), **options)
    return jaxpr, plan, consts


def counted(jaxpr):
    return collections.Counter(eqn.primitive.name for eqn in jaxpr.eqns)


def test_a_gradient_is_made_again_after_its_sums():
    x, g = (RNG.normal(size=SHAPE).astype(np.float32) for _ in "xg")
    before, plan, consts = planned(batch_norm_gradient, x, g)
    assert counted(plan.jaxpr)["select_n"] == counted(before)["select_n"] + 1
    check_valid(plan, [*consts, x, g], rtol=1e-4)
    assert plan.solution.status == "optimal"
    kernels = [group for group in plan.groups if group.target == "triton"]
    assert not any(v.aval.shape == SHAPE for v in kernels[0].jaxpr.outvars)
    # The second kernel reads x and g again, in place of a gradient that the first would write.
    assert 5 * x.nbytes < sum(map(traffic, plan.groups)) < 5.1 * x.nbytes


def test_what_is_dear_is_kept():
    def function(x):
        dear = x
        for _ in range(40):
            dear = jnp.tanh(dear)
        return dear - dear.sum(0)

    x = RNG.normal(size=SHAPE).astype(np.float32)
    before, plan, _ = planned(function, x)
    assert counted(plan.jaxpr)["tanh"] == counted(before)["tanh"]


def test_without_copies_the_objective_is_higher(monkeypatch):
    operands = [jax.ShapeDtypeStruct(SHAPE, "float32")] * 2
    _, with_copies, _ = planned(batch_norm_gradient, *operands)
    monkeypatch.setattr(copies, "candidates", lambda graph: frozenset())
    _, without, _ = planned(batch_norm_gradient, *operands)
    assert with_copies.solution.objective_us < without.solution.objective_us
    assert len(with_copies.jaxpr.eqns) > len(without.jaxpr.eqns)


def test_one_worker_or_many_and_any_load(monkeypatch):
    """Limits are counted in work: whatever the clock says, the plan is the same."""

    def function(x, g):
        for n in range(1, 5):  # components that differ
            part = batch_norm_gradient(x[:, : 64 * n], g[:, : 64 * n])
            x = x.at[:, : 64 * n].set(jnp.cumsum(part, 1))
        return x

    operands = [jax.ShapeDtypeStruct(SHAPE, "float32")] * 2
    texts = {to_json(planned(function, *operands, workers=n)[1]) for n in (1, 2, 5)}
    monkeypatch.setattr(batch, "available", lambda: 7)
    texts.add(to_json(planned(function, *operands)[1]))
    slow = dataclasses.replace(context("triton"), partition_seconds=1000.0)
    texts.add(to_json(planned(function, *operands, where=slow)[1]))
    assert len(texts) == 1


@pytest.mark.parametrize("seconds", [0.0, 1e-3])
def test_no_time_still_gives_a_valid_plan(seconds):
    x, g = (RNG.normal(size=(64, 32)).astype(np.float32) for _ in "xg")
    where = dataclasses.replace(context("triton"), partition_seconds=seconds)
    _, plan, consts = planned(batch_norm_gradient, x, g, where=where)
    check_valid(plan, [*consts, x, g], rtol=1e-4)
    assert plan.solution.gap >= 0


def test_a_piece_whose_copy_has_to_be_written_is_taken_apart():
    """Its group did not hang together; the node's other copy was in the piece that read it."""
    problem = random_problem(180, 270, near=6, products=13, copies=27)
    outcome = solve.solve(problem, ANYTHING, solve.Limits(work=0.2))
    assert problem.valid(outcome.groups)
    assert outcome.cost == problem.cost(outcome.groups)
