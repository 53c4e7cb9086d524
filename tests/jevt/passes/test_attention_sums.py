"""Sums of attention's gradients over tokens that its backward kernel gives."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import SOFTMAXES, arrays, einsum, names, raised
from jax import lax
from jax.sharding import PartitionSpec
from rewriting import cleaned, evaluate

from jevt import _jax_internals as internals
from jevt import pipeline
from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.passes import attention_sums, cse, dce
from jevt.primitives import attention_kernel

CUDA = Context("cuda", "auto", False, (), DEVICES["H100"])
B, T, S, N, H = 2, 6, 5, 3, 64


@pytest.fixture
def small(monkeypatch):
    """Attentions of any number of tokens and heads are the kernel's."""
    monkeypatch.setattr(attention_kernel, "FEWEST", 1)
    monkeypatch.setattr(attention_kernel, "FILLED", {1: 0.0, 2: 0.0})


def summed(jaxpr, context=CUDA):
    """The jaxpr after the pass, which is well-typed and idempotent."""
    return cleaned(functools.partial(attention_sums.run, context=context), jaxpr, cse.run, dce.run)


def gives_sums(jaxpr) -> list[bool]:
    """Of the backward passes, those of bodies included."""
    found = [
        e.params.get("sums", False) for e in jaxpr.eqns if e.primitive.name == "attention_backward"
    ]
    for eqn in jaxpr.eqns:
        for body in jax.extend.core.jaxprs_in_params(eqn.params):
            found += gives_sums(body)
    return found


def shapes(layout="BTNH"):
    q, k = (B, T, N, H), (B, S, N, H)
    return [(b, n, t, h) if layout == "BNTH" else (b, t, n, h) for b, t, n, h in (q, k, k, q)]


def operands(layout="BTNH", dtype=jnp.bfloat16):
    return arrays(*shapes(layout), dtype=dtype)


def gradients(layout="BTNH"):
    """``q, k, v, d_out -> d_q, d_k, d_v``."""

    def step(*args):
        *qkv, d_out = args
        return jax.vjp(einsum(layout, SOFTMAXES["in float32"]), *qkv)[1](d_out)

    return step


def errors(got, want, args, layout="BTNH"):
    """Of sums, each by the norm of what is added up."""
    wide = [a.astype(jnp.float32) for a in args]
    norms = [np.linalg.norm(np.asarray(g)) for g in jax.jit(gradients(layout))(*wide)]
    return [
        np.linalg.norm(np.asarray(x, np.float32) - np.asarray(y, np.float32)) / norm
        for x, y, norm in zip(got, want, norms, strict=True)
    ]


def over_tokens(layout):
    return (0, 1) if layout == "BTNH" else (0, 2)


def plain(d, layout):
    return d.sum(over_tokens(layout))


def in_float32(d, layout):
    return d.astype(jnp.float32).sum(over_tokens(layout))


def of_columns(d, layout):
    """As of a projection to all heads."""
    d = d if layout == "BTNH" else jnp.swapaxes(d, 1, 2)
    return d.reshape(-1, N * H).sum(0)


