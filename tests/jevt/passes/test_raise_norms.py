"""Norms are recognised in every spelling, forward and backward, and nothing else is."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms import (
    BATCH,
    GROUP,
    LAYER,
    RMS,
    RSQRT,
    arrays,
    batch_channels_first,
    canonical,
    expanded,
    linen_batch,
    of_module,
    raised,
    training,
    twice,
    with_variance,
)
from rewriting import count, evaluate, relative_norm, text

from benchmarks import registry
from benchmarks.options import Options
from jevt.primitives import norms as primitives

ROWS, IMAGES = (5, 7, 16), (3, 6, 4, 8)

SPELLINGS = [
    pytest.param(kind, norm, shape, id=f"{kind}: {name}")
    for kind, table, shape in (
        ("layer_norm", LAYER, ROWS),
        ("rms_norm", RMS, ROWS),
        ("layer_norm", {"linen, one group": of_module(nn.GroupNorm(num_groups=1))}, IMAGES),
        ("group_norm", GROUP, IMAGES),
        ("batch_norm", BATCH, IMAGES),
    )
    for name, norm in table.items()
]


def operands(shape, dtype=jnp.float32):
    return arrays(shape, shape[-1:], shape[-1:], shape, dtype=dtype)


def sums(jaxpr):
    return count(jaxpr, "reduce_sum")


@pytest.mark.parametrize(("kind", "norm", "shape"), SPELLINGS)
def test_spellings(kind, norm, shape):
    step, args = training(norm), operands(shape)
    jaxpr = canonical(step, *args)
    result, notes = raised(jaxpr)
    assert notes == [f"{kind}: 1 forward, 1 backward"]
    assert count(result, "norm_statistics") == 1
    assert count(result, "norm_gradient") == 1
    plain = expanded(result)
    assert not count(plain, "norm_statistics") and not count(plain, "norm_gradient")
    assert sums(plain) <= sums(jaxpr)
    want = jax.jit(step)(*args)
    assert relative_norm(evaluate(result, *args), want) < 1e-6
    assert relative_norm(evaluate(plain, *args), want) < 1e-6


@pytest.mark.parametrize("norm", [LAYER["linen"], LAYER["jnp.var, / sqrt"], *BATCH.values()])
def test_float64(norm):
    with jax.enable_x64(True):
        args = operands(IMAGES, jnp.float64)
        jaxpr = canonical(training(norm), *args)
        result, _ = raised(jaxpr)
        assert count(result, "norm_gradient") == 1
        want = evaluate(jaxpr, *args)
        assert relative_norm(evaluate(result, *args), want) < 1e-14
        assert relative_norm(evaluate(expanded(result), *args), want) < 1e-14


def test_batch_norm_sums_once():
    for norm in BATCH.values():
        jaxpr = canonical(training(norm), *operands(IMAGES))
        # Mean and variance, and the gradients of bias and scale, which give that of x.
        assert sums(expanded(raised(jaxpr)[0])) == 4


@pytest.mark.parametrize("name", GROUP)
def test_group_norm_sums_once(name):
    """Mean and variance, and two sums of the gradient: those for bias and scale are made of them.

    But not where a scale for each channel comes after groups that are channels, or have been left.
    """
    jaxpr = canonical(training(GROUP[name]), *operands(IMAGES))
    before, after = (
        sum(
            eqn.primitive.name == "reduce_sum" and eqn.invars[0].aval.size == np.prod(IMAGES)
            for eqn in program.eqns
        )
        for program in (jaxpr, expanded(raised(jaxpr)[0]))
    )
    assert after <= before
    if name in ("linen", "linen, two passes", "nnx"):
        assert (before, after) == (5, 4)


def test_a_gradient_in_bfloat16_is_rounded_once():
    def step(x, scale, bias, g):
        y, vjp = jax.vjp(of_module(nn.LayerNorm(dtype=jnp.bfloat16)), x, scale, bias)
        return y, *vjp(g)

    args = operands((6, 5, 64), jnp.bfloat16)
    jaxpr = canonical(step, *args)
    result, notes = raised(jaxpr)
    assert notes == ["layer_norm: 1 forward, 1 backward"]
    exact = [a.astype(jnp.float32) for a in args]
    _, vjp = jax.vjp(of_module(nn.LayerNorm()), *exact[:3])
    want = [vjp(exact[3])[0]]
    before, after = (
        relative_norm([evaluate(program, *args)[1]], want) for program in (jaxpr, expanded(result))
    )
    assert after < before < 1e-2


def test_the_variance_of_a_row_is_taken_in_two_passes():
    """A mean far from 0 does not cost digits of the variance."""
    (x, scale, bias, g) = operands(ROWS)
    step = training(LAYER["linen"])
    result = expanded(raised(canonical(step, x, scale, bias, g))[0])
    far = x + 300
    exact = np.asarray(far, np.float64)
    want = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    got = evaluate(result, far, jnp.ones(16), jnp.zeros(16), g)[0]
    asked = jax.jit(step)(far, jnp.ones(16), jnp.zeros(16), g)[0]
    assert relative_norm([got], [want]) < 1e-4 < relative_norm([asked], [want])


def test_long_rows_keep_their_pass():
    args = operands((2, 3, 40000))
    one, two = LAYER["linen"], LAYER["linen, two passes"]
    for norm, is_two_pass in ((one, False), (two, True)):
        (statistics,) = (
            e
            for e in raised(canonical(training(norm), *args))[0].eqns
            if e.primitive is primitives.norm_statistics_p
        )
        assert statistics.params["two_pass"] is is_two_pass


def test_two_norms_and_running_statistics():
    assert raised(canonical(training(twice), *operands(ROWS)))[1] == [
        "layer_norm: 2 forward, 2 backward"
    ]

    def step(x, mean, variance):
        variables = {"batch_stats": {"mean": mean, "var": variance}}
        module = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
        y, state = module.apply(variables, x, mutable=["batch_stats"])
        return y, state["batch_stats"]["mean"], state["batch_stats"]["var"]

    args = arrays(IMAGES, (8,), (8,))
    result, notes = raised(canonical(step, *args))
    assert notes == ["batch_norm: 1 forward, 0 backward"]
    plain = expanded(result)
    assert sums(plain) == 2
    want = jax.tree.leaves(jax.jit(step)(*args))
    assert relative_norm(evaluate(plain, *args), want) < 1e-6


def test_what_others_read_stays():
    def norm(x, scale, bias):
        mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
        variance = jnp.maximum(square - mean**2, 0)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias, square

    args = operands(ROWS)[:3]
    result, notes = raised(canonical(norm, *args))
    assert count(result, "norm_statistics") == 0
    assert len(notes) == 1 and "sums of the statistics that others read" in notes[0]


def loop(x, scale, bias):
    def body(y, _):
        return jax.checkpoint(LAYER["linen"])(y, scale, bias), None

    return jax.lax.scan(body, x, length=3)[0]


def branch(x, scale, bias):
    return jax.lax.cond(x[0, 0, 0] > 0, LAYER["linen"], LAYER["nnx"], x, scale, bias)


@pytest.mark.parametrize(("fun", "norms"), [(loop, 1), (branch, 2)])
def test_bodies(fun, norms):
    args = operands(ROWS)[:3]
    result, notes = raised(canonical(fun, *args))
    assert notes == [f"layer_norm: {norms} forward, 0 backward"]
    want = [jax.jit(fun)(*args)]
    assert relative_norm(evaluate(result, *args), want) < 1e-6
    assert relative_norm(evaluate(expanded(result), *args), want) < 1e-6


def test_checkpointed_norms():
    """The norm that is computed again has a gradient; nothing crosses the barrier."""
    args = operands(ROWS)
    step = training(jax.checkpoint(lambda *a: jnp.sin(LAYER["linen"](*a))))
    result, notes = raised(canonical(step, *args))
    assert notes == ["layer_norm: 2 forward, 1 backward"]
    assert relative_norm(evaluate(expanded(result), *args), jax.jit(step)(*args)) < 1e-6


def test_shard_map():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    fun = jax.shard_map(
        lambda x: with_variance(RSQRT)(x, 1.0, 0.0),
        mesh=mesh,
        in_specs=spec("i"),
        out_specs=spec("i"),
    )
    (x,) = arrays(ROWS)
    result, notes = raised(canonical(fun, x))
    assert notes == ["layer_norm: 1 forward, 0 backward"]
    assert relative_norm(evaluate(expanded(result), x), [jax.jit(fun)(x)]) < 1e-6


# What is not a norm


def other_axes(x, scale, bias):
    return (x - x.mean(0)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def unbiased(x, scale, bias):
    return with_variance(RSQRT, variance=lambda x, a, keepdims: x.var(a, ddof=1, keepdims=True))(
        x, scale, bias
    )


def masked(x, scale, bias):
    mask = x > 0
    mean = jnp.mean(x, -1, keepdims=True, where=mask)
    variance = jnp.mean(x * x, -1, keepdims=True, where=mask) - mean**2
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def normalised_to_length(x, scale, bias):
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-5) * scale + bias


def epsilon_inside(x, scale, bias):
    c = x - x.mean(-1, keepdims=True)
    return c * jax.lax.rsqrt(((c + 1e-2) ** 2).mean(-1, keepdims=True)) * scale + bias


@pytest.mark.parametrize("norm", [unbiased, masked, normalised_to_length])
def test_look_alikes(norm):
    args = operands(ROWS)
    jaxpr = canonical(training(norm), *args)
    result, notes = raised(jaxpr)
    assert not count(result, "norm_statistics")
    assert len(notes) == 1 and "not of a variance or a mean square" in notes[0]


@pytest.mark.parametrize("norm", [other_axes, epsilon_inside])
def test_statistics_that_do_not_fit_have_no_gradient_of_a_norm(norm):
    args = operands(ROWS)
    jaxpr = canonical(training(norm), *args)
    result, _ = raised(jaxpr)
    assert not count(result, "norm_gradient")
    assert relative_norm(evaluate(expanded(result), *args), evaluate(jaxpr, *args)) < 1e-6


def test_statistics_in_bfloat16_stay():
    args = operands(ROWS, jnp.bfloat16)
    fun = lambda x: x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) / 16 + 1)  # noqa: E731
    result, notes = raised(canonical(fun, args[0]))
    assert not count(result, "norm_statistics")
    assert len(notes) == 1 and "bf16" in notes[0]


def test_transposed_cotangents_stay():
    """Channels first: the gradient's values are in another order than x."""
    args = arrays(IMAGES, (8,), (8,), (3, 8, 6, 4))
    jaxpr = canonical(training(batch_channels_first), *args)
    result, _ = raised(jaxpr)
    assert count(result, "norm_statistics") == 1
    assert relative_norm(evaluate(expanded(result), *args), evaluate(jaxpr, *args)) < 1e-6


