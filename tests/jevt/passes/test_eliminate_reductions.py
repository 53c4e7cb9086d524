"""Identities on sums: each before and after, in several types, and where they must not be used."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from random_programs import PAIRS, STEPS, SUMS, programs
from rewriting import ALGEBRA, before_and_after, count, evaluate, near, rewritten, same, traced

from jevt.passes import canonicalize, eliminate_reductions

PASSES = (canonicalize.run, eliminate_reductions.run, canonicalize.run)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8)).astype(np.float32)
Y = RNG.normal(size=(6, 8)).astype(np.float32)
ROW = RNG.normal(size=6).astype(np.float32)
CUBE = RNG.normal(size=(2, 3, 4)).astype(np.float32)
LABELS = np.array([0, 7, 3, -1, 8, 2], np.int32)


def _rows(r, columns=8):
    return lax.broadcast_in_dim(r, (r.shape[0], columns), (0,))


def _hot(i, columns=8):
    return lax.eq(lax.broadcasted_iota(i.dtype, (i.shape[0], columns), 1), _rows(i, columns))


def _sum(x, *axes):
    return lax.reduce_sum(x, axes)


def _safe_norm(x):
    """With a gradient where it is 0, as optax has it."""
    is_zero = jnp.sqrt(_sum(jnp.square(x), 1)) <= 0
    norm = jnp.sqrt(_sum(jnp.square(jnp.where(is_zero[:, None], 1, x)), 1))
    return jnp.where(is_zero, 0, norm)


# name -> (reductions that are left, function, arguments)
CASES = {
    "of_uniform": (0, lambda x: _sum(jnp.full((40, 40), 2.5, x.dtype), 0) * x[0, 0], X),
    "of_rows": (0, lambda r: _sum(_rows(r), 1), ROW),
    "of_rows_along_both": (1, lambda r: _sum(_rows(r), 0, 1), ROW),
    "of_negation": (1, lambda x: _sum(lax.neg(x), 1), X),
    "unit_axes": (1, lambda x: _sum(lax.reshape(x, (6, 1, 8)), 1, 2), X),
    "only_unit_axes": (0, lambda x: _sum(lax.reshape(x, (6, 1, 8)), 1), X),
    "maximum_of_unit_axis": (0, lambda x: lax.reduce_max(lax.reshape(x, (6, 1, 8)), (1,)), X),
    "scaled_by_row": (1, lambda x, r: _sum(lax.mul(x, _rows(r)), 1), X, ROW),
    "scaled_by_unit_axis": (1, lambda x, r: _sum(lax.mul(x, lax.reshape(r, (6, 1))), 1), X, ROW),
    "divided_by_row": (1, lambda x, r: _sum(lax.div(x, _rows(r)), 1), X, ROW),
    "scaled_inside": (1, lambda x, y, r: _sum(lax.mul(lax.mul(x, _rows(r)), y), 1), X, Y, ROW),
    "the_same_sum_scaled": (1, lambda x, r: (_sum(x, 1), _sum(lax.mul(x, _rows(r)), 1)), X, ROW),
    "centred": (1, lambda x: 1.0 + _sum(lax.sub(x, jnp.mean(x, 1, keepdims=True)), 1), X),
    "centred_by_an_odd_number": (
        1,
        lambda x: 1.0 + _sum(lax.sub(x, jnp.mean(x, 0, keepdims=True)), 0),
        X,
    ),
    "softmax": (1, lambda x: _sum(jax.nn.softmax(x), 1), X),
    "softmax_gradient": (2, lambda x, y: jax.vjp(lambda v: jax.nn.softmax(v, -1), x)[1](y), X, Y),
    "one_hot": (0, lambda i, r: _sum(_hot(i).astype(r.dtype), 1) * r, LABELS, ROW),
    "scaled_one_hot": (0, lambda i, r: _sum(_hot(i).astype(r.dtype) * _rows(r), 1), LABELS, ROW),
    "smoothed_one_hot": (
        0,
        lambda i, r: r * _sum(_hot(i).astype(r.dtype) * 0.75 + 0.25 / 8, 1),
        LABELS,
        ROW,
    ),
    "chosen_one_hot": (
        0,
        lambda i, r: _sum(lax.select_n(_hot(i), jnp.zeros((6, 8), r.dtype), _rows(r)), 1),
        LABELS,
        ROW,
    ),
    "soft_labels_gradient": (
        1,
        lambda x, i: jax.grad(
            lambda v: optax.softmax_cross_entropy(v, jax.nn.one_hot(i, 8, dtype=v.dtype)).sum()
        )(x),
        X,
        LABELS,
    ),
    "nested": (1, lambda x: _sum(_sum(x, 0), 0), CUBE),
    "transposed": (1, lambda x: _sum(lax.transpose(x, (2, 0, 1)), 0), CUBE),
    "expanded": (1, lambda x: _sum(lax.reshape(x, (2, 1, 3, 1, 4)), 2), CUBE),
    "norm_of_what_is_chosen": (1, _safe_norm, X * (ROW > 0)[:, None]),
    "norms_of_lamb": (
        2,
        lambda x: optax.lamb(0.1).update(x, optax.lamb(0.1).init(x), x)[0],
        X,
    ),
    "chosen_for_a_row": (
        1,
        lambda x, r: _sum(lax.select(_rows(r) > 0, jnp.full_like(x, 2.5), x), 1),
        *(X, ROW),
    ),
    "chosen_for_all": (
        1,
        lambda x, r: _sum(jnp.square(jnp.where(r[0] > 0, x, 3)), 0, 1),
        *(X, ROW),
    ),
}


def test_golden(golden):
    cases = {name: case for name, (_, *case) in CASES.items()}
    golden("passes/eliminate_reductions.txt", before_and_after(cases, PASSES))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_values(name, dtype):
    left, fun, *args = CASES[name]
    with jax.enable_x64(dtype == "float64"):
        args = [a.astype(dtype) if a.dtype == np.float32 else a for a in args]
        jaxpr = traced(fun, *args)
        result = rewritten(PASSES, jaxpr)
        assert count(result, "reduce_sum") == left
        tolerance = 1e-6 if dtype == "float32" else 1e-14
        near(evaluate(result, *args), evaluate(jaxpr, *args), tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_rounded_no_more(name, dtype):
    """The error against the exact sum is not above that of the original."""
    _, fun, *args = CASES[name]
    with jax.enable_x64(True):
        args = [a.astype(np.dtype(dtype)) if a.dtype == np.float32 else a for a in args]
        exact = [a.astype(np.float64) if a.dtype.itemsize == 2 else a for a in args]
        jaxpr = traced(fun, *args)
        result = rewritten(PASSES, jaxpr)
        truth = evaluate(traced(fun, *exact), *exact)
        for got, was, true in zip(
            evaluate(result, *args), evaluate(jaxpr, *args), truth, strict=True
        ):
            got, was, true = (np.asarray(v).astype(np.float64) for v in (got, was, true))
            finest = float(jnp.finfo(dtype).eps) * np.abs(true).max()
            assert np.abs(got - true).max() <= np.abs(was - true).max() + finest


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_so(name, bad):
    _, fun, *args = CASES[name]
    for position, arg in enumerate(args):
        if arg.dtype != np.float32:
            continue
        poisoned = arg.copy()
        poisoned.reshape(-1)[5] = bad
        poisoned = [*args[:position], poisoned, *args[position + 1 :]]
        jaxpr = traced(fun, *poisoned)
        result = rewritten(PASSES, jaxpr)
        near(evaluate(result, *poisoned), evaluate(jaxpr, *poisoned), 1e-6, kinds=False)


LEFT_ALONE = {
    "mean_spelled_inside": lambda x: _sum(lax.div(x, np.float32(8.0)), 1),
    "scale_below_one": lambda x: _sum(lax.mul(x, np.float32(0.3)), 1),
    "sum_of_products": lambda x: _sum(lax.mul(x, lax.sin(x)), 1),
    "rows_then_total": lambda x: _sum(_sum(x, 1), 0),
    "of_other_mean": lambda x: _sum(lax.sub(x, lax.broadcast_in_dim(_sum(x, 0), (6, 8), (1,))), 1),
    "reordering_reshape": lambda x: _sum(lax.reshape(x, (8, 6)), 1),
    "chosen_for_an_element": lambda x: _sum(jnp.where(x > 0, x, np.float32(1)), 1),
    "chosen_of_exponentials": lambda x: _sum(jnp.where(x[:, :1] > 0, jnp.exp(x), 0), 1),
    "chosen_of_two": lambda x: _sum(jnp.where(x[:, :1] > 0, x, jnp.exp(x)), 1),
    "chosen_and_not_squared": lambda x: _sum(jnp.exp(jnp.where(x[:, :1] > 0, x, 1)), 1),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    jaxpr = rewritten(canonicalize.run, traced(LEFT_ALONE[name], X))
    result = rewritten(eliminate_reductions.run, jaxpr)
    assert str(result) == str(jaxpr)


def test_square_matrix_and_the_mean_of_its_columns():
    """A mean over one axis, subtracted along the other of the same size, is not the rows' own."""
    x = X[:, :6]

    def fun(x):
        mean = _sum(x, 1) / 6.0
        return _sum(lax.sub(x, lax.broadcast_in_dim(mean, (6, 6), (1,))), 1)

    jaxpr = traced(fun, x)
    result = rewritten(PASSES, jaxpr)
    near(evaluate(result, x), evaluate(jaxpr, x), 1e-6)


