"""Gathers and scatters of one element a row as one-hot arithmetic: same elements, same borders."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from rewriting import EDGES, before_and_after, count, evaluate, near, rewritten, same, traced

from jevt.passes import canonicalize, one_hot

PASSES = (canonicalize.run, one_hot.run, canonicalize.run)
LOGITS = np.linspace(-3, 3, 15, dtype=np.float32).reshape(3, 5)
LABELS = np.array([4, 0, 2], np.int32)
SEQUENCE = np.linspace(-3, 3, 40, dtype=np.float32).reshape(2, 4, 5)
TOKENS = np.array([[4, 0, 2, 1], [3, 3, -1, 9]], np.int32)


def _optax(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _taken(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def _indexed(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(logits.shape[0]), labels].mean()


def _vmapped(logits, labels):
    return -jax.vmap(lambda row, i: row[i])(jax.nn.log_softmax(logits), labels).mean()


def _clipped(logits, labels):
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1, mode="clip")
    return -taken.mean()


LOSSES = {
    "optax": (jax.value_and_grad(_optax), LOGITS, LABELS),
    "optax_sequence": (jax.value_and_grad(_optax), SEQUENCE, TOKENS),
    "taken": (jax.value_and_grad(_taken), LOGITS, LABELS),
    "taken_sequence": (jax.value_and_grad(_taken), SEQUENCE, TOKENS),
    "indexed": (jax.value_and_grad(_indexed), LOGITS, LABELS),
    "vmapped": (jax.value_and_grad(_vmapped), LOGITS, LABELS),
    "clipped": (jax.value_and_grad(_clipped), SEQUENCE, TOKENS),
}


def test_golden(golden):
    cases = {name: LOSSES[name] for name in ("optax", "taken", "indexed")}
    golden("passes/one_hot.txt", before_and_after(cases, PASSES))


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    fun, *args = LOSSES[name]
    jaxpr = traced(fun, *args)
    assert count(jaxpr, "gather") and count(jaxpr, "scatter-add")
    result = rewritten(PASSES, jaxpr)
    assert count(result, "gather") == count(result, "scatter-add") == 0
    near(evaluate(result, *args), evaluate(jaxpr, *args), 1e-6)


def _gathered(mode, fill=None):
    def fun(x, i):
        numbers = lax.GatherDimensionNumbers((), (1,), (1,), (0,), (0,))
        taken = lax.gather(x, i[:, None, None], numbers, (1, 1), mode=mode, fill_value=fill)
        return taken, lax.neg(x)  # someone else reads the rows

    return fun


def _scattered(mode):
    def fun(u, i):
        numbers = lax.ScatterDimensionNumbers((), (1,), (1,), (0,), (0,))
        zeros = jnp.zeros((u.shape[0], 4), u.dtype)
        return lax.scatter_add(zeros, i[:, None, None], u[:, None], numbers, mode=mode)

    return fun


MODES = ("fill", "clip", "promise_in_bounds")
INDICES = [-(2**31), -7, -5, -4, -1, 0, 1, 3, 4, 5, 100, 127, 2**31 - 1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_positions_outside(mode, dtype):
    info = np.iinfo(dtype)
    indices = np.array(
        [i for i in [*INDICES, 200, 255, 2**32 - 1] if info.min <= i <= info.max], dtype
    )
    if mode == "promise_in_bounds":
        indices = indices[(indices >= 0) & (indices < 4)]
    x = np.resize(EDGES, (indices.size, 4))
    for fun, arg in ((_gathered(mode), x), (_scattered(mode), x[:, 2])):
        jaxpr = traced(fun, arg, indices)
        result = rewritten(PASSES, jaxpr)
        assert count(result, "gather") == count(result, "scatter-add") == 0
        same(evaluate(result, arg, indices), evaluate(jaxpr, arg, indices), signs=False)


def test_positions_of_64_bits():
    with jax.enable_x64(True):
        indices = np.array([2**32 + 1, -(2**40), 2, 4, -1], np.int64)
        x = np.resize(EDGES, (5, 4)).astype(np.float64)
        for mode in ("fill", "clip"):
            for fun, arg in ((_gathered(mode), x), (_scattered(mode), x[:, 2])):
                jaxpr = traced(fun, arg, indices)
                result = rewritten(PASSES, jaxpr)
                assert count(result, "gather") == count(result, "scatter-add") == 0
                same(evaluate(result, arg, indices), evaluate(jaxpr, arg, indices), signs=False)


def test_rows_longer_than_the_position_counts():
    x = np.arange(600, dtype=np.float32).reshape(2, 300)
    indices = np.array([127, -3], np.int8)
    jaxpr = traced(_gathered("fill", 7.0), x, indices)
    result = rewritten(PASSES, jaxpr)
    assert count(result, "gather") == 0
    same(evaluate(result, x, indices), evaluate(jaxpr, x, indices))


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float16", "uint8"])
def test_types(dtype):
    x = np.arange(12).reshape(3, 4).astype(np.dtype(dtype))
    indices = np.array([3, -1, 0], np.int32)
    for fun, arg in ((_gathered("fill"), x), (_scattered("fill"), x[:, 2])):
        jaxpr = traced(fun, arg, indices)
        result = rewritten(PASSES, jaxpr)
        assert count(result, "gather") == count(result, "scatter-add") == 0
        same(evaluate(result, arg, indices), evaluate(jaxpr, arg, indices), signs=False)


LEFT_ALONE = {
    "embedding": (lambda t, i: t[i], LOGITS, LABELS % 3),
    "embedding_gradient": (jax.grad(lambda t, i: (t[i] ** 2).sum()), LOGITS, LABELS % 3),
    "of_columns": (
        lambda x, i: jnp.take_along_axis(jnp.sin(x), i[None], 0),
        LOGITS,
        np.array([0, 1, 2, 0, 1]),
    ),
    "several_a_row": (
        lambda x, i: jnp.take_along_axis(jnp.sin(x), i, -1),
        LOGITS,
        np.array([[0, 1], [1, 1], [3, 2]]),
    ),
    "of_an_input_alone": (lambda x, i: jnp.take_along_axis(x, i[:, None], -1), LOGITS, LABELS),
    "one_of_a_vector": (lambda x, i: jnp.sin(x)[i], LOGITS[0], np.int32(3)),
    "added_to_values": (lambda x, i: x.at[jnp.arange(3), i].add(1.0), LOGITS, LABELS),
    "flags": (lambda x, i: jnp.take_along_axis(x > 0, i[:, None], -1), LOGITS, LABELS),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    fun, *args = LEFT_ALONE[name]
    jaxpr = traced(fun, *args)
    result = rewritten(PASSES, jaxpr)
    for primitive in ("gather", "scatter-add"):
        assert count(result, primitive) == count(jaxpr, primitive)


def test_constant_position():
    def fun(x):
        return jax.value_and_grad(lambda v: (v[..., 0] * 2.0 + v[1] @ v[..., -1].T).sum())(x)

    x = LOGITS[:, :3]
    jaxpr = traced(fun, x)
    result = rewritten(PASSES, jaxpr)
    assert count(result, "gather") == count(result, "scatter-add") == 0
    near(evaluate(result, x), evaluate(jaxpr, x), 1e-6)


def test_inside_scan():
    def fun(x, i):
        def body(total, step):
            return total + _optax(*step), None

        return jax.grad(lambda v: lax.scan(body, 0.0, (v, i))[0])(x)

    jaxpr = traced(fun, SEQUENCE, TOKENS)
    result = rewritten(PASSES, jaxpr)
    assert count(result, "gather") == 0
    near(evaluate(result, SEQUENCE, TOKENS), evaluate(jaxpr, SEQUENCE, TOKENS), 1e-6)


@hypothesis.given(
    st.sampled_from([(3,), (1,), (2, 1, 3)]),
    st.sampled_from([2, 5]),
    st.sampled_from(["float32", "float64", "bfloat16"]),
    st.sampled_from([_optax, _taken, _clipped]),
    st.integers(0, 2**31),
)
@hypothesis.settings(max_examples=8, deadline=None)
def test_any_shape(rows, classes, dtype, loss, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        x = rng.normal(size=(*rows, classes)).astype(np.dtype(dtype))
        i = rng.integers(-classes - 1, classes + 1, size=rows).astype(np.int32)
        jaxpr = traced(jax.value_and_grad(loss), x, i)
        result = rewritten(PASSES, jaxpr)
        assert count(result, "scatter-add") == 0
        got, want = (evaluate(j, x, i, compiled=True) for j in (result, jaxpr))
        near(got, want, 1e-6)