# Whole steps

WORKLOADS = {
    "bert": "layer_norm: 4 forward, 4 backward",
    "vit": "layer_norm: 3 forward, 3 backward",
    "vit-nnx": "layer_norm: 3 forward, 3 backward",
    "resnet": "batch_norm: 9 forward, 9 backward",
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(name):
    workload = registry.make(name, Options(size="smoke"))
    jaxpr = canonical(workload.step, *workload.shapes())
    result, notes = raised(jaxpr)
    assert notes == [WORKLOADS[name]]
    plain = expanded(result)
    assert sums(plain) <= sums(jaxpr)
    assert len(plain.eqns) < len(jaxpr.eqns)
    scopes = {str(e.source_info.name_stack) for e in jaxpr.eqns}
    assert {str(e.source_info.name_stack) for e in plain.eqns} <= scopes


# The text


def test_golden(golden):
    rows = arrays((4, 16), (16,), (16,), (4, 16))
    images = arrays((2, 3, 8), (8,), (8,), (2, 3, 8))
    cases = {
        "layer norm": (training(LAYER["linen"]), *rows),
        "rms norm": (training(RMS["by hand"]), *rows),
        "batch norm": (training(linen_batch), *images),
    }
    sections = []
    for name, (fun, *args) in cases.items():
        jaxpr = canonical(fun, *args)
        result, _ = raised(jaxpr)
        stages = {"canonical": jaxpr, "raised": result, "expanded": expanded(result)}
        sections += [f"{name}, {stage}\n{text(program)}\n" for stage, program in stages.items()]
    golden("passes/raise_norms.txt", "\n".join(sections))


ONE_ROW = {
    "std": lambda x: x.std(),
    "sum and std": lambda x: (0.01 * x.sum(), x.std()),
    "root of the mean square": lambda x: jnp.sqrt(jnp.square(x).mean()),
    "variance, one less": lambda x: x.var(ddof=1),
    "standardised": lambda x: (x - x.mean()) / (x.std() + 1e-5),
    "layer norm": lambda x: (x - x.mean()) * jax.lax.rsqrt(x.var() + 1e-6),
    "rms norm": lambda x: x * jax.lax.rsqrt(jnp.square(x).mean() + 1e-6),
    "layer norm of one token": lambda x: nn.LayerNorm(use_scale=False, use_bias=False).apply(
        {}, x[:1, :1]
    ),
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row(name):
    """Between two numbers there is always a factor: that of a sample says nothing."""
    fun = ONE_ROW[name]
    (x,) = arrays(ROWS)
    jaxpr = canonical(lambda x: jax.vjp(fun, x + 0.3)[0], x)
    assert relative_norm(evaluate(raised(jaxpr)[0], x), evaluate(jaxpr, x)) < 1e-6
    step = jax.grad(lambda x: sum(jnp.sin(y).sum() for y in jax.tree.leaves(fun(x + 0.3))))
    jaxpr = canonical(step, x)
    assert relative_norm(evaluate(raised(jaxpr)[0], x), evaluate(jaxpr, x)) < 1e-5
