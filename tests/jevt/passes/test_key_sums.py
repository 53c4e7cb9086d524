"""Sums of keys' gradients over all tokens: nobody reads the gradients for what is 0."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import SOFTMAXES, arrays, einsum, raised
from jax import lax
from jax.sharding import PartitionSpec
from rewriting import cleaned, evaluate

from jevt import _jax_internals as internals
from jevt import pipeline
from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.passes import cse, dce, key_sums

CUDA = Context("cuda", "auto", False, (), DEVICES["H100"])
B, T, N, H = 2, 6, 3, 16


def summed(jaxpr, context=CUDA):
    """The jaxpr after the pass, which is well-typed and idempotent."""
    return cleaned(functools.partial(key_sums.run, context=context), jaxpr, cse.run, dce.run)


def sums(jaxpr) -> int:
    """How many sums there are, those of bodies included."""
    own = sum(eqn.primitive.name == "reduce_sum" for eqn in jaxpr.eqns)
    bodies = (b for eqn in jaxpr.eqns for b in jax.extend.core.jaxprs_in_params(eqn.params))
    return own + sum(map(sums, bodies))


def operands(layout="BTNH", dtype=jnp.bfloat16):
    shape = (B, N, T, H) if layout == "BNTH" else (B, T, N, H)
    return arrays(*[shape] * 4, dtype=dtype)


def gradients(layout="BTNH", **masks):
    """``q, k, v, d_out -> d_q, d_k, d_v``."""

    def step(*args):
        *qkv, d_out = args
        return jax.vjp(einsum(layout, SOFTMAXES["in float32"], **masks), *qkv)[1](d_out)

    return step


def plain(d, layout):
    return d.sum((0, 1) if layout == "BTNH" else (0, 2))


def in_float32(d, layout):
    return plain(d.astype(jnp.float32), layout)


def of_columns(d, layout):
    """As of a projection to all heads."""
    d = d if layout == "BTNH" else jnp.swapaxes(d, 1, 2)
    return d.reshape(-1, N * H).sum(0)


def masked(s):
    return jnp.where(jnp.tri(T, T, dtype=bool), s, -1e30)


@pytest.mark.parametrize("total", [plain, in_float32, of_columns])
@pytest.mark.parametrize(("layout", "dtype"), [("BTNH", jnp.bfloat16), ("BNTH", jnp.float16)])
@pytest.mark.parametrize("masks", [{}, {"mask": masked}], ids=["whole", "masked"])
def test_values(total, layout, dtype, masks):
    def step(*args):
        return [total(d, layout) for d in gradients(layout, **masks)(*args)]

    args = operands(layout, dtype)
    before, _ = raised(step, *args)
    after = summed(before)
    assert (sums(before), sums(after)) == (3, 2)
    got = evaluate(after, *args)
    assert not np.asarray(got[1], np.float32).any()
    exact = jax.jit(step)(*(a.astype(jnp.float32) for a in args))
    wide = jax.jit(gradients(layout, **masks))(*(a.astype(jnp.float32) for a in args))
    for mine, want, d in zip(got, exact, wide, strict=True):
        # By what is added up: next to nothing is left of it.
        error = np.linalg.norm(np.asarray(mine, np.float32) - want) / np.linalg.norm(d)
        assert error < (1e-2 if dtype == jnp.bfloat16 else 2e-3)


@pytest.mark.parametrize("number", range(4))
def test_not_a_number(number):
    """The sum of d_k is none where the program's is none."""

    def step(*args):
        return [plain(d, "BTNH") for d in gradients()(*args)]

    args = operands()
    args[number] = args[number].at[1, 2, 1, 3].set(jnp.nan)
    after = summed(raised(step, *args)[0])
    assert sums(after) == 2
    got, want = evaluate(after, *args)[1], jax.jit(step)(*args)[1]
    assert np.isnan(np.asarray(want, np.float32)).any()
    assert np.isnan(np.asarray(got, np.float32))[np.isnan(np.asarray(want, np.float32))].all()


