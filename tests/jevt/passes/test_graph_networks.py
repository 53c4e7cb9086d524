"""Graph networks as users write them: what becomes of their aggregations, and their values."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sums_of_segments as sums
from sums_of_segments import draw, ends

from benchmarks.models import gcn
from benchmarks.options import Options
from jevt.passes import dce, segment_epilogues
from jevt_kernels import segment_sum


def kernels(jaxpr):
    jaxpr, notes = sums.rewritten(jaxpr)
    return dce.run(segment_epilogues.run(jaxpr)), notes


def counts(jaxpr):
    return collections.Counter(eqn.primitive.name for eqn in jaxpr.eqns)


@pytest.mark.parametrize("spelling", ["segment_sum", "bcoo"])
def test_a_convolutional_network_s_step(spelling):
    """Three layers: six sums, each with the addition and activation after it, two sorts."""
    workload = gcn.make(Options(size="smoke", dtype="float32", param_dtype="float32"), spelling)
    state, batch = workload.init(0), workload.batch(0)
    flat, tree = jax.tree.flatten((state, batch))

    def step(*args):
        return jax.tree.leaves(workload.step(*jax.tree.unflatten(tree, args)))

    jaxpr, notes = kernels(jax.make_jaxpr(step)(*flat))
    found = counts(jaxpr)
    assert (found["fused_segment_sum"], found["segment_sum"], found["segment_order"]) == (6, 0, 2)
    assert not [name for name in found if name.startswith("bcoo")]
    assert not [n for n in notes if "terms" in n]  # of the loss, a scatter of labels stays
    got = jax.jit(lambda *a: jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *a))(*flat)
    for g, w in zip(got, jax.jit(step)(*flat), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def attention_layer(h, heads, src, dst, nodes):
    """A graph attention layer: weights of edges, a softmax over the edges of each node."""
    width = h.shape[1] // heads
    x = h.reshape(nodes, heads, width)
    score = jax.nn.leaky_relu(x.sum(2)[src] - x.max(2)[dst])
    score = score - jax.ops.segment_max(score, dst, num_segments=nodes)[dst]
    score = jnp.exp(score)
    total = jax.ops.segment_sum(score, dst, num_segments=nodes)[dst]
    messages = x[src] * (score / total)[:, :, None]
    return jax.ops.segment_sum(messages, dst, num_segments=nodes).reshape(nodes, -1)


def test_graph_attention():
    nodes = 12
    args = draw((nodes, 8)), ends((60,), high=nodes), ends((60,), high=nodes, seed=2)

    def loss(h, src, dst):
        return jnp.tanh(attention_layer(h, 2, src, dst, nodes)).sum()

    def both(h, src, dst):
        return jax.value_and_grad(loss)(h, src, dst)

    jaxpr, _ = kernels(jax.make_jaxpr(both)(*args))
    found = counts(jaxpr)
    # Receivers are sorted once as they are, and once as lookups take negative indices.
    assert (found["segment_order"], found["row_products"]) == (3, 1)
    got = jax.jit(lambda *a: jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *a))(*args)
    for g, w in zip(got, jax.jit(both)(*args), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_long_rows():
    """A node with most of the edges, of which blocks are summed apart, and one with none."""
    nodes, edges = 20, 20_000
    dst = jnp.where(jnp.arange(edges) % 10 > 0, 7, ends((edges,), high=nodes - 1))
    args = draw((nodes, 5)), draw(edges), ends((edges,), high=nodes), dst

    def aggregate(h, w, src, dst):
        return jax.ops.segment_sum(h[src] * w[:, None], dst, num_segments=nodes)

    _, jaxpr, _ = sums.check(aggregate, *args, tolerance=1e-4)
    (blocks, *_) = (e for e in jaxpr.eqns if e.primitive.name == "segment_blocks")
    assert blocks.outvars[0].aval.shape == (2, edges // segment_sum.BLOCK)