def test_narrow_products_stay_inside():
    def fun(x, r):
        return _sum(lax.mul(x, _rows(r)), 1)

    jaxpr = traced(fun, X.astype(jnp.bfloat16), ROW.astype(jnp.bfloat16))
    assert eliminate_reductions.run(canonicalize.run(jaxpr)) is canonicalize.run(jaxpr)


def test_cross_entropy_gradient_sums_no_row_twice():
    def loss(x, i):
        return -jnp.take_along_axis(jax.nn.log_softmax(x), i[:, None], -1).mean()

    labels = LABELS % 8
    jaxpr = traced(jax.value_and_grad(loss), X, labels)
    assert count(jaxpr, "reduce_sum") == 4
    result = rewritten(ALGEBRA, jaxpr)
    assert count(result, "reduce_sum") == 3  # the softmax's, the label's logit, the mean
    near(evaluate(result, X, labels), evaluate(jaxpr, X, labels), 1e-6)


def test_integers_and_empty_axes():
    i = np.arange(12, dtype=np.int32).reshape(3, 4)

    def fun(i):
        rows = lax.broadcast_in_dim(i, (3, 4, 5), (0, 1))
        empty = lax.broadcast_in_dim(i, (3, 4, 0), (0, 1))
        return _sum(rows, 2), _sum(rows, 0, 2), _sum(lax.neg(i), 0), _sum(empty, 2)

    jaxpr = traced(fun, i)
    same(evaluate(rewritten(PASSES, jaxpr), i), evaluate(jaxpr, i))


# Without what makes rounding errors large.
TAME = [s for s in (*STEPS, *PAIRS) if s not in ("cube", "inverse", "not_nan", "div", "where")]


@hypothesis.given(
    programs([*TAME, *SUMS, *SUMS]),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([(3, 4), (4, 4), (1, 4), (4, 1), (2, 1, 3), (5,), ()]),
    st.integers(0, 2**31),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_random_programs(fun, dtype, shape, seed):
    with jax.enable_x64(True):
        x = np.asarray(np.random.default_rng(seed).normal(size=shape)).astype(dtype)
        jaxpr = traced(fun, x)
        result = rewritten(ALGEBRA, jaxpr)
        # Cancellation: an error is small beside the largest of the intermediate values.
        got, want = (
            np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in evaluate(j, x)])
            for j in (result, jaxpr)
        )
        near([got], [want], 1e-5 if dtype == "float32" else 1e-12)
