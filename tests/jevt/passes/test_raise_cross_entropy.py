"""Cross entropies are recognised in every spelling, forward and backward, and nothing else is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from norms import arrays, canonical, expanded
from rewriting import count, evaluate, relative_norm, text
from softmaxes import CROSS_ENTROPY, passes_over_rows, raised, step_of, with_cross_entropies

from benchmarks import registry
from benchmarks.options import Options
from jevt import pipeline
from jevt._context import Context
from jevt.partition import partition
from jevt.partition.cost import DEVICES
from jevt.passes import cse, raise_cross_entropy
from jevt_kernels import codegen

#: Whose sums take an element of the logarithm of the softmax by its position.
PICKED = ("log_softmax", "log_softmax, one hot", "optax, one hot", "weights")


def operands(dtype=jnp.float32):
    (x,) = arrays((6, 8), dtype=dtype)
    return 2 * x, jnp.asarray([0, 7, 3, 3, 1, 2])


def reductions(jaxpr):
    return count(jaxpr, "reduce_sum") + count(jaxpr, "reduce_max")


def full_size(jaxpr):
    return sum(v.aval.shape == (6, 8) for eqn in jaxpr.eqns for v in eqn.outvars)


@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_spellings(name):
    step, args = step_of(CROSS_ENTROPY[name]), operands()
    jaxpr = canonical(step, *args)
    result, notes = with_cross_entropies(jaxpr)
    assert notes == ["cross entropy: 1 forward, 1 backward"]
    plain = expanded(result)
    assert reductions(plain) == reductions(jaxpr)
    assert full_size(plain) <= full_size(jaxpr)
    want = evaluate(jaxpr, *args)
    assert relative_norm(evaluate(result, *args), want) < 1e-6
    assert relative_norm(evaluate(plain, *args), want) < 1e-6


@pytest.mark.parametrize("name", CROSS_ENTROPY)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_gradient_alone_is_noted(name, sign):
    """As a lazy loss leaves it that nobody reads; and beside another gradient of the logits."""
    loss = CROSS_ENTROPY[name]

    def whole(x, labels):
        return sign * loss(x, labels).mean() + jnp.cos(x).sum()

    result, notes = with_cross_entropies(canonical(jax.grad(whole), *operands()))
    assert notes == ["cross entropy: 0 forward, 1 backward"]
    assert count(result, "softmax_statistics") == 1


@pytest.mark.parametrize("name", PICKED)
def test_a_target_is_picked_before_the_total_is_known(name):
    """No sum over the row depends on a sum over the row; the loss keeps its bits."""
    (x, labels), loss = operands(), CROSS_ENTROPY[name]
    jaxpr = canonical(loss, x, labels)
    plain = expanded(with_cross_entropies(jaxpr)[0])
    for program, depth in ((jaxpr, 3), (plain, 2)):
        assert passes_over_rows(program) == depth
    for n in (labels, labels - 20, labels + 8, -1 - labels):
        np.testing.assert_array_equal(evaluate(plain, x, n)[0], evaluate(jaxpr, x, n)[0])


SMOOTHED = ("optax, smoothed", "smoothed by hand", "smoothed by the mean")


@pytest.mark.parametrize("name", SMOOTHED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_smoothed_labels_need_no_total(name, dtype):
    """Their sum is known: nothing that is summed up waits for the total of a row."""
    with jax.enable_x64(dtype == "float64"):
        args = operands(dtype)
        jaxpr = canonical(CROSS_ENTROPY[name], *args)
        plain = expanded(with_cross_entropies(jaxpr)[0])
        for program, depth in ((jaxpr, 3), (plain, 2)):
            assert passes_over_rows(program) == depth
        labels = args[1]
        for n in (labels, labels - 20, labels + 8):
            got, want = (evaluate(j, args[0], n) for j in (plain, jaxpr))
            np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == "float32" else 1e-14)


SOFT = {
    "optax": optax.softmax_cross_entropy,
    "by hand": lambda x, t: -(t * jax.nn.log_softmax(x)).sum(-1),
    "by hand, the other way": lambda x, t: -jnp.sum(jax.nn.log_softmax(x) * t, -1),
    "einsum": lambda x, t: -jnp.einsum("bc,bc->b", t, jax.nn.log_softmax(x)),
    "logsumexp": lambda x, t: t.sum(-1) * jax.nn.logsumexp(x, -1) - (t * x).sum(-1),
    "z-loss": lambda x, t: optax.softmax_cross_entropy(x, t) + 1e-2 * jax.nn.logsumexp(x, -1) ** 2,
    "weights": lambda x, t: jnp.arange(6.0) * optax.softmax_cross_entropy(x, t),
    "optax, smoothed": lambda x, t: optax.softmax_cross_entropy(x, optax.smooth_labels(t, 0.1)),
}


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("labels", ["weights", "any numbers", "softmax"])
def test_soft_labels(name, labels):
    """Forward and backward, no sum more than is spelled; labels need not sum up to 1."""
    x, t = arrays((6, 8), (6, 8))
    if labels == "weights":
        t = jax.nn.softmax(t)

    def loss(x, t):
        return SOFT[name](x, jax.nn.softmax(t) if labels == "softmax" else t)

    jaxpr = canonical(step_of(loss), x, t)
    result, notes = with_cross_entropies(jaxpr)
    assert notes == ["cross entropy: 1 forward, 1 backward"]
    plain = expanded(result)
    assert reductions(plain) <= reductions(jaxpr)
    assert full_size(plain) <= full_size(jaxpr)
    want = evaluate(jaxpr, x, t)
    assert relative_norm(evaluate(result, x, t), want) < 1e-6
    assert relative_norm(evaluate(plain, x, t), want) < 1e-6
    assert relative_norm(jax.jit(step_of(loss))(x, t), want) < 1e-6


@pytest.mark.parametrize("differentiate", [jax.value_and_grad, jax.grad])
@pytest.mark.parametrize("name", ["optax, integers", "log_softmax", "weights", *SMOOTHED, "soft"])
def test_passes_over_memory(name, differentiate):
    """A row of BERT's words is read once; beside as many soft labels it does not fit on chip.

    Then logits and labels are read twice, and the gradient is written as they are.
    """
    loss = CROSS_ENTROPY.get(name, optax.softmax_cross_entropy)
    x = jax.ShapeDtypeStruct((256, 30528), jnp.float32)
    labels = x if name == "soft" else jax.ShapeDtypeStruct((256,), jnp.int32)
    step = differentiate(lambda x, labels: loss(x, labels).mean())
    jaxpr = jax.make_jaxpr(step)(x, labels)
    context = Context("cuda", "auto", False, (False, False), DEVICES["H100"])
    for _, graph_pass in pipeline.graph_passes(context):
        jaxpr = graph_pass(jaxpr)
    plan = partition(jaxpr, context)
    (spec,) = (g.spec for g in plan.groups if any(v.aval.shape == x.shape for v in g.jaxpr.outvars))
    assert spec.mainloop == "rowwise"
    loops = codegen.generate(spec).text.count("for start in range")
    assert loops == (2 if name == "soft" else 0)


def test_a_z_loss_is_one_multiple_of_the_softmax():
    args = operands()
    jaxpr = canonical(step_of(CROSS_ENTROPY["z-loss apart"]), *args)
    plain = expanded(with_cross_entropies(jaxpr)[0])
    assert full_size(plain) < full_size(jaxpr)
    assert relative_norm(evaluate(plain, *args), evaluate(jaxpr, *args)) < 1e-6


@pytest.mark.parametrize("name", ["optax, integers", "log_softmax", "z-loss apart"])
def test_float64(name):
    with jax.enable_x64(True):
        args = operands(jnp.float64)
        jaxpr = canonical(step_of(CROSS_ENTROPY[name]), *args)
        result, notes = with_cross_entropies(jaxpr)
        assert notes == ["cross entropy: 1 forward, 1 backward"]
        assert relative_norm(evaluate(expanded(result), *args), evaluate(jaxpr, *args)) < 1e-14


def test_soft_labels_and_other_axes():
    x, t = arrays((3, 8, 5), (3, 8, 5))
    loss = lambda x, t: -(jax.nn.softmax(t, 1) * jax.nn.log_softmax(x, 1)).sum(1)  # noqa: E731
    jaxpr = canonical(step_of(loss), x, t)
    result, notes = with_cross_entropies(jaxpr)
    assert notes == ["cross entropy: 1 forward, 1 backward"]
    assert relative_norm(evaluate(expanded(result), x, t), evaluate(jaxpr, x, t)) < 1e-6


def test_bfloat16_logits():
    def loss(x, labels):
        wide = x.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(wide, labels)

    args = operands(jnp.bfloat16)
    jaxpr = canonical(step_of(loss), *args)
    result, notes = with_cross_entropies(jaxpr)
    assert notes == ["cross entropy: 1 forward, 1 backward"]
    for got, want in zip(evaluate(expanded(result), *args), evaluate(jaxpr, *args), strict=True):
        np.testing.assert_array_equal(got, want)


def test_contrastive():
    """Two softmaxes of one square matrix, along its rows and along its columns."""

    def loss(x, labels):
        forward = optax.softmax_cross_entropy_with_integer_labels(x, labels)
        return forward + optax.softmax_cross_entropy_with_integer_labels(x.T, labels)

    x, labels = operands()[0][:, :6], jnp.arange(6)
    jaxpr = canonical(step_of(loss), x, labels)
    result, notes = with_cross_entropies(jaxpr)
    assert notes == ["cross entropy: 2 forward, 2 backward"]
    plain = expanded(result)
    assert relative_norm(evaluate(plain, x, labels), evaluate(jaxpr, x, labels)) < 1e-6


@pytest.mark.parametrize("name", ["log_softmax", "z-loss apart"])
def test_shard_map(name):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    step = jax.grad(lambda x, labels: CROSS_ENTROPY[name](x, labels).sum())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    args = operands()
    jaxpr = canonical(mapped, *args)
    result, _ = with_cross_entropies(jaxpr)
    assert count(result, "softmax_statistics") == 1
    assert relative_norm(evaluate(expanded(result), *args), evaluate(jaxpr, *args)) < 1e-6


# What is not a cross entropy


def entropy(x, labels):
    return -(jax.nn.softmax(x) * jax.nn.log_softmax(x)).sum(-1)


def q_value(x, labels):
    """The target's x, and a softmax of the same x, which do not meet."""
    return jnp.sin(jnp.take_along_axis(x, labels[:, None], -1)[:, 0]) * jax.nn.softmax(x)[:, 0]