def of_halves(d, layout):
    """The sum's axes in another order, and cut elsewhere."""
    d = d if layout == "BTNH" else jnp.swapaxes(d, 1, 2)
    d = d.astype(jnp.float32).reshape(*d.shape[:2], N, 2, H // 2)
    return d.transpose(3, 0, 4, 1, 2).sum((1, 3)).reshape(2, -1)


@pytest.mark.parametrize("total", [plain, in_float32, of_columns, of_halves])
@pytest.mark.parametrize(("layout", "dtype"), [("BTNH", jnp.bfloat16), ("BNTH", jnp.float16)])
def test_values(total, layout, dtype, small):
    def step(*args):
        found = gradients(layout)(*args)
        return *found, *(total(d, layout) for d in found)

    args = operands(layout, dtype)
    before, _ = raised(step, *args)
    after = summed(before)
    assert gives_sums(before) == [False] and gives_sums(after) == [True]
    assert "reduce_sum" in names(before) and "reduce_sum" not in names(after)
    got = evaluate(after, *args)
    for x, y in zip(got[:3], evaluate(before, *args)[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    want = jax.jit(step)(*(a.astype(jnp.float32) for a in args))[3:]
    assert max(errors(got[3:], want, args, layout)) < (1e-2 if dtype == jnp.bfloat16 else 2e-3)


@pytest.mark.parametrize("number", range(3))
def test_one_of_the_sums(number, small):
    """Twice, in two spellings."""

    def step(*args):
        found = gradients()(*args)
        d = found[number]
        return plain(d, "BTNH"), of_columns(d, "BTNH"), found[number - 2]

    args = operands()
    before, _ = raised(step, *args)
    after = summed(before)
    assert gives_sums(after) == [True] and "reduce_sum" not in names(after)
    *got, _ = evaluate(after, *args)
    np.testing.assert_array_equal(np.asarray(got[0]).ravel(), np.asarray(got[1]))
    want = gradients()(*(a.astype(jnp.float32) for a in args))[number].sum((0, 1))
    scale = np.linalg.norm(np.asarray(gradients()(*args)[number], np.float32))
    assert np.linalg.norm(np.asarray(got[0], np.float32) - want) < 1e-2 * scale


@pytest.mark.parametrize("number", range(4))
def test_not_a_number(number, small):
    """A sum is none where the program's is none."""

    def step(*args):
        return tuple(plain(d, "BTNH") for d in gradients()(*args))

    args = operands()
    args[number] = args[number].at[1, 2, 1, 3].set(jnp.nan)
    after = summed(raised(step, *args)[0])
    assert gives_sums(after) == [True]
    wrong = 0
    for x, y in zip(evaluate(after, *args), jax.jit(step)(*args), strict=True):
        nan = np.isnan(np.asarray(y, np.float32))
        assert np.isnan(np.asarray(x, np.float32))[nan].all()
        wrong += nan.any()
    assert wrong >= 2  # the sum of d_v does not depend on v


def over_the_tokens_alone(d):
    return d.sum(1)


def over_the_batch_alone(d):
    return d.sum(0)


def over_heads_too(d):
    return d.sum((0, 1, 2))


def over_the_width(d):
    return d.sum((0, 1, 3))


def of_products(d):
    return (d * d).sum((0, 1))


def of_some_tokens(d):
    return d[:, 1:].sum((0, 1))


def of_halves_of_tokens(d):
    return d[:, :4].reshape(B, 2, 2, N, H).sum((0, 1))


def greatest(d):
    return d.max((0, 1))


def narrowed(d):
    """Rounded before they are added up."""
    return d.astype(jnp.float16).sum((0, 1))


@pytest.mark.parametrize(
    "total",
    [
        over_the_tokens_alone,
        over_the_batch_alone,
        over_heads_too,
        over_the_width,
        of_products,
        of_some_tokens,
        of_halves_of_tokens,
        greatest,
        narrowed,
    ],
)
def test_other_sums_stay(total, small):
    def step(*args):
        return [total(d) for d in gradients()(*args)]

    before, _ = raised(step, *operands())
    assert gives_sums(before) == [False]
    assert summed(before) is before


@pytest.mark.parametrize(
    ("context", "changes"),
    [
        (dataclasses.replace(CUDA, device=DEVICES["A100"]), {}),
        (dataclasses.replace(CUDA, backend="xla"), {}),
        (CUDA, {"dtype": jnp.float32}),
        (CUDA, {"width": 32}),
        (CUDA, {"masked": True}),
        (CUDA, {"few": True}),
    ],
)
def test_where_cudnn_computes_the_gradients(context, changes, small, monkeypatch):
    if changes.get("few"):
        monkeypatch.setattr(attention_kernel, "FEWEST", 1000)
    masks = {"mask": lambda s: jnp.where(jnp.tri(T, S, dtype=bool), s, -1e30)}
    attend = einsum("BTNH", SOFTMAXES["in float32"], **(masks if changes.get("masked") else {}))

    def step(*args):
        *qkv, d_out = args
        return [d.sum((0, 1)) for d in jax.vjp(attend, *qkv)[1](d_out)]

    cut = [(*shape[:3], changes.get("width", H)) for shape in shapes()]
    args = arrays(*cut, dtype=changes.get("dtype", jnp.bfloat16))
    before, _ = raised(step, *args, context=context)
    assert gives_sums(before) == [False]
    assert summed(before, context) is before


def test_in_a_scan(small):
    def attend(x, biases):
        def body(x, bias):
            q, k, v = (x + b for b in bias)
            return x + einsum("BTNH", SOFTMAXES["in float32"])(q, k, v), None

        return lax.scan(body, x, biases)[0]

    x, biases, d_out = arrays((B, T, N, H), (4, 3, N, H), (B, T, N, H), dtype=jnp.bfloat16)
    x, biases = 0.1 * x, 0.1 * biases

    def step(x, biases, d_out):
        return jax.vjp(attend, x, biases)[1](d_out)

    before, _ = raised(step, x, biases, d_out)
    after = summed(before)
    assert gives_sums(before) == [False] and gives_sums(after) == [True]
    wide = [a.astype(jnp.float32) for a in (x, biases, d_out)]
    exact = jax.jit(step)(*wide)[1]
    got, unchanged = (
        evaluate(jaxpr, x, biases, d_out, compiled=True)[1] for jaxpr in (after, before)
    )
    error, of_unchanged = (
        np.linalg.norm(np.asarray(g, np.float32) - exact) / np.linalg.norm(exact)
        for g in (got, unchanged)
    )
    assert error < 1.1 * of_unchanged < 2e-2


def test_inside_shard_map_only(small):
    def sums(*args):
        return [lax.psum(d.sum((0, 1)), "data") for d in gradients()(*args)]

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = PartitionSpec("data")
    inside = jax.shard_map(sums, mesh=mesh, in_specs=(batch,) * 4, out_specs=[PartitionSpec()] * 3)
    args = operands()
    before, _ = raised(inside, *args)
    after = summed(before, dataclasses.replace(CUDA, partitioned=True))
    assert gives_sums(before) == [False] and gives_sums(after) == [True]
    want = [d.sum((0, 1)) for d in gradients()(*(a.astype(jnp.float32) for a in args))]
    assert max(errors(evaluate(after, *args, compiled=True), want, args)) < 1e-2
    outside, _ = raised(lambda *args: [d.sum((0, 1)) for d in gradients()(*args)], *args)
    assert summed(outside, dataclasses.replace(CUDA, partitioned=True)) is outside


def projected(x, w, b):
    """Attention of one projection to queries, keys and values with biases."""
    q, k, v = (y.reshape(*x.shape[:2], -1, H) for y in jnp.split(x @ w + b, 3, -1))
    return jax.nn.dot_product_attention(q, k, v).reshape(x.shape)


def test_a_step_reads_no_gradient_for_its_biases(monkeypatch):
    """After all passes, which split the gradient of all three first."""
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    width = 12 * H
    types = [(128, 256, width), (width, 3 * width), (3 * width,), (128, 256, width)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in types]

    def step(x, w, b, d_y):
        return jax.vjp(projected, x, w, b)[1](d_y)

    jaxpr = jax.make_jaxpr(step)(*args)
    for _, graph_pass in pipeline.graph_passes(CUDA):
        jaxpr = graph_pass(jaxpr)
    assert gives_sums(jaxpr) == [True]
    assert "reduce_sum" not in names(jaxpr)
