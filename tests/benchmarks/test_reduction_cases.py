"""The cases of the suite ``reductions`` at full size: planned, not run."""

import jax
import pytest
from partitions import context

from benchmarks.kernels import reductions
from benchmarks.kernels.case import cases
from jevt import pipeline
from jevt.partition import partition

CASES = {case.name: case for case in cases("reductions", "full")}

#: Kernels of a case where one is not enough: what is computed of sums over all rows is another
#: kernel, and so is a mean over tokens.
KERNELS = {
    "batch-statistics": 2,
    "cross-entropy-value-and-grad": 2,
    "cross-entropy-soft-value-and-grad": 2,
    "cross-entropy-in-full-value-and-grad": 3,
}


def kernels(case):
    arguments = jax.eval_shape(lambda: case.args(0))
    jaxpr = jax.make_jaxpr(case.fun)(*arguments)
    planned_for = context("triton")
    for _, run in pipeline.graph_passes(planned_for):
        jaxpr = run(jaxpr)
    plan = partition(jaxpr.with_consts(()), planned_for)
    return [group for group in plan.groups if group.kind != "opaque"]


@pytest.mark.parametrize("name", [name for name in CASES if "adamw" not in name])
def test_full_tensors_are_moved_once(name):
    case = CASES[name]
    groups = kernels(case)
    family = name[: name.index(name.split("-")[-2]) - 1]
    assert len(groups) <= KERNELS.get(family, 1)
    assert all(group.target == "triton" for group in groups)
    moved = sum(t.nbytes for g in groups for t in (*g.spec.inputs, *g.spec.outputs))
    assert moved <= 1.001 * case.bytes


def test_optimizer_of_all_tensors():
    case = CASES["adamw-bert-394"]
    weights, grads, _ = jax.eval_shape(lambda: case.args(0))
    assert len(weights) == len(grads) == 394
    # Weights and gradients are bfloat16, moments float32; the gradient alone is not written.
    assert case.bytes == pytest.approx(22 * sum(w.size for w in weights), rel=1e-3)


def test_smoke_has_what_no_other_suite_has():
    names = {case.name for case in cases("reductions", "smoke")}
    assert len(names) >= 10
    functions = {case.fun for case in cases("reductions", "smoke")}
    assert reductions.adamw in functions
