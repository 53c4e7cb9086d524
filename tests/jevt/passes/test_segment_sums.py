"""Scatters that add are sums of segments with the same values, sorted once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jevt
from jevt.passes import cse, dce, inline, row_products, segment_sums
from jevt_kernels import launch


def traced(function, *args):
    return dce.run(inline.run(jax.make_jaxpr(function)(*args)))


def rewritten(jaxpr):
    return dce.run(cse.run(segment_sums.run(jaxpr, 90, smallest=1)))


def count(jaxpr, name):
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns)


def evaluate(jaxpr, *args):
    return jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *jax.tree.leaves(args))


def graph(nodes=30, edges=200, features=6, dtype=jnp.float32, outside=0):
    rng = np.random.default_rng(0)
    ends = rng.integers(-outside, nodes + outside, (2, edges))
    return (
        jnp.asarray(rng.normal(size=(nodes, features)), dtype),
        jnp.asarray(ends[0], jnp.int32),
        jnp.asarray(ends[1], jnp.int32),
        jnp.asarray(rng.normal(size=edges), dtype),
    )


def aggregate(h, src, dst, weight):
    return jax.ops.segment_sum(h[src] * weight[:, None], dst, num_segments=h.shape[0])


def close(got, want, dtype):
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        error = np.linalg.norm(g - w) / np.linalg.norm(w)
        assert error < (1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("outside", [0, 4])
def test_aggregation_and_its_gradient(dtype, outside):
    h, src, dst, weight = graph(dtype=dtype, outside=outside)

    def both(h, src, dst, weight):
        out, pull = jax.vjp(lambda h: aggregate(h, src, dst, weight), h)
        return out, pull(out)[0]

    before = traced(both, h, src, dst, weight)
    after = rewritten(before)
    assert count(before, "scatter-add") == 2
    assert count(after, "scatter-add") == 0
    assert count(after, "segment_sum") == 2
    wide = [a.astype(jnp.float32) if a.dtype == dtype else a for a in (h, src, dst, weight)]
    close(evaluate(after, h, src, dst, weight), jax.jit(both)(*wide), dtype)


def test_rows_are_read_where_they_lie():
    """Neither the looked-up rows nor their products with the weights are made."""
    h, src, dst, weight = graph()
    after = rewritten(traced(aggregate, h, src, dst, weight))
    assert not [e for e in after.eqns if e.outvars[0].aval.shape == (200, 6)]


def test_indices_are_sorted_once():
    def three(h, src, dst, weight):
        for _ in range(3):
            h = jnp.tanh(aggregate(h, src, dst, weight))
        return h

    after = rewritten(traced(three, *graph()))
    assert count(after, "segment_sum") == 3
    assert count(after, "segment_order") == count(after, "segment_bounds") == 1


@pytest.mark.parametrize("mode", [None, "clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize("index_shape", [(70,), (7, 10)])
@pytest.mark.parametrize("width", [(5,), (3, 4), ()])
def test_gradient_of_a_lookup(mode, index_shape, width):
    rng = np.random.default_rng(0)
    outside = 0 if mode == "promise_in_bounds" else 3
    index = jnp.asarray(rng.integers(-outside, 20 + outside, index_shape), jnp.int32)
    table = jnp.zeros((20, *width), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(*index_shape, *width)), jnp.float32)

    def gradient(table, index, cotangent):
        return jax.vjp(lambda t: t.at[index].get(mode=mode), table)[1](cotangent)[0]

    before = traced(gradient, table, index, cotangent)
    after = rewritten(before)
    assert count(after, "segment_sum") == 1
    close(
        evaluate(after, table, index, cotangent),
        evaluate(before, table, index, cotangent),
        jnp.float32,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", [None, "clip", "fill"])
def test_lookups_far_beyond_the_table(mode, masked):
    """They take the nearest row, unless they count as 0: no kernel reads beyond its table."""
    nodes, edges = 30, 200
    h, *_, weight = graph(nodes, edges)
    rng = np.random.default_rng(1)
    src, dst = jnp.asarray(rng.integers(-3 * nodes, 4 * nodes, (2, edges)), jnp.int32)
    keep = jnp.asarray(rng.random(edges) < 0.7)

    def loss(h, weight, src, dst, keep):
        terms = h.at[src].get(mode=mode, fill_value=0) * weight[:, None]
        terms = jnp.where(keep[:, None], terms, 0) if masked else terms
        total = jax.ops.segment_sum(terms, dst, num_segments=nodes)
        return jnp.sum(total**2), total

    args = h, weight, src, dst, keep
    before = traced(jax.grad(loss, (0, 1), has_aux=True), *args)
    after = segment_sums.run(before, 90, smallest=1)
    after = dce.run(cse.run(row_products.run(after, 90, smallest=1)))
    assert count(after, "segment_sum") == 2
    assert count(after, "row_products") == 1
    close(evaluate(after, *args), evaluate(before, *args), jnp.float32)
    sums = [eqn for eqn in after.eqns if eqn.primitive.name == "segment_sum"]
    unfilled = [(e.invars[2], e.invars[3].aval.shape[0]) for e in sums if not e.params["fills"]]
    assert unfilled or mode == "fill" or masked
    for columns, rows in unfilled:
        (found,) = evaluate(after.replace(outvars=[columns]), *args)
        assert 0 == found.min() <= found.max() == rows - 1


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_lookups_far_beyond_one_of_many_tables(axes):
    """They take the nearest row of their own table, and their gradients are added to none."""
    nodes, edges = 20, 100
    rng = np.random.default_rng(2)
    h = jnp.asarray(rng.normal(size=(3, nodes, 4)), jnp.float32)
    src = jnp.asarray(rng.integers(-3 * nodes, 4 * nodes, (3, edges)), jnp.int32)

    def gradient(h, src):
        def loss(h):
            return jnp.sum(jax.ops.segment_sum(h[src], src[::-1], num_segments=nodes) ** 2)

        return jax.grad(loss)(h)

    args = [a if axis == 0 else a[0] for a, axis in zip((h, src), axes, strict=True)]
    before = traced(jax.vmap(gradient, axes), *args)
    after = rewritten(before)
    assert count(after, "segment_sum") == 2
    close(evaluate(after, *args), evaluate(before, *args), jnp.float32)


def test_rows_that_are_missing_and_a_table_with_nan():
    """What is looked up beyond the table is 0, and no other row's NaN comes in its place."""
    h, src, dst, weight = graph(outside=5)
    h = h.at[0].set(jnp.nan).at[-1].set(jnp.inf)

    def gradient(h, src, dst, weight):
        return jax.vjp(lambda h: aggregate(h, src, dst, weight), h)[1](h)[0]

    before = traced(gradient, h, src, dst, weight)
    (want,) = evaluate(before, h, src, dst, weight)
    (got,) = evaluate(rewritten(before), h, src, dst, weight)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda h, src, dst, w: jax.ops.segment_max(h[src], dst, num_segments=30),
        lambda h, src, dst, w: jnp.zeros((30, 30)).at[src, dst].add(w),  # single elements
        lambda h, src, dst, w: jnp.zeros(30, jnp.int32).at[dst].add(src),
    ],
)
def test_left_alone(function):
    before = traced(function, *graph())
    assert segment_sums.run(before, 90, smallest=1) is before