def target_and_logsumexp(x, labels):
    """Both are differentiated, by different numbers a row."""
    return jax.nn.logsumexp(x, -1) - jnp.sin(jnp.take_along_axis(x, labels[:, None], -1)[:, 0])


def target_added(x, labels):
    return jax.nn.logsumexp(x, -1) + jnp.take_along_axis(x, labels[:, None], -1)[:, 0]


def other_positions(x, labels):
    """What is subtracted is no row's label."""
    hot = jnp.arange(8) == labels[:, None] * jnp.arange(8)
    return jax.nn.logsumexp(x, -1) - jnp.where(hot, x, 0).sum(-1)


@pytest.mark.parametrize("loss", [entropy, q_value])
def test_look_alikes(loss):
    args = operands()
    jaxpr = canonical(step_of(loss), *args)
    assert with_cross_entropies(jaxpr)[1] == []


@pytest.mark.parametrize(
    "loss", [entropy, q_value, target_and_logsumexp, target_added, other_positions]
)
def test_gradients_of_look_alikes(loss):
    gradient = jax.grad(lambda x, labels: loss(x, labels).mean())
    assert with_cross_entropies(canonical(gradient, *operands()))[1] == []


def test_other_labels_stay():
    """Labels that vary along the row pick any number of elements: nothing is rewritten."""

    def loss(x, labels):
        hot = jnp.arange(8) == labels[:, None] * jnp.arange(8)
        return -jnp.where(hot, jax.nn.log_softmax(x), 0).sum(-1)

    args = operands()
    jaxpr = canonical(loss, *args)
    result, notes = with_cross_entropies(jaxpr)
    assert notes == ["cross entropy: 1 forward, 0 backward"]
    assert passes_over_rows(expanded(result)) == 3


