"""Softmaxes are recognised in every spelling, forward and backward, and nothing else is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient
from norms import arrays, canonical, expanded
from rewriting import count, evaluate, relative_norm, text
from softmaxes import (
    LOGSUMEXP,
    SOFTMAX,
    exponential,
    passes_over_rows,
    raised,
    training,
    without_maximum,
)

SHAPE = (3, 5, 8)
CASES = [
    pytest.param(kind, fun, id=f"{kind}: {name}")
    for kind, table in (("softmax", SOFTMAX), ("logsumexp", LOGSUMEXP))
    for name, fun in table.items()
]


def reductions(jaxpr):
    return count(jaxpr, "reduce_sum") + count(jaxpr, "reduce_max")


def operands(fun, dtype=jnp.float32):
    (x,) = arrays(SHAPE, dtype=dtype)
    (g,) = arrays(jax.eval_shape(fun, x).shape, dtype=dtype)
    return 2 * x, g - 0.5


@pytest.mark.parametrize(("kind", "fun"), CASES)
def test_spellings(kind, fun):
    step, args = training(fun), operands(fun)
    jaxpr = canonical(step, *args)
    result, notes = raised(jaxpr)
    assert notes == [f"{kind}: 1 forward, 1 backward"]
    assert count(result, "softmax_statistics") == 1
    assert count(result, "softmax_gradient") == (kind == "softmax")
    plain = expanded(result)
    assert not count(plain, "softmax_statistics") and not count(plain, "softmax_gradient")
    has_maximum = count(jaxpr, "reduce_max") > 0
    assert reductions(plain) == reductions(jaxpr) + (not has_maximum)
    want = evaluate(jaxpr, *args)
    assert relative_norm(evaluate(result, *args), want) < 1e-6
    assert relative_norm(evaluate(plain, *args), want) < 1e-6


@pytest.mark.parametrize("fun", [SOFTMAX["jax.nn"], SOFTMAX["by hand"], LOGSUMEXP["jax.nn"]])
def test_float64(fun):
    with jax.enable_x64(True):
        args = operands(fun, jnp.float64)
        jaxpr = canonical(training(fun), *args)
        result, notes = raised(jaxpr)
        assert len(notes) == 1 and notes[0].endswith("1 forward, 1 backward")
        want = evaluate(jaxpr, *args)
        assert relative_norm(evaluate(result, *args), want) < 1e-14
        assert relative_norm(evaluate(expanded(result), *args), want) < 1e-14


@pytest.mark.parametrize("cast", [False, True])
def test_bfloat16_is_rounded_at_least_as_carefully(cast):
    def fun(x):
        wide = jax.nn.softmax(x.astype(jnp.float32) if cast else x)
        return wide.astype(x.dtype)

    args = operands(fun, jnp.bfloat16)
    jaxpr = canonical(training(fun), *args)
    result, notes = raised(jaxpr)
    assert notes == ["softmax: 1 forward, 1 backward"]
    want = evaluate(jaxpr, *args)
    exact = training(jax.nn.softmax)(*(a.astype(jnp.float32) for a in args))
    got = evaluate(expanded(result), *args)
    assert [a.dtype for a in got] == [a.dtype for a in want]
    for a, b, c in zip(got, want, exact, strict=True):
        assert relative_norm([a], [c]) <= relative_norm([b], [c]) < 2e-2


@pytest.mark.parametrize("fun", [jax.nn.softmax, LOGSUMEXP["jax.nn"], LOGSUMEXP["log_softmax"]])
def test_infinities_give_what_they_gave(fun):
    x = jnp.asarray([[1.0, -np.inf, 2, 3], [-np.inf] * 4, [1, np.inf, 2, 3], [1e30, -1e30, 0, 1]])
    jaxpr = canonical(fun, x)
    result, notes = raised(jaxpr)
    assert len(notes) == 1
    for got in (evaluate(result, x), evaluate(expanded(result), x)):
        np.testing.assert_array_equal(got[0], evaluate(jaxpr, x)[0])


@pytest.mark.parametrize("fun", [jax.nn.softmax, jax.nn.log_softmax, LOGSUMEXP["jax.nn"]])
def test_rows_that_a_mask_drops(fun):
    """Forward and backward they give what they gave: 0, -inf or NaN, by how they are spelled."""
    x, g = arrays((6, 8), (6, 8))
    x = x.at[2].set(-jnp.inf).at[3, 1].set(jnp.inf).at[4, 1].set(jnp.nan)
    mask = jnp.asarray(np.arange(8) % 3 > 0) & (jnp.arange(6) != 1)[:, None]
    masked = lambda x: jax.nn.logsumexp(x, -1, where=mask)  # noqa: E731
    if fun in (jax.nn.softmax, jax.nn.log_softmax):
        masked = functools.partial(fun, where=mask)
    else:
        g = g[:, 0]
    jaxpr = canonical(training(masked), x, g)
    result, notes = raised(jaxpr)
    assert len(notes) == 1 and notes[0].endswith("1 forward, 1 backward")
    want = evaluate(jaxpr, x, g)
    for got in (evaluate(result, x, g), evaluate(expanded(result), x, g)):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


OF_ITSELF = {
    "entropy": lambda p, log_p: -p * log_p,
    "entropy, the logarithm of p": lambda p, log_p: -p * jnp.log(p),
    "square": lambda p, log_p: p**2,
    "Tsallis": lambda p, log_p: p * (1 - p**0.5),
    "entropy, weighted": lambda p, log_p: jnp.arange(8) * p * log_p,
}


@pytest.mark.parametrize("name", OF_ITSELF)
@pytest.mark.parametrize("axis", [-1, 1])
def test_a_cotangent_computed_from_x_alone(name, axis):
    def loss(x):
        p, log_p = jax.nn.softmax(x, axis), jax.nn.log_softmax(x, axis)
        return OF_ITSELF[name](p, log_p).sum()

    (x,) = arrays(SHAPE)
    jaxpr = canonical(jax.value_and_grad(loss), x)
    result, notes = raised(jaxpr)
    assert notes == ["softmax: 1 forward, 1 backward"]
    assert count(result, "softmax_gradient") == 1
    plain = expanded(result)
    assert reductions(plain) <= reductions(jaxpr)
    want = evaluate(jaxpr, x)
    assert relative_norm(evaluate(result, x), want) < 1e-6
    assert relative_norm(evaluate(plain, x), want) < 1e-6


def test_a_cotangent_that_the_softmax_is_squared_with():
    """Half of a gradient looks like one: the whole is what counts."""
    (x,) = arrays(SHAPE)
    step = jax.grad(lambda x: (jax.nn.softmax(x**2) ** 2 * jnp.sin(x)).sum())
    jaxpr = canonical(step, x)
    result, notes = raised(jaxpr)
    assert notes == ["softmax: 1 forward, 1 backward"]
    assert relative_norm(evaluate(expanded(result), x), evaluate(jaxpr, x)) < 1e-6


def test_without_maximum():
    """Where the row is on chip, it gets a maximum and does not overflow; elsewhere it stays."""
    x = jnp.asarray([[300.0, 1, 2]])
    result, _ = raised(canonical(without_maximum, x))
    np.testing.assert_array_equal(evaluate(expanded(result), x)[0], [[1.0, 0, 0]])
    result, notes = raised(canonical(without_maximum, jnp.ones((2, 100000))))
    assert not count(result, "softmax_statistics")
    assert len(notes) == 1 and "would need a pass of its own" in notes[0]
    fun = lambda x: jnp.exp(x) / jnp.exp(x).sum(0)  # noqa: E731
    assert not count(raised(canonical(fun, x))[0], "softmax_statistics")


def test_a_gradient_along_columns_shares_a_pass_with_the_total():
    for name, depth in (("jax.nn", 3), ("jax.nn, axis 1", 2)):
        args = operands(SOFTMAX[name])
        result, _ = raised(canonical(training(SOFTMAX[name]), *args))
        assert passes_over_rows(expanded(result)) == depth


@pytest.mark.parametrize("fun", LOGSUMEXP.values(), ids=LOGSUMEXP)
def test_a_gradient_alone(fun):
    """The value itself is not asked for."""
    step = jax.grad(lambda x: 3 * fun(x).sum())
    (x,) = arrays(SHAPE)
    jaxpr = canonical(step, x)
    result, notes = raised(jaxpr)
    assert len(notes) == 1 and notes[0].endswith(": 1 forward, 1 backward")
    assert relative_norm(evaluate(expanded(result), x), evaluate(jaxpr, x)) < 1e-6


def test_the_gradient_is_found_among_others():
    def fun(x):
        return jax.nn.softmax(x) * jnp.tanh(x) + jax.nn.softmax(jnp.sin(x), 1)

    args = operands(fun)
    jaxpr = canonical(training(fun), *args)
    result, notes = raised(jaxpr)
    assert notes == ["softmax: 2 forward, 2 backward"]
    plain = expanded(result)
    assert reductions(plain) <= reductions(jaxpr)
    assert relative_norm(evaluate(plain, *args), evaluate(jaxpr, *args)) < 1e-6


def test_a_softmax_and_a_logsumexp_share_their_maximum():
    def fun(x):
        return jax.nn.softmax(x) + jax.nn.logsumexp(x, -1, keepdims=True) ** 2

    args = operands(fun)
    jaxpr = canonical(training(fun), *args)
    result, notes = raised(jaxpr)
    assert notes == ["logsumexp: 1 forward, 1 backward", "softmax: 1 forward, 1 backward"]
    plain = expanded(result)
    assert reductions(plain) <= reductions(jaxpr)
    assert relative_norm(evaluate(plain, *args), evaluate(jaxpr, *args)) < 1e-6


def loop(x):
    return jax.lax.scan(lambda y, _: (jax.checkpoint(jax.nn.softmax)(y), None), x, length=3)[0]


def branch(x):
    return jax.lax.cond(x[0, 0, 0] > 0, jax.nn.softmax, SOFTMAX["by hand"], x)


@pytest.mark.parametrize(("fun", "found"), [(loop, 1), (branch, 2)])
def test_bodies(fun, found):
    (x,) = arrays(SHAPE)
    jaxpr = canonical(fun, x)
    result, notes = raised(jaxpr)
    assert notes == [f"softmax: {found} forward, 0 backward"]
    assert relative_norm(evaluate(expanded(result), x), evaluate(jaxpr, x)) < 1e-6


def test_checkpointed():
    """The softmax that is computed again has a gradient; nothing crosses the barrier."""
    fun = jax.checkpoint(lambda x: jnp.sin(jax.nn.softmax(x)))
    args = operands(fun)
    jaxpr = canonical(training(fun), *args)
    result, notes = raised(jaxpr)
    assert notes == ["softmax: 2 forward, 1 backward"]
    assert relative_norm(evaluate(expanded(result), *args), evaluate(jaxpr, *args)) < 1e-6


def test_shard_map():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    (x,) = arrays(SHAPE)
    for fun in (jax.nn.softmax, jax.grad(lambda x: 3 * LOGSUMEXP["jax.nn"](x).sum())):
        jaxpr = canonical(mapped(fun), x)
        result, notes = raised(jaxpr)
        assert len(notes) == 1 and ": 1 forward, " in notes[0]
        assert relative_norm(evaluate(expanded(result), x), evaluate(jaxpr, x)) < 1e-6


# What is not a softmax


def other_axes(x):
    e = exponential(x, 1)
    return e / e.sum(-1, keepdims=True)


def other_minimum(x):
    e = jnp.exp(x - jax.lax.stop_gradient(x.min(-1, keepdims=True)))
    return jnp.sin(e.sum(-1)) + e.mean()


def of_a_subset(x):
    e = exponential(x)
    return e / e[..., :4].sum(-1, keepdims=True)


def not_normalised(x):
    return exponential(x) * x


def one_more(x):
    e = exponential(x)
    return e / (1 + e.sum(-1, keepdims=True))


def one_more_than_the_maximum(x):
    e = jnp.exp(x - jax.lax.stop_gradient(jnp.maximum(x.max(-1, keepdims=True), 1)))
    return e / e.sum(-1, keepdims=True)


def only_exponentials_masked(x):
    e = jnp.where(x > 0, jnp.exp(x - x.max(-1, keepdims=True)), 0)
    return e / e.sum(-1, keepdims=True)


def total_of_masked_rows(x):
    """0 rather than NaN in a row that is masked as a whole."""
    top = stop_gradient(jnp.where(x > 0, x, -jnp.inf).max(-1, keepdims=True))
    e = jnp.where(x > 0, jnp.exp(x - top), 0)
    total = e.sum(-1, keepdims=True)
    return e / jnp.where(total == 0, 1, total)


@pytest.mark.parametrize("fun", [other_minimum, of_a_subset, not_normalised])
def test_look_alikes(fun):
    args = operands(fun)
    jaxpr = canonical(training(fun), *args)
    result, _ = raised(jaxpr)
    assert result is jaxpr


@pytest.mark.parametrize("fun", [other_axes, one_more])
def test_statistics_that_do_not_fit_have_no_gradient_of_a_softmax(fun):
    args = operands(fun)
    jaxpr = canonical(training(fun), *args)
    result, _ = raised(jaxpr)
    assert not count(result, "softmax_gradient")
    plain = expanded(result)
    assert reductions(plain) <= reductions(jaxpr)
    assert relative_norm(evaluate(plain, *args), evaluate(jaxpr, *args)) < 1e-6


def test_another_gradient_stays():
    """A straight-through softmax: its gradient is not that of a softmax."""

    @jax.custom_vjp
    def fun(x):
        return jax.nn.softmax(x)

    def forward(x):
        return fun(x), fun(x)

    def backward(y, g):
        return (y * (g - (g * y).mean(-1, keepdims=True)),)

    fun.defvjp(forward, backward)
    args = operands(fun)
    jaxpr = canonical(training(fun), *args)
    result, notes = raised(jaxpr)
    assert notes[0] == "softmax: 1 forward, 0 backward"
    assert len(notes) == 2 and "not the gradient of this softmax" in notes[1]
    assert relative_norm(evaluate(expanded(result), *args), evaluate(jaxpr, *args)) < 1e-6


def test_numbers_of_columns_are_not_those_of_rows():
    """In a square matrix, shapes do not tell which way a row's number is repeated."""

    def fun(x, k):
        e = exponential(x)
        total = e.sum(-1)
        return jnp.log(total), e * (k / total)[None, :]

    args = arrays((6, 6), (6,))
    jaxpr = canonical(fun, *args)
    result, notes = raised(jaxpr)
    assert notes == ["logsumexp: 1 forward, 0 backward"]
    assert relative_norm(evaluate(expanded(result), *args), evaluate(jaxpr, *args)) < 1e-6


