"""The cases of the suite ``reductions`` at full size: planned, not run."""

import math

import jax
import jax.numpy as jnp
import pytest
from partitions import context

from benchmarks.kernels import optimizers, vocabulary
from benchmarks.kernels.case import cases
from benchmarks.workload import cast_floats
from jevt import pipeline
from jevt.partition import partition
from jevt_kernels import codegen

CASES = {case.name: case for case in cases("reductions", "full")}

#: Kernels of a case where one is not enough: what is computed of sums over all rows is another
#: kernel, and so is a mean over tokens.
KERNELS = {
    "batch-statistics": 2,
    "cross-entropy-value-and-grad": 2,
    "cross-entropy-soft-value-and-grad": 2,
    "cross-entropy-in-full-value-and-grad": 3,
}

#: Cases whose time is not in tensors that are moved once.
OTHERS = ("adamw", "lamb", "clip", "linear", "embedding")


def after_passes(case, planned_for):
    arguments = jax.eval_shape(lambda: case.args(0))
    jaxpr = jax.make_jaxpr(case.fun)(*arguments)
    for _, run in pipeline.graph_passes(planned_for):
        jaxpr = run(jaxpr)
    return jaxpr.with_consts(())


def kernels(case):
    planned_for = context("triton")
    plan = partition(after_passes(case, planned_for), planned_for)
    return [group for group in plan.groups if group.kind != "opaque"]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(OTHERS)])
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


def test_norms_of_all_tensors_are_summed_up_together():
    """LAMB reads weights, gradients and moments twice, and writes once, in a few launches."""
    case = CASES["lamb-bert-394"]
    weights, *_ = jax.eval_shape(lambda: case.args(0))
    groups = [g for g in kernels(case) if g.spec is not None]
    assert [len(g.spec.members) for g in groups] == [68] * 5 + [54]
    steps = [s.spec for g in groups for s in codegen.generate(g.spec).stages.steps]
    assert len(steps) == 3 * len(groups)
    moved = sum(t.nbytes for spec in steps for t in (*spec.inputs, *spec.outputs))
    # 2 + 2 + 4 + 4 bytes an element twice, and 2 + 4 + 4.
    assert moved == pytest.approx(34 * sum(w.size for w in weights), rel=1e-2)


def test_the_norm_of_all_gradients_takes_two_launches():
    """Clipping reads gradients twice, and writes once: two launches for sums, two that scale."""
    case = CASES["clip-bert-394"]
    (gradients,) = jax.eval_shape(lambda: case.args(0))
    groups = kernels(case)
    sums, *scaled = [g for g in groups if g.target == "triton"]
    assert len(sums.spec.members) == sum(len(g.spec.members) for g in scaled) == 394
    assert len(scaled) == 2
    assert all(g.reason == "cost model: scalars only" for g in groups if g.target == "xla")
    steps = [s.spec for s in codegen.generate(sums.spec).stages.steps]
    assert len(steps) == 2
    steps += [g.spec for g in scaled]
    moved = sum(t.nbytes for spec in steps for t in (*spec.inputs, *spec.outputs))
    assert moved == pytest.approx(6 * sum(g.size for g in gradients), rel=1e-2)


@pytest.mark.parametrize(
    ("name", "loops"),
    [
        ("linear-cross-entropy-16384x1024x30528-bfloat16", 0),
        ("linear-cross-entropy-16384x2048x128256-bfloat16", 1),
        ("linear-cross-entropy-in-chunks-16384x1024x30528-bfloat16", 1),
    ],
)
def test_logits_by_chunks(name, loops):
    case = CASES[name]
    jaxpr = after_passes(case, context("triton"))
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("scan") == loops
    tokens, features, words = map(int, name.split("-")[-2].split("x"))
    assert case.flops == 6 * tokens * features * words
    largest = max(
        math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.shape
    )
    assert (largest == tokens * words) == (not loops)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("linear")])
def test_reference_never_has_all_logits(name):
    case = CASES[name]
    arguments = jax.eval_shape(lambda: cast_floats(case.args(0), jnp.float32))
    assert jax.eval_shape(case.reference, *arguments) == jax.eval_shape(case.fun, *arguments)
    tokens, _, words = map(int, name.split("-")[-2].split("x"))
    text = str(jax.make_jaxpr(case.reference)(*arguments))
    assert f"f32[{vocabulary.CHUNK['full']},{words}]" in text
    assert f"[{tokens},{words}]" not in text


def test_gradient_of_an_embedding_is_a_sum_of_segments():
    case = CASES["embedding-gradient-16384x30528x1024-bfloat16"]
    names = {eqn.primitive.name for eqn in after_passes(case, context("triton")).eqns}
    assert "segment_sum" in names
    assert not names & {"scatter-add", "scatter_add"}


def test_smoke_has_what_no_other_suite_has():
    names = {case.name for case in cases("reductions", "smoke")}
    assert len(names) >= 10
    functions = {case.fun for case in cases("reductions", "smoke")}
    assert {optimizers.adamw, optimizers.lamb, optimizers.clip} <= functions
    assert vocabulary.linear_cross_entropy in functions