@pytest.mark.parametrize(
    "total",
    [
        lambda d: d.sum(1),
        lambda d: d.sum(0),
        lambda d: d.sum((0, 1, 2)),
        lambda d: d.sum((0, 1, 3)),
        lambda d: (d * d).sum((0, 1)),
        lambda d: d[:, 1:].sum((0, 1)),
        lambda d: d.max((0, 1)),
        lambda d: d.astype(jnp.float16).sum((0, 1)),
    ],
)
def test_other_sums_stay(total):
    before, _ = raised(lambda *args: [total(d) for d in gradients()(*args)], *operands())
    assert summed(before) is before


def test_without_the_sum_of_the_queries_gradient():
    """There is nothing that says whether all is finite."""

    def step(*args):
        d_q, d_k, _ = gradients()(*args)
        return d_q, plain(d_k, "BTNH"), d_q.sum(0)

    before, _ = raised(step, *operands())
    assert summed(before) is before


def test_other_numbers_of_keys():
    def step(*args):
        return [plain(d, "BTNH") for d in gradients()(*args)]

    args = arrays((B, T, N, H), (B, T + 2, N, H), (B, T + 2, N, H), (B, T, N, H))
    before, _ = raised(step, *(a.astype(jnp.bfloat16) for a in args))
    assert summed(before) is before


def test_in_a_scan():
    def attend(x, biases):
        def body(x, bias):
            q, k, v = (x + b for b in bias)
            return x + einsum("BTNH", SOFTMAXES["in float32"])(q, k, v), None

        return lax.scan(body, x, biases)[0]

    x, biases, d_out = arrays((B, T, N, H), (4, 3, N, H), (B, T, N, H), dtype=jnp.bfloat16)

    def step(x, biases, d_out):
        return jax.vjp(attend, x, biases)[1](d_out)

    before, _ = raised(step, 0.1 * x, 0.1 * biases, d_out)
    after = summed(before)
    assert sums(after) == sums(before) - 1
    got, unchanged = (
        evaluate(jaxpr, 0.1 * x, 0.1 * biases, d_out, compiled=True)[1] for jaxpr in (after, before)
    )
    got, unchanged = (np.asarray(g, np.float32) for g in (got, unchanged))
    np.testing.assert_array_equal(got[:, [0, 2]], unchanged[:, [0, 2]])
    assert not got[:, 1].any()


def test_inside_shard_map_only():
    def inside(*args):
        return [lax.psum(plain(d, "BTNH"), "data") for d in gradients()(*args)]

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = PartitionSpec("data")
    partitioned = dataclasses.replace(CUDA, partitioned=True)
    mapped = jax.shard_map(
        inside, mesh=mesh, in_specs=(batch,) * 4, out_specs=[PartitionSpec()] * 3
    )
    before, _ = raised(mapped, *operands())
    assert sums(summed(before, partitioned)) == sums(before) - 1
    outside, _ = raised(lambda *a: [plain(d, "BTNH") for d in gradients()(*a)], *operands())
    assert summed(outside, partitioned) is outside


def projected(x, w, b):
    """Attention of one projection to queries, keys and values with biases."""
    q, k, v = (y.reshape(*x.shape[:2], -1, 64) for y in jnp.split(x @ w + b, 3, -1))
    return jax.nn.dot_product_attention(q, k, v).reshape(x.shape)


def test_a_step_with_one_bias_for_all(monkeypatch):
    """After all passes, which split the gradient of all three first."""
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    types = [(128, 256, 768), (768, 3 * 768), (3 * 768,), (128, 256, 768)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in types]
    jaxpr = jax.make_jaxpr(lambda *a: jax.vjp(projected, *a[:3])[1](a[3]))(*args)
    for _, graph_pass in pipeline.graph_passes(CUDA):
        jaxpr = graph_pass(jaxpr)
    assert sums(jaxpr) == 2