# Whole steps


WORKLOADS = {"bert": 1, "vit": 1, "vit-nnx": 1, "resnet": 0, "gcn": 0, "gcn-bcoo": 0}


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(name):
    workload = registry.make(name, Options(size="smoke"))
    jaxpr = canonical(workload.step, *workload.shapes())
    result, notes = raised(jaxpr)
    softmaxes = ["softmax: 1 forward, 1 backward"] * WORKLOADS[name]
    assert notes == ["logsumexp: 1 forward, 1 backward", *softmaxes]
    result, notes = raised(cse.run(result), raise_cross_entropy)
    assert notes == ["cross entropy: 1 forward, 1 backward"]
    plain = expanded(result)
    assert reductions(plain) <= reductions(jaxpr)
    assert len(plain.eqns) <= len(jaxpr.eqns)


# The text


def test_golden(golden):
    sections = []
    for name in ("log_softmax", "z-loss apart"):
        jaxpr = canonical(step_of(CROSS_ENTROPY[name]), *operands())
        result, _ = with_cross_entropies(jaxpr)
        stages = {"canonical": jaxpr, "raised": result, "expanded": expanded(result)}
        sections += [f"{name}, {stage}\n{text(program)}\n" for stage, program in stages.items()]
    golden("passes/raise_cross_entropy.txt", "\n".join(sections))
