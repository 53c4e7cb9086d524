"""Whole training steps of small models: all passes keep forward, backward and update."""

from __future__ import annotations

import functools

import jax
import jax.extend
import numpy as np
import pytest
import small_models
from rewriting import ALGEBRA, count, evaluate, relative_norm, rewritten, traced
from small_models import MODELS

from benchmarks import registry
from benchmarks.options import Options
from jevt import pipeline
from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.passes import expose_random_bits


@functools.cache
def model(name):
    return MODELS[name]()


def bodies(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, jax.extend.core.Jaxpr):
                    yield from bodies(item)


def changes(outs, args) -> np.ndarray:
    """What a step adds to its state, as one vector: that is where an error would show."""
    pairs = zip(outs, [*jax.tree.leaves(args), *[None] * len(outs)], strict=False)
    parts = []
    for new, old in pairs:
        if np.issubdtype(np.asarray(new).dtype, np.floating):
            base = old if np.shape(old) == np.shape(new) else 0.0
            parts.append((np.asarray(new, np.float64) - np.asarray(base, np.float64)).ravel())
    return np.concatenate(parts)


def before_and_after(step, args):
    """A step's changes before and after all passes for a GPU."""
    jaxpr = jax.make_jaxpr(step)(*args)
    context = Context("cuda", "auto", False, (False,) * len(jaxpr.invars), DEVICES["H100"])
    result = jaxpr
    for _, graph_pass in pipeline.graph_passes(context):
        result = graph_pass(result)
    jax.extend.core.check_jaxpr(result)
    assert result.out_avals == jaxpr.out_avals
    outs = [evaluate(j, *jax.tree.leaves(args), compiled=True) for j in (jaxpr, result)]
    return [changes(o, args) for o in outs]


@pytest.mark.parametrize("name", [n for n in MODELS if n != "mixed_precision"])
def test_values(name):
    want, got = before_and_after(*model(name))
    assert relative_norm([got], [want]) < 1e-5


@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "xmlcnn", "gcn"])
def test_workloads(name):
    workload = registry.make(name, Options(size="smoke", dtype="float32", param_dtype="float32"))
    want, got = before_and_after(workload.step, (workload.init(0), workload.batch(0)))
    assert relative_norm([got], [want]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_nothing_that_has_another_name_is_left(name):
    step, args = model(name)
    result = rewritten(ALGEBRA, expose_random_bits.run(traced(step, *args)))
    for body in bodies(result):
        for gone in ("integer_pow", "add_any", "squeeze"):
            assert all(e.primitive.name != gone for e in body.eqns)


def test_mixed_precision_is_as_precise():
    """bfloat16 is rounded where it was, or less: the distance from float32 does not grow."""
    step, args = small_models.mixed_precision("float32")
    truth = changes(evaluate(traced(step, *args), *jax.tree.leaves(args), compiled=True), args)
    want, got = before_and_after(*model("mixed_precision"))
    assert relative_norm([got], [truth]) < 1.1 * relative_norm([want], [truth]) < 0.05


@pytest.mark.parametrize("name", ["gpt", "conv_net", "mlp_mixer", "two_towers", "contrastive"])
def test_losses_are_gathered_no_more(name):
    step, args = model(name)
    result = rewritten(ALGEBRA, traced(step, *args))
    embeddings = {"gpt": 2}.get(name, 0)
    assert count(result, "gather") == count(result, "scatter-add") == embeddings


def test_checkpoint_is_still_recomputed():
    step, args = model("gpt_checkpointed")
    jaxpr = traced(step, *args)
    result = rewritten(ALGEBRA, jaxpr)
    assert count(result, "optimization_barrier") == count(jaxpr, "optimization_barrier") == 2
    assert count(result, "dot_general") == count(jaxpr, "dot_general")
