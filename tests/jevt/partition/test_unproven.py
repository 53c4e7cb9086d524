"""Leaves that are joined without proof lower the bound of a plan by what they may lose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from partitions import context, trace

from jevt.partition import partition
from jevt.partition.cost import DEVICES


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


X, W, B, V, C = (
    shape(*sizes) for sizes in ((16384, 1024), (1024, 4096), (4096,), (4096, 1024), (1024,))
)


def step(parameters, x):
    """Residual layers. A gradient is summed for the layer's bias, and goes on to the next one."""

    def loss(parameters):
        y = x
        for layer in parameters:
            y = y + jax.nn.gelu(y @ layer[0] + layer[1]) @ layer[2] + sum(layer[3:])
        return y.astype(jnp.float32).sum()

    gradients = jax.grad(loss)(parameters)
    return jax.tree.map(lambda p, g: (p - 1e-3 * g).astype(p.dtype), parameters, gradients)


def solved(*layer):
    return partition(trace(step, [layer] * 3, X)[0], context()).solution


def test_what_may_be_lost_is_no_part_of_the_bound():
    solution = solved(W, B, V, C)
    launch = DEVICES["H100"].triton_launch_us
    lost = solution.objective_us - solution.bound_us
    # the sums of the gradients that two layers share, a launch and a second stage each
    assert 1 * launch < lost < 3 * 4 * launch
    assert solution.status == "feasible"
    assert 0 < solution.gap < 0.01


def test_without_such_leaves_the_bound_is_met():
    solution = solved(W, B, V)
    assert solution.status == "optimal"
    assert solution.bound_us == pytest.approx(solution.objective_us)
