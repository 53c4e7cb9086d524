"""Attention on a GPU: cuDNN's calls are in the compiled program, and give attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import LAYOUTS, SOFTMAXES, arrays, einsum, linen, training

import jevt
from jevt.primitives import attention_kernel
from jevt_kernels import compat

pytestmark = pytest.mark.gpu


def relative_error(got, want):
    flat = [
        np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(t)])
        for t in (got, want)
    ]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


def exactly(step, *args):
    """The step in float32."""
    with jax.default_matmul_precision("highest"):
        wide = [a.astype(jnp.float32) if a.dtype in NARROW else a for a in args]
        return jax.jit(step)(*wide)


NARROW = (jnp.bfloat16, jnp.float16)


def check(step, *args, calls=2, kernels=0):
    """As near to float32 as ``jax.jit`` is, result by result, by cuDNN's calls and our kernel.

    Returns what ``step`` has become.
    """
    jitted = jevt.jit(step)
    text = jitted.lower(*args).compile().as_text()
    assert text.count('custom_call_target="__cudnn$fmha') == calls
    assert text.count('custom_call_target="triton_kernel_call_ffi"') >= kernels
    groups = jevt.last_trace(jitted).plan.groups
    assert [g.kind for g in groups].count("attention") == calls + kernels
    exact = exactly(step, *args)
    for got, by_jax, want in zip(jitted(*args), jax.jit(step)(*args), exact, strict=True):
        assert got.dtype == by_jax.dtype and got.shape == want.shape
        assert np.isfinite(np.asarray(got, np.float32)).all()
        assert relative_error(got, want) < 1.3 * relative_error(by_jax, want) + 3e-3
    return jitted


def operands(layout, *, heads=4, key_heads=4, queries=128, keys=192, width=64, dtype=jnp.bfloat16):
    q, k = (2, queries, heads, width), (2, keys, key_heads, width)
    if layout == "BNTH":
        q, k = ((b, n, t, h) for b, t, n, h in (q, k))
    return arrays(q, k, k, q, dtype=dtype)


def hidden(mask):
    return lambda scores: jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def causal(scores):
    return hidden(jnp.tril(jnp.ones(scores.shape[-2:], bool)))(scores)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softmax", ["jax", "in float32"])
def test_layouts_and_types(layout, softmax, dtype):
    check(training(einsum(layout, SOFTMAXES[softmax])), *operands(layout, dtype=dtype))


@pytest.mark.parametrize("width", [8, 40, 128])
def test_widths(width):
    check(training(einsum()), *operands("BTNH", width=width))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal(layout):
    args = operands(layout, queries=192)
    check(training(einsum(layout, SOFTMAXES["in float32"], mask=causal)), *args)


@pytest.mark.parametrize("shape", [(2, 1, 1, 192), (2, 1, 128, 192), (1, 4, 128, 192), (128, 192)])
def test_masks(shape):
    mask = np.random.default_rng(1).random(shape) < 0.7
    mask[..., 0] = True

    def step(mask, *args):
        return training(einsum(softmax=SOFTMAXES["in float32"], mask=hidden(mask)))(*args)

    check(step, mask, *operands("BTNH"))


@pytest.mark.parametrize("is_causal", [False, True])
def test_queries_without_keys(is_causal):
    mask = np.ones((2, 1, 192, 192), bool)
    mask[0, 0, 5] = mask[0, 0, 100:110] = mask[1, 0, :, :30] = False

    def step(mask, *args):
        def masked(scores):
            return hidden(mask)(causal(scores) if is_causal else scores)

        return training(einsum(softmax=SOFTMAXES["in float32"], mask=masked))(*args)

    check(step, mask, *operands("BTNH", queries=192))


@pytest.mark.parametrize("shape", [(2, 4, 128, 192), (1, 4, 128, 192), (1, 1, 128, 192)])
def test_biases(shape):
    (bias,) = arrays(shape, dtype=jnp.bfloat16)

    def step(bias, *args):
        return training(einsum(softmax=SOFTMAXES["in float32"], mask=lambda s: s + bias))(*args)

    check(step, bias, *operands("BTNH"))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dot_product_attention(key_heads, is_causal):
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    check(training(attend), *operands("BTNH", key_heads=key_heads, queries=192))


def test_odd_lengths_without_a_mask():
    check(
        training(einsum(softmax=SOFTMAXES["in float32"])), *operands("BTNH", queries=101, keys=77)
    )


def test_forward_alone():
    def step(*args):
        return (einsum()(*args),)

    check(step, *operands("BTNH")[:3], calls=1)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_scan_over_layers(checkpoint):
    def attend(x, weights):
        def body(x, w):
            mixed = einsum(softmax=SOFTMAXES["in float32"], mask=causal)(x * w, x, x)
            return x + 0.1 * mixed, None

        return jax.lax.scan(jax.checkpoint(body) if checkpoint else body, x, weights)[0]

    x, weights, d_out = arrays((2, 128, 4, 64), (3, 4, 64), (2, 128, 4, 64), dtype=jnp.bfloat16)
    args = 0.1 * x, weights, d_out
    jitted = jevt.jit(training(attend))
    calls = 3 if checkpoint else 2
    text = jitted.lower(*args).compile().as_text()
    assert text.count('custom_call_target="__cudnn$fmha') == calls
    exact = exactly(training(attend), *args)
    by_jax = relative_error(jax.jit(training(attend))(*args), exact)
    assert relative_error(jitted(*args), exact) < 1.3 * by_jax + 3e-3


def test_flax():
    step, (params, x, d_out) = linen(jnp.bfloat16)
    jitted = jevt.jit(step)
    text = jitted.lower(params, x, d_out).compile().as_text()
    # Heads of 4 are too narrow for cuDNN, which is said.
    assert "fmha" not in text
    assert any("heads of 4" in note for note in jevt.last_trace(jitted).notes)


@pytest.fixture
def few_heads(monkeypatch):
    """The kernel of the backward pass is taken with few heads too."""
    if compat.local_compute_capability() != 90:
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setattr(attention_kernel, "FEWEST", 1)


@pytest.mark.parametrize(
    ("queries", "keys"), [(256, 256), (197, 197), (512, 512), (300, 200), (200, 499)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_kernel(few_heads, layout, queries, keys):
    args = operands(layout, queries=queries, keys=keys)
    step = training(einsum(layout, SOFTMAXES["in float32"]))
    jitted = check(step, *args, calls=1, kernels=1)
    first, again = jitted(*args), jitted(*args)
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("factor", [1, 8])
def test_backward_kernel_in_float16(few_heads, factor):
    """With large scores too, for which a weight is 1 and the others are next to 0."""
    q, k, v, d_out = operands("BTNH", queries=197, keys=197, dtype=jnp.float16)
    step = training(einsum(softmax=SOFTMAXES["in float32"]))
    check(step, factor * q, k, v, d_out, calls=1, kernels=1)


def test_backward_kernel_with_many_heads():
    if compat.local_compute_capability() != 90:
        pytest.skip("needs a GPU of compute capability 9.0")
    args = arrays(*[(40, 256, 8, 64)] * 4, dtype=jnp.bfloat16)
    check(training(jax.nn.dot_product_attention), *args, calls=1, kernels=1)


def test_backward_kernel_in_a_scan(few_heads):
    def attend(x, weights):
        def body(x, w):
            return x + 0.1 * einsum(softmax=SOFTMAXES["in float32"])(x * w, x, x), None

        return jax.lax.scan(body, x, weights)[0]

    x, weights, d_out = arrays((2, 200, 4, 64), (3, 4, 64), (2, 200, 4, 64), dtype=jnp.bfloat16)
    args = 0.1 * x, weights, d_out
    jitted = jevt.jit(training(attend))
    text = jitted.lower(*args).compile().as_text()
    assert text.count('custom_call_target="__cudnn$fmha') == 1
    exact = exactly(training(attend), *args)
    by_jax = relative_error(jax.jit(training(attend))(*args), exact)
    assert relative_error(jitted(*args), exact) < 1.3 * by_jax + 3e-3