@pytest.mark.parametrize(
    ("fun", "reason"),
    [
        (only_exponentials_masked, "is masked, but not what the maximum is taken of"),
        (total_of_masked_rows, "masked as a whole has another value"),
        (one_more_than_the_maximum, "not of differences from the maximum"),
    ],
)
def test_near_misses_are_noted(fun, reason):
    (x,) = arrays(SHAPE)
    jaxpr = canonical(fun, x)
    result, notes = raised(jaxpr)
    assert result is jaxpr
    assert len(notes) == 1 and reason in notes[0] and "test_raise_softmax.py" in notes[0]


def test_empty():
    x = jnp.ones((0, 4))
    jaxpr = canonical(jax.nn.softmax, x)
    assert raised(jaxpr)[0] is jaxpr


# The text


def test_golden(golden):
    args = arrays((4, 16), (4, 16))
    cases = {
        "softmax": training(jax.nn.softmax),
        "softmax, no maximum": training(without_maximum),
        "log_softmax": training(jax.nn.log_softmax),
    }
    sections = []
    for name, fun in cases.items():
        jaxpr = canonical(fun, *args)
        result, _ = raised(jaxpr)
        stages = {"canonical": jaxpr, "raised": result, "expanded": expanded(result)}
        sections += [f"{name}, {stage}\n{text(program)}\n" for stage, program in stages.items()]
    golden("passes/raise_softmax.txt", "\n".join(sections))
