"""Attention is recognised in every spelling, and replaced only where that is allowed."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import (
    CUDA,
    LAYOUTS,
    SCALES,
    SOFTMAXES,
    arrays,
    einsum,
    linen,
    names,
    nnx_module,
    operands,
    raised,
    training,
)
from rewriting import evaluate, relative_norm
from small_models import MODELS

from jevt import _jax_internals as internals
from jevt.passes import dce, raise_attention


def check(fun, *args, count=1, tolerance=1e-5, gone=("exp",)):
    """All ``count`` attentions are raised, and the values stay; returns the equations."""
    jaxpr, notes = raised(fun, *args)
    have = names(jaxpr)
    assert not notes
    assert have.count("attention") == have.count("attention_backward") == count
    assert not set(gone).intersection(have)
    want = jax.tree.leaves(jax.jit(fun)(*args))
    assert relative_norm(evaluate(jaxpr, *args), want) < tolerance
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name.startswith("attention")]


def is_left(fun, *args, reason, **options):
    """No attention is raised, and the reason is noted."""
    jaxpr, notes = raised(fun, *args, **options)
    assert not any(name.startswith("attention") for name in names(jaxpr))
    assert len(notes) == 1 and reason in notes[0], notes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_softmaxes(layout, softmax):
    attend = einsum(layout, SOFTMAXES[softmax])
    equations = check(training(attend), *operands(layout))
    assert [e.params["layout"] for e in equations] == [layout, layout]


@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale):
    (forward, backward) = check(training(einsum(scale=SCALES[scale])), *operands())
    want = {
        "times after": 0.3,
        "divided after": 1 / 3,
        "root after": 8**-0.5,
        "none": 1.0,
        "q before": 1.0,
        "both before": 1.0,
        "negative": -0.2,
    }
    assert backward.params == forward.params | {"capability": 90}
    assert abs(forward.params["scale"] - want[scale]) < 1e-6


def test_no_array_is_moved_in_the_programs_own_layout():
    for layout in LAYOUTS:
        jaxpr, _ = raised(training(einsum(layout)), *operands(layout))
        assert names(jaxpr) == ["attention", "attention_backward"]


def test_projections_and_attention_meet_without_transpositions():
    def attend(x, w_q, w_k, w_v, w_o):
        q, k, v = ((x @ w).reshape(*x.shape[:2], 4, 8) for w in (w_q, w_k, w_v))
        return einsum("BTNH")(q, k, v).reshape(x.shape) @ w_o

    shapes = (3, 6, 32), *[(32, 32)] * 4, (3, 6, 32)
    jaxpr, _ = raised(training(attend), *arrays(*shapes))
    assert "transpose" not in names(jaxpr)
    assert names(jaxpr).count("attention_backward") == 1


def batch_last(q, k, v):
    return jnp.einsum("ntsb,nshb->nthb", jax.nn.softmax(jnp.einsum("nthb,nshb->ntsb", q, k), 2), v)


def test_other_layouts():
    shapes = ((4, 6, 8, 3), (4, 10, 8, 3), (4, 10, 8, 3), (4, 6, 8, 3))
    check(training(batch_last), *arrays(*shapes))
    unbatched = ((6, 8), (10, 8), (10, 8), (6, 8))
    single = lambda q, k, v: jax.nn.softmax(q @ k.T) @ v  # noqa: E731
    (forward, _) = check(training(single), *arrays(*unbatched))
    assert forward.outvars[1].aval.shape == (1, 1, 6)


def scores_by_key(q, k, v):
    """Scores with keys before queries."""
    scores = jnp.einsum("bsnh,btnh->bnst", k, q) * 0.3
    return jnp.einsum("bnst,bsnh->btnh", jax.nn.softmax(scores, axis=2), v)


def test_scores_by_key():
    check(training(scores_by_key), *operands())


# Heads that share keys


def grouped(q, k, v):
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    p = jax.nn.softmax(jnp.einsum("btkgh,bskh->bkgts", q, k) * 0.3)
    out = jnp.einsum("bkgts,bskh->btkgh", p, v)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def test_grouped_heads():
    (forward, backward) = check(training(grouped), *operands(heads=6, key_heads=2))
    assert [v.aval.shape for v in forward.invars] == [(3, 6, 6, 8), (3, 10, 2, 8), (3, 10, 2, 8)]
    assert [v.aval.shape for v in backward.outvars] == [(3, 6, 6, 8), (3, 10, 2, 8), (3, 10, 2, 8)]


def test_one_key_head():
    def attend(q, k, v):
        p = jax.nn.softmax(jnp.einsum("btnh,bsh->bnts", q, k))
        return jnp.einsum("bnts,bsh->btnh", p, v)

    q, k, v, d_out = operands(key_heads=1)
    (forward, _) = check(training(attend), q, k[:, :, 0], v[:, :, 0], d_out)
    assert [v.aval.shape for v in forward.invars] == [(3, 6, 4, 8), (3, 10, 1, 8), (3, 10, 1, 8)]


def test_repeated_heads():
    def attend(q, k, v):
        return einsum()(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))

    check(training(attend), *operands(key_heads=2))


# Masks and biases


def hidden(mask, value=-1e30):
    return lambda scores: jnp.where(mask, scores, _at_least(value, scores.dtype))


def _at_least(value, dtype):
    return value if value == -np.inf else max(value, float(jnp.finfo(dtype).min))


def causal(scores):
    return hidden(jnp.tril(jnp.ones(scores.shape[-2:], bool)))(scores)


def causal_from_positions(scores):
    t = jnp.arange(scores.shape[-2])
    return scores + jnp.where(t[:, None] >= t[None, :], 0.0, -jnp.inf).astype(scores.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal(layout):
    args = operands(layout, queries=6, keys=6)
    (forward, backward) = check(training(einsum(layout, mask=causal)), *args)
    assert forward.params["causal"] and backward.params["causal"]
    assert len(forward.invars) == 3


def test_masks_of_positions():
    args = operands(queries=6, keys=6)
    (forward, _) = check(training(einsum(mask=causal_from_positions)), *args)
    assert forward.params["causal"] and len(forward.invars) == 3
    anti = lambda scores: hidden(jnp.triu(jnp.ones(scores.shape[-2:], bool)))(scores)  # noqa: E731
    (forward, _) = check(training(einsum(mask=anti)), *args)
    assert not forward.params["causal"] and len(forward.invars) == 4
    everything = lambda scores: hidden(jnp.ones(scores.shape[-2:], bool))(scores)  # noqa: E731
    (forward, _) = check(training(einsum(mask=everything)), *args)
    assert not forward.params["causal"] and len(forward.invars) == 3


def test_causal_mask_of_keys_before_queries():
    def attend(q, k, v):
        scores = jnp.einsum("bsnh,btnh->bnst", k, q)
        scores = jnp.where(jnp.triu(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
        return jnp.einsum("bnst,bsnh->btnh", jax.nn.softmax(scores, axis=2), v)

    (forward, _) = check(training(attend), *operands(queries=6, keys=6))
    assert forward.params["causal"] and len(forward.invars) == 3


@pytest.mark.parametrize("value", [-1e4, -1e30, float(np.finfo(np.float32).min), -np.inf])
@pytest.mark.parametrize("shape", [(3, 1, 1, 10), (3, 1, 6, 10), (1, 4, 6, 10), (6, 10), (10,)])
def test_padding_masks(shape, value):
    mask = np.random.default_rng(1).random(shape) < 0.7
    mask[..., 0] = True

    def step(mask, *args):
        return training(einsum(mask=hidden(mask, value)))(*args)

    (forward, _) = check(step, mask, *operands())
    batch, heads = (1, 1, *shape)[-4:-2] if len(shape) > 2 else (1, 1)
    assert forward.invars[3].aval.shape == (batch, heads, 6, 10)


def test_a_query_without_keys_is_the_mean_of_the_values():
    mask = np.ones((3, 1, 6, 10), bool)
    mask[0, 0, 2] = False

    def step(mask, *args):
        return training(einsum(mask=hidden(mask, np.finfo(np.float32).min)))(*args)

    check(step, mask, *operands())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_example_without_keys(layout):
    """Padding and causal masks: the first queries of one example, and all of another, see none."""
    mask = np.ones((3, 6), bool)
    mask[0, :2] = mask[1] = False

    def step(mask, *args):
        def padded(scores):
            return hidden(mask[:, None, None])(causal(scores))

        return training(einsum(layout, mask=padded))(*args)

    (forward, _) = check(step, mask, *operands(layout, queries=6, keys=6))
    assert forward.params["causal"] and len(forward.invars) == 4


def test_grouped_queries_without_keys():
    mask = np.ones((3, 1, 1, 6, 1), bool)
    mask[0, :, :, 4:] = False

    def attend(mask, q, k, v):
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
        p = jax.nn.softmax(hidden(mask)(jnp.einsum("btkgh,bskh->bkgts", q, k)))
        return jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(3, 6, 6, 8)

    def step(mask, *args):
        return training(functools.partial(attend, mask))(*args)

    check(step, mask, *operands(heads=6, key_heads=2))


def test_causal_and_padding():
    mask = np.arange(6) < np.array([[6], [4], [1]])

    def step(mask, *args):
        def both(scores):
            tril = jnp.tril(jnp.ones((6, 6), bool))
            return hidden(jnp.logical_and(mask[:, None, None], tril))(scores)

        return training(einsum(mask=both))(*args)

    (forward, _) = check(step, mask, *operands(queries=6, keys=6))
    assert forward.params["causal"]
    assert forward.invars[3].aval.shape == (3, 1, 6, 6)


def test_inverted_mask():
    mask = np.random.default_rng(1).random((3, 1, 1, 10)) < 0.3
    mask[..., 0] = False

    def step(mask, *args):
        return training(einsum(mask=lambda s: jnp.where(mask, -1e30, s)))(*args)

    check(step, mask, *operands())


@pytest.mark.parametrize("shape", [(3, 4, 6, 10), (1, 4, 6, 10), (3, 1, 1, 10), (10,)])
def test_biases(shape):
    (bias,) = arrays(shape)

    def step(bias, *args):
        return training(einsum(mask=lambda s: 0.5 * (s + bias)))(*args)

    (forward, _) = check(step, bias, *operands())
    assert abs(forward.params["scale"] - 0.15) < 1e-6


def test_bias_and_mask():
    mask = np.random.default_rng(1).random((3, 1, 6, 10)) < 0.7
    mask[..., 0] = True
    (bias,) = arrays((4, 1, 10))

    def step(mask, bias, *args):
        return training(einsum(mask=lambda s: hidden(mask)(s - bias)))(*args)

    (forward, _) = check(step, mask, bias, *operands())
    assert len(forward.invars) == 4


def test_bias_of_the_queries_changes_nothing():
    (bias,) = arrays((3, 1, 6, 1))

    def step(bias, *args):
        return training(einsum(mask=lambda s: s + bias))(*args)

    (forward, _) = check(step, bias, *operands())
    assert len(forward.invars) == 3


# Libraries


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}, {"mask": 1}])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_dot_product_attention(options, key_heads):
    if "mask" in options:
        options = {"mask": np.tri(6, dtype=bool)[None, None][:, :, ::-1, ::-1]}
    attend = functools.partial(jax.nn.dot_product_attention, **options)
    args = operands(key_heads=key_heads, queries=6, keys=6)
    (forward, _) = check(training(attend), *args)
    assert forward.params["layout"] == "BTNH"
    assert forward.params["causal"] == ("is_causal" in options)


@pytest.mark.parametrize("module", [linen, nnx_module])
def test_flax(module):
    step, args = module()
    jaxpr, notes = raised(step, *args)
    assert not notes
    assert names(jaxpr).count("attention") == names(jaxpr).count("attention_backward") == 1
    assert "transpose" not in names(jaxpr)
    (forward,) = [e for e in jaxpr.eqns if e.primitive.name == "attention"]
    assert forward.params["causal"]
    flat = lambda t: np.concatenate([np.ravel(a) for a in jax.tree.leaves(t)])  # noqa: E731
    got, want = flat(evaluate(jaxpr, *args)), flat(jax.jit(step)(*args))
    assert relative_norm([got], [want]) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("softmax", ["jax", "in float32", "reciprocal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_narrow_types_are_as_precise(dtype, softmax, layout):
    step = training(einsum(layout, SOFTMAXES[softmax], mask=causal))
    args = operands(layout, queries=12, keys=12, dtype=dtype)
    jaxpr, notes = raised(step, *args)
    assert not notes and names(jaxpr) == ["attention", "attention_backward"]
    exact = step(*(a.astype(jnp.float32) for a in args))
    error = relative_norm(evaluate(jaxpr, *args), exact)
    assert error < 1.2 * relative_norm(jax.jit(step)(*args), exact)
    assert error < 5e-3


def test_dot_product_attention_in_bfloat16():
    step = training(functools.partial(jax.nn.dot_product_attention, is_causal=True))
    args = operands(key_heads=2, queries=12, keys=12, dtype=jnp.bfloat16)
    jaxpr, _ = raised(step, *args)
    assert names(jaxpr) == ["attention", "attention_backward"]
    exact = step(*(a.astype(jnp.float32) for a in args))
    assert relative_norm(evaluate(jaxpr, *args), exact) < 5e-3


# Control flow and transformations


def test_forward_alone():
    jaxpr, notes = raised(einsum(), *operands()[:3])
    assert names(jaxpr) == ["attention"] and not notes
    assert relative_norm(evaluate(jaxpr, *operands()[:3]), [einsum()(*operands()[:3])]) < 1e-5


def test_some_gradients_alone():
    def step(q, k, v, d_out):
        out, vjp = jax.vjp(lambda q: einsum()(q, k, v), q)
        return out, *vjp(d_out)

    check(step, *operands())


def test_one_array_in_all_parts():
    def attend(x):
        return einsum()(x, x, x)

    (x, d_out) = arrays((3, 6, 4, 8), (3, 6, 4, 8))
    check(training(attend), x, d_out)


def test_layers():
    def attend(x):
        for scale in (0.2, 0.3, 0.4):
            x = x + jax.nn.dot_product_attention(x, x, x, scale=scale, is_causal=True)
        return x

    (x, d_out) = arrays((3, 6, 4, 8), (3, 6, 4, 8))
    equations = check(training(attend), x, d_out, count=3)
    assert len({e.params["scale"] for e in equations}) == 3


def test_checkpointed():
    def attend(x):
        for _ in range(2):
            x = jax.checkpoint(lambda x: x + einsum()(x, x, x))(x)
        return x

    (x, d_out) = arrays((3, 6, 4, 8), (3, 6, 4, 8))
    step = training(attend)
    jaxpr, notes = raised(step, x, d_out)
    assert not notes and "exp" not in names(jaxpr)
    # Each layer runs forward, and again, from behind the barrier, before it runs backward.
    assert names(jaxpr).count("attention") == 4
    assert names(jaxpr).count("attention_backward") == 2
    assert names(jaxpr).count("optimization_barrier") == 2
    assert relative_norm(evaluate(jaxpr, x, d_out), step(x, d_out)) < 1e-5


def scanned(wrap=lambda body: body, **options):
    def attend(x, weights):
        def body(x, w):
            return x + 0.1 * einsum(mask=causal)(x * w, x, x), None

        return jax.lax.scan(wrap(body), x, weights, **options)[0]

    x, weights, d_out = arrays((3, 6, 4, 8), (5, 4, 8), (3, 6, 4, 8))
    return training(attend), (0.1 * x, weights, d_out)


def check_scan(step, *args, forward=1, backward=1):
    """One attention a body, and no scores between the loops."""
    jaxpr, notes = raised(step, *args)
    have = names(jaxpr)
    assert not notes and "exp" not in have
    assert have.count("attention") == forward and have.count("attention_backward") == backward
    assert relative_norm(evaluate(jaxpr, *args, compiled=True), jax.jit(step)(*args)) < 1e-5
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


def test_checkpointed_scan_over_layers():
    step, args = scanned(jax.checkpoint)
    check_scan(step, *args, forward=2)


def test_scan_with_a_scale_that_jax_computes():
    def attend(x, weights):
        def body(x, w):
            scaled = einsum(scale=SCALES["root after"], mask=causal)
            return x + 0.1 * scaled(x * w, x, x), None

        return jax.lax.scan(body, x, weights)[0]

    _, args = scanned()
    check_scan(training(attend), *args)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}])
def test_scan_over_layers(options):
    """What the forward loop leaves for the backward loop: q, k and v, out, and the statistics."""
    step, args = scanned(**options)
    (first, second) = check_scan(step, *args)
    sizes = [v.aval.size for v in first.outvars[1:]]
    assert max(sizes) == 5 * args[0].size
    assert len(second.invars) <= 1 + 5


def test_scan_with_a_mask_and_a_bias_for_all_layers():
    mask = np.ones((3, 1, 1, 6), bool)
    mask[0, ..., 4:] = False
    (bias,) = arrays((4, 6, 6))

    def step(mask, bias, x, weights, d_out):
        def attend(x, weights):
            def body(x, w):
                scores = lambda s: hidden(mask)(causal(s + bias))  # noqa: E731
                return x + einsum(mask=scores)(x * w, x, x), None

            return jax.lax.scan(body, x, weights)[0]

        return training(attend)(x, weights, d_out)

    _, args = scanned()
    (first, _) = check_scan(step, mask, bias, *args)
    # What is the same for all layers is made again, not kept once a layer.
    assert max(v.aval.size for v in first.outvars) == 5 * args[0].size


def test_scan_whose_results_are_read():
    def attend(x, weights):
        def body(x, w):
            y = x + einsum()(x * w, x, x)
            return y, (y.mean(-1), x)

        return jax.lax.scan(body, x, weights)

    def step(x, weights, d_out):
        (out, seen), vjp = jax.vjp(attend, x, weights)
        return out, seen, *vjp((d_out, jax.tree.map(jnp.ones_like, seen)))

    _, args = scanned()
    check_scan(lambda *args: jax.tree.leaves(step(*args)), *args)


def test_scan_in_scan():
    def attend(x, weights):
        def outer(x, w):
            def inner(x, v):
                return x + 0.1 * einsum(mask=causal)(x * w * v, x, x), None

            return jax.lax.scan(inner, x, weights[:2])[0], None

        return jax.lax.scan(outer, x, weights)[0]

    _, args = scanned()
    check_scan(training(attend), *args)


def test_scan_with_two_attentions_a_step():
    def attend(x, weights):
        def body(x, w):
            x = x + 0.1 * einsum(mask=causal)(x * w, x, x)
            return x + 0.1 * jax.nn.dot_product_attention(x, x * w, x), None

        return jax.lax.scan(body, x, weights)[0]

    _, args = scanned()
    check_scan(training(attend), *args, forward=2, backward=2)


def test_scan_that_returns_probabilities():
    def attend(x, weights):
        def body(x, w):
            p = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", x * w, x))
            return x + jnp.einsum("bnts,bsnh->btnh", p, x), p

        return jax.lax.scan(body, x, weights)

    def step(x, weights, d_out):
        out, vjp, p = jax.vjp(attend, x, weights, has_aux=True)
        return out, p, *vjp(d_out)

    _, args = scanned()
    is_left(step, *args, reason="computed from the scores are a result")


def test_scan_without_a_kernel():
    step, args = scanned()
    is_left(step, *args, reason="no kernel", obstacle=lambda case, context: "no kernel")


def test_vmap():
    def step(*args):
        return jax.vmap(training(grouped))(*args)

    args = [jnp.stack([a, a[::-1]]) for a in operands(heads=6, key_heads=2)]
    (forward, _) = check(step, *args)
    assert forward.invars[0].aval.shape == (6, 6, 6, 8)


def test_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def step(*args):
        local = training(einsum(mask=causal))
        return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 4)(*args)

    args = operands(queries=6, keys=6)
    jaxpr, notes = raised(step, *args)
    assert not notes
    assert names(jaxpr).count("attention") == names(jaxpr).count("attention_backward") == 1
    got = jax.jit(lambda *args: jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args))(*args)
    assert relative_norm(got, step(*args)) < 1e-5


def test_branches():
    def step(choice, *args):
        return jax.lax.cond(choice, training(einsum()), training(einsum("BTNH", unscaled)), *args)

    unscaled = SOFTMAXES["unshifted"]
    jaxpr, notes = raised(step, True, *operands())
    assert not notes
    assert names(jaxpr).count("attention") == names(jaxpr).count("attention_backward") == 2


# Left alone


def test_returned_probabilities():
    def attend(q, k, v):
        p = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        return jnp.einsum("bnts,bsnh->btnh", p, v), p

    def step(q, k, v, d_out):
        out, vjp, p = jax.vjp(attend, q, k, v, has_aux=True)
        return out, p, *vjp(d_out)

    is_left(step, *operands(), reason="computed from the scores are a result")


def test_entropy_of_the_probabilities():
    def attend(q, k, v):
        p = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        return jnp.einsum("bnts,bsnh->btnh", p, v), (p * p).sum()

    def step(q, k, v, d_out):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp((d_out, 1.0))

    is_left(step, *operands(), reason="reduce_sum sums up values")


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_on_the_probabilities(rate):
    def attend(q, k, v, keep):
        p = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        p = jnp.where(keep, p / (1 - rate), 0.0)
        return jnp.einsum("bnts,bsnh->btnh", p, v)

    def step(keep, q, k, v, d_out):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, keep), q, k, v)
        return out, *vjp(d_out)

    keep = np.random.default_rng(0).random((3, 4, 6, 10)) < 1 - rate
    is_left(step, keep, *operands(), reason="dropout")


def test_flax_dropout():
    module = nn.MultiHeadDotProductAttention(4, dropout_rate=0.1, deterministic=False)
    x, d_out = arrays((3, 16, 16), (3, 16, 16))
    params = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def step(key, params, x, d_out):
        def apply(params, x):
            return module.apply(params, x, rngs={"dropout": key})

        return training(apply)(params, x, d_out)

    # Flax repeats one mask for the whole batch, as a factor.
    reason = "dropout on the probabilities: cuDNN would draw other random bits"
    is_left(step, jax.random.key(2), params, x, d_out, reason=reason)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("gpt", 2, 2), ("gpt_rotary", 2, 2), ("gpt_checkpointed", 4, 2), ("mixed_precision", 2, 2)],
)
def test_training_steps(name, forward, backward):
    """Two layers of einsum, a causal mask of -inf, a softmax in float32, and an optimiser."""
    step, args = MODELS[name]()
    jaxpr, notes = raised(step, *args)
    have = names(jaxpr)
    assert not notes
    assert (have.count("attention"), have.count("attention_backward")) == (forward, backward)


def test_training_step_with_dropout():
    step, args = MODELS["gpt_dropout_everywhere"]()
    is_left(step, *args, reason="dropout on the probabilities: cuDNN would draw other random bits")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (jnp.tanh, "tanh between the product and the softmax"),
        (lambda s: s * jnp.arange(4.0).reshape(4, 1, 1), "not a known number"),
        (lambda s: jnp.where(s > 0, s, 0.0), "a selection among the scores"),
        (lambda s: jnp.maximum(s, -3.0), "max between the product and the softmax"),
    ],
)
def test_other_scores(change, reason):
    is_left(training(einsum(mask=change)), *operands(), reason=reason)


def test_other_softmaxes():
    def plus_one(x):
        e = jnp.exp(x)
        return e / (1 + e.sum(-1, keepdims=True))

    def squared(x):
        return jnp.square(jax.nn.softmax(x))

    for softmax in (plus_one, squared):
        is_left(training(einsum(softmax=softmax)), *operands(), reason="is not that of")


def test_gradient_that_is_changed():
    @jax.custom_vjp
    def doubled(x):
        return x

    doubled.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))
    step = training(einsum(softmax=lambda x: doubled(jax.nn.softmax(x))))
    is_left(step, *operands(), reason="d_")


def test_gradient_of_a_bias():
    (bias,) = arrays((1, 4, 6, 10))

    def attend(bias, q, k, v):
        return einsum(mask=lambda s: s + bias)(q, k, v)

    is_left(training(attend), bias, *operands(), reason="computed from the scores")


@pytest.mark.parametrize("softmax", [jax.nn.softmax, SOFTMAXES["log_softmax"]])
def test_what_only_looks_like_attention_is_not_mentioned(softmax):
    def loss(w, x, labels):
        p = softmax(x @ w)
        return -(labels * jnp.log(p)).sum()

    w, x, labels = arrays((8, 10), (6, 8), (6, 10))
    jaxpr, notes = raised(jax.value_and_grad(loss, argnums=(0, 1)), w, x, jnp.abs(labels))
    assert not notes and "attention" not in names(jaxpr)

    def contrastive(w, x, labels):  # both ways: each row, and each column
        return loss(w, x, labels) + loss(x.T, w.T, labels.T)

    jaxpr, notes = raised(jax.value_and_grad(contrastive, argnums=(0, 1)), w, x, jnp.abs(labels))
    assert not notes and "attention" not in names(jaxpr)


def test_products_in_float32_of_narrow_arrays():
    def attend(q, k, v):
        p = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32))
        return jnp.einsum("bnts,bsnh->btnh", p, v.astype(jnp.float32))

    q, k, v, d_out = operands(dtype=jnp.bfloat16)
    step = training(attend)
    is_left(step, q, k, v, d_out.astype(jnp.float32), reason="types")

    def rounded(q, k, v):
        return attend(q, k, v).astype(q.dtype)

    is_left(training(rounded), q, k, v, d_out, reason="computed in float32")


def test_wide_bias_of_narrow_scores():
    (bias,) = arrays((4, 6, 10))

    def attend(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) + bias
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores).astype(q.dtype), v)

    is_left(training(attend), *operands(dtype=jnp.bfloat16), reason="a bias in float32")


def test_without_a_kernel():
    asked = []

    def obstacle(case, context):
        asked.append(case)
        assert context is CUDA
        return "no kernel"

    is_left(training(einsum()), *operands(), reason="no kernel", obstacle=obstacle)
    case = asked[0]
    assert (case.dtype, case.biased, case.trained) == ("float32", False, True)
    shape = case.shape
    assert (shape.batch, shape.queries, shape.keys) == (3, 6, 10)
    assert (shape.heads, shape.key_heads, shape.width, shape.value_width) == (4, 4, 8, 8)


def test_notes_say_where_and_how_often():
    def attend(x):
        for _ in range(3):
            x = einsum(mask=jnp.tanh)(x, x, x)
        return x

    _, notes = raised(training(attend), *operands()[::3])
    (note,) = notes
    assert "attentions.py:" in note and " and 2 more: " in note


def test_partitioned_programs_are_left_alone(monkeypatch):
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    jaxpr, _ = raised(einsum(), *operands(dtype=jnp.bfloat16)[:3], obstacle=lambda c, x: "later")
    notes: list[str] = []
    context = dataclasses.replace(CUDA, partitioned=True)
    result = raise_attention.run(jaxpr, context, notes.append)
    assert result is jaxpr and "automatic partitioning" in notes[0]
    assert names(dce.run(raise_attention.run(jaxpr, CUDA))) == ["attention"]


def test_shard_map_in_a_partitioned_program(monkeypatch):
    """What runs per device is not partitioned further; masks vary over fewer axes than q."""
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mask = np.ones((1, 1, 1, 12), bool)
    mask[..., 9:] = False

    def step(*args):
        def local(mask, *args):
            return training(einsum(mask=lambda scores: hidden(mask)(causal(scores))))(*args)

        specs = (whole, spec, spec, spec, spec)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(spec,) * 4)(*args)

    args = (mask, *operands(queries=12, keys=12, dtype=jnp.bfloat16))
    context = dataclasses.replace(CUDA, partitioned=True)
    jaxpr, notes = raised(step, *args, obstacle=raise_attention.on_cudnn, context=context)
    assert not notes
    assert names(jaxpr).count("attention") == names(jaxpr).count("attention_backward") == 1
    got = jax.jit(lambda *args: jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args))(*args)
    exact = step(mask, *(a.astype(jnp.float32) for a in args[1:]))
    assert relative_norm(got, exact) < 5e-3
