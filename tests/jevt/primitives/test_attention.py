"""The attention primitives: reference, types, errors, and their lowering for CUDA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import arrays, operands
from rewriting import relative_norm

from jevt.primitives.attention import (
    attention_backward_p,
    attention_p,
    backward_reference,
    reference,
)

LAYOUTS = ("BTNH", "BNTH")


def params(**changes):
    return {"scale": 0.3, "causal": False, "layout": "BTNH"} | changes


def bias_of(shape):
    return [] if shape is None else arrays(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("bias", [None, (3, 6, 6, 6), (1, 6, 6, 6), (3, 1, 6, 6)])
@pytest.mark.parametrize("causal", [False, True])
def test_reference(layout, key_heads, bias, causal):
    q, k, v, _ = operands(layout, heads=6, key_heads=key_heads, queries=6, keys=6)
    swap = (lambda x: x) if layout == "BTNH" else (lambda x: jnp.swapaxes(x, 1, 2))
    bias = bias_of(bias)
    out, statistics = reference(q, k, v, *bias, **params(causal=causal, layout=layout))
    want = jax.nn.dot_product_attention(
        swap(q), swap(k), swap(v), *bias, scale=0.3, is_causal=causal
    )
    assert relative_norm([swap(out)], [want]) < 1e-6
    scores = jnp.einsum("btnh,bsnh->bnts", swap(q), jnp.repeat(swap(k), 6 // key_heads, 2)) * 0.3
    scores = sum(bias, scores)
    scores = jnp.where(jnp.tri(6, dtype=bool), scores, -jnp.inf) if causal else scores
    assert relative_norm([statistics], [jax.nn.logsumexp(scores, -1)]) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("bias", [None, (3, 1, 6, 6)])
@pytest.mark.parametrize("causal", [False, True])
def test_backward_reference(layout, key_heads, bias, causal):
    q, k, v, d_out = operands(layout, heads=6, key_heads=key_heads, queries=6, keys=6)
    bias = bias_of(bias)
    how = params(causal=causal, layout=layout)
    out, statistics = reference(q, k, v, *bias, **how)
    got = backward_reference(q, k, v, *bias, out, statistics, d_out, **how)
    want = jax.vjp(lambda q, k, v: reference(q, k, v, *bias, **how)[0], q, k, v)[1](d_out)
    assert relative_norm(got, want) < 1e-5


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        q, k, v, d_out = operands(dtype=jnp.float64)
        out, statistics = reference(q, k, v, scale=0.3)
        assert out.dtype == statistics.dtype == jnp.float64
        got = backward_reference(q, k, v, out, statistics, d_out, scale=0.3)
        want = jax.vjp(lambda *a: reference(*a, scale=0.3)[0], q, k, v)[1](d_out)
        assert relative_norm(got, want) < 1e-13


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_types_are_those_of_the_reference(dtype):
    q, k, v, d_out = operands(heads=6, key_heads=2, dtype=dtype)
    (bias,) = arrays((3, 1, 6, 10), dtype=dtype)
    for extra in ([], [bias]):
        forward = attention_p.bind(q, k, v, *extra, **params())
        types = attention_p.abstract_eval(*map(jax.typeof, (q, k, v, *extra)), **params())[0]
        assert tuple(map(jax.typeof, forward)) == types
        assert forward[1].dtype == jnp.float32
        rest = (q, k, v, *extra, *forward, d_out)
        backward = attention_backward_p.bind(*rest, **params())
        types = attention_backward_p.abstract_eval(*map(jax.typeof, rest), **params())[0]
        assert tuple(map(jax.typeof, backward)) == types


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        ([(3, 6, 4, 8), (3, 10, 3, 8), (3, 10, 3, 8)], {}, "N a multiple of K"),
        ([(3, 6, 4, 8), (2, 10, 4, 8), (3, 10, 4, 8)], {}, "expected q"),
        ([(3, 6, 4, 8), (3, 10, 4, 8), (3, 9, 4, 8)], {}, "expected q"),
        ([(3, 6, 4, 8), (3, 10, 4, 16), (3, 10, 4, 8)], {}, "expected q"),
        ([(3, 6, 4, 8), (3, 10, 4, 8), (3, 10, 4, 8)], {"causal": True}, "as many queries"),
        ([(3, 6, 4, 8), *[(3, 10, 4, 8)] * 2, (3, 6, 10)], {}, "expected a bias"),
        ([(3, 6, 4, 8), *[(3, 10, 4, 8)] * 2, (2, 4, 6, 10)], {}, "expected a bias"),
    ],
)
def test_operands_that_do_not_fit(shapes, changes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *xs: attention_p.bind(*xs, **params(**changes)), *arrays(*shapes))


def test_operands_of_different_types():
    q, k, v, _ = operands()
    with pytest.raises(TypeError, match="one type"):
        jax.eval_shape(lambda *xs: attention_p.bind(*xs, **params()), q, k, v.astype(jnp.float16))


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biased", [False, True])
def test_lowers_to_cudnn(layout, biased):
    q, k, v, d_out = operands(layout, queries=6, keys=6, dtype=jnp.bfloat16)
    extra = arrays((3, 1, 6, 6), dtype=jnp.bfloat16) if biased else []
    how = params(causal=True, layout=layout)

    def step(q, k, v, d_out, *extra):
        out, statistics = attention_p.bind(q, k, v, *extra, **how)
        return attention_backward_p.bind(q, k, v, *extra, out, statistics, d_out, **how)

    text = jax.jit(step).trace(q, k, v, d_out, *extra).lower(lowering_platforms=("cuda",)).as_text()
    name = "fmhaScaleBiasSoftmax" if biased else "fmhaSoftmax"
    assert text.count(f"@__cudnn${name}(") == text.count(f"@__cudnn${name}Backward(") == 1
    assert text.count("CAUSAL") == 2 and text.count("fmha_scale\\22: 0.3") == 2
    assert "dot_general" not in text
    # The results' own transpositions cancel against their layout; operands are not transposed.
    moved = 4 if layout == "BTNH" else 0
    assert text.count("dims = [0, 2, 1, 3]") == moved


def test_runs_elsewhere_as_the_reference():
    q, k, v, _ = operands()
    text = jax.jit(lambda *xs: attention_p.bind(*xs, **params())).lower(q, k, v).as_text()
    assert "custom_call" not in text and "dot_general" in text
    got = attention_p.bind(q, k, v, **params())
    assert relative_norm(got, reference(q, k, v, scale=0.3)) < 1e-6
    np.testing.assert_array_equal(got[0].shape, q.shape)
