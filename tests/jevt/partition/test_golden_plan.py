"""The plan of a small step for an H100, as a table and as a drawing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jevt import pipeline
from jevt._context import Context
from jevt.partition import partition
from jevt.partition.cost import DEVICES
from jevt.partition.printing import format_plan


def _layer_norm(x, scale):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale


def _step(params, x, labels):
    def loss_fn(params):
        with jax.named_scope("norm"):
            hidden = _layer_norm(x, params["scale"])
        with jax.named_scope("head"):
            logits = jax.nn.gelu(hidden @ params["up"]) @ params["down"] + params["bias"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


@pytest.fixture(scope="module")
def plan():
    shapes = {"scale": (1024,), "up": (1024, 4096), "down": (4096, 2000), "bias": (2000,)}
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    x, labels = (
        jax.ShapeDtypeStruct((16384, 1024), "float32"),
        jax.ShapeDtypeStruct((16384,), "int32"),
    )
    jaxpr = jax.make_jaxpr(_step)(params, x, labels)
    context = Context("cuda", "auto", False, (False,) * len(jaxpr.invars), DEVICES["H100"])
    for _, run in pipeline.graph_passes(context):
        jaxpr = run(jaxpr)
    return partition(jaxpr.with_consts(()), context)


def test_table(golden, plan):
    golden("plans/step.txt", format_plan(plan))


def test_drawing(golden, plan):
    golden("plans/step.dot", plan.to_dot())
