"""Loops over layers sort the graph's indices once, before the loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import sums_of_segments as sums
from jax.extend.core import check_jaxpr
from sums_of_segments import EDGES, FEATURES, NODES, draw, ends

from jevt.passes import hoist_orders

ARGS = (draw((NODES, FEATURES)), draw((3, FEATURES, FEATURES)) / 3, ends(), ends(seed=2))


def layer(h, w, src, dst):
    weight = jnp.cos(jnp.arange(EDGES, dtype=jnp.float32))[:, None]
    messages = (h @ w)[src] * weight
    return jnp.tanh(jax.ops.segment_sum(messages, dst, num_segments=NODES) + h)


def over_layers(h, ws, src, dst):
    return jax.lax.scan(lambda h, w: (layer(h, w, src, dst), None), h, ws)[0]


def loops_of(jaxpr):
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


def count(jaxpr, name):
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns)


def test_forward_and_backward_loop_share_two_orders():
    top, jaxpr, _ = sums.check(over_layers, *ARGS)
    check_jaxpr(jaxpr)
    assert (top["segment_order"], top["segment_bounds"], top["segment_blocks"]) == (2, 2, 2)
    forward, backward = loops_of(jaxpr)
    for loop in (forward, backward):
        body = loop.params["jaxpr"]
        assert count(body, "segment_sum") == 1
        assert not {e.primitive.name for e in body.eqns} & {"segment_order", "segment_bounds"}
        # Columns and weights are in order as they come.
        (total,) = (e for e in body.eqns if e.primitive.name == "segment_sum")
        bounds, blocks, columns, _, weights = total.invars
        assert {bounds, blocks, columns, weights} <= set(body.invars)


def test_loops_inside_loops():
    def twice(h, ws, src, dst):
        step = lambda h, _: (over_layers(h, ws, src, dst), None)  # noqa: E731
        return jax.lax.scan(step, h, length=2)[0]

    jaxpr, _ = sums.rewritten(jax.make_jaxpr(twice)(*ARGS))
    assert count(jaxpr, "segment_order") == 1
    (got,) = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *ARGS)
    assert jnp.allclose(got, twice(*ARGS), atol=1e-5)


@pytest.mark.parametrize("carried", [False, True])
def test_a_graph_of_each_step_is_sorted_in_each_step(carried):
    h, ws, src, dst = ARGS

    def function(h, ws, src, dst):
        if carried:
            step = lambda c, w: ((layer(c[0], w, src, c[1]), c[1][::-1]), None)  # noqa: E731
            return jax.lax.scan(step, (h, dst), ws)[0][0]
        graphs = jnp.stack([dst, dst[::-1], dst])
        return jax.lax.scan(lambda h, x: (layer(h, x[0], src, x[1]), None), h, (ws, graphs))[0]

    jaxpr, _ = sums.rewritten(jax.make_jaxpr(function)(h, ws, src, dst))
    (loop,) = loops_of(jaxpr)
    assert count(loop.params["jaxpr"], "segment_order") == 1
    assert count(jaxpr, "segment_order") == 0
    (got,) = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, h, ws, src, dst)
    assert jnp.allclose(got, function(h, ws, src, dst), atol=1e-5)


def test_loops_without_sums_stay():
    before = jax.make_jaxpr(
        lambda h, ws: jax.lax.scan(lambda h, w: (h @ jnp.tanh(w), None), h, ws)[0]
    )(*ARGS[:2])
    assert hoist_orders.run(before) is before