def test_few_updates_are_left_alone():
    before = traced(aggregate, *graph())
    assert segment_sums.run(before, 90) is before


def test_inside_a_scan():
    h, src, dst, weight = graph()

    def layers(h, src, dst, weight):
        return jax.lax.scan(
            lambda h, _: (jnp.tanh(aggregate(h, src, dst, weight)), None), h, length=3
        )

    before = traced(layers, h, src, dst, weight)
    after = rewritten(before)
    assert "segment_sum" in str(after)
    close(evaluate(after, h, src, dst, weight), evaluate(before, h, src, dst, weight), jnp.float32)


LARGE = {"nodes": 5000, "edges": 40000, "features": 64}


@pytest.mark.cuda_lowering
def test_a_step_calls_the_kernel():
    h, src, dst, weight = graph(**LARGE)
    step = jevt.jit(lambda h: aggregate(h, src, dst, weight))
    text = step.trace(h).lower(lowering_platforms=("cuda",)).as_text()
    # Where rows begin, blocks of long rows, then all rows.
    assert text.count("triton_kernel_call") == 3
    assert "scatter" not in text


@pytest.mark.cuda_lowering
def test_a_kernel_that_does_not_compile_falls_back_with_a_warning(monkeypatch):
    def refuse(spec, capability):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(launch, "precompile", refuse)
    h, src, dst, weight = graph(**LARGE)
    step = jevt.jit(lambda h: aggregate(h, src, dst, weight))
    with pytest.warns(jevt.JevtWarning, match="no registers left") as caught:
        text = step.trace(h).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" not in text
    told = {str(w.message) for w in caught}
    assert {"search for rows" in t for t in told} == {"sum of segments" in t for t in told}
    assert len(told) == 2


def test_the_plan_says_what_it_is():
    h, src, dst, weight = graph(**LARGE)
    step = jevt.jit(lambda h: aggregate(h, src, dst, weight), strict=True)
    step.trace(h).lower(lowering_platforms=("cuda",))
    plan = jevt.last_trace(step).plan
    assert "one call: a kernel of its own" in {g.reason for g in plan.groups}


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_not_where_everything_is_left_to_xla(backend):
    from jevt._context import Context
    from jevt.partition.cost import DEVICES
    from jevt.pipeline import graph_passes

    context = Context("cuda", backend, False, (), DEVICES["H100"])
    assert "segment_sums" not in [name for name, _ in graph_passes(context)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_training_a_graph_network_on_a_gpu(dtype):
    h, src, dst, weight = graph(**LARGE, dtype=dtype)
    rng = np.random.default_rng(1)
    params = [jnp.asarray(rng.normal(size=(64, 64)) / 8, dtype) for _ in range(2)]

    def loss_fn(params, h):
        for w in params:
            h = jax.nn.relu(aggregate(h @ w, src, dst, weight) + h)
        return optax.l2_loss(h.astype(jnp.float32)).mean()

    step = jevt.jit(jax.value_and_grad(loss_fn))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, h))
    with jax.default_matmul_precision("highest"):
        got = step(params, h)
        want = jax.jit(jax.value_and_grad(loss_fn))(*wide)
    close(jax.tree.leaves(got), jax.tree.leaves(want), dtype)
    assert "segment_sum" in str(jevt.last_trace(step).lowered)
