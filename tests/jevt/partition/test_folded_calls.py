"""What a call of cuBLAS takes along: a product with it is left to XLA, as one group."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from partitions import context, trace

from jevt.partition import partition
from jevt.partition.cost import DEVICES

LAYER = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((16384, 2048), (2048, 4096), (4096,))
]


def bias(x, w, b):
    return x @ w + b


def bias_relu(x, w, b):
    return jnp.maximum(x @ w + b, 0)


def bias_gelu(x, w, b):
    h = x @ w + b
    return h, jax.nn.gelu(h, approximate=False)


def planned(function, exposed=0.7):
    device = DEVICES["H100"]
    if exposed != device.exposed_epilogue:  # as of a GPU on which groups of warps cannot take turns
        rate = 0.9 * device.cublas_flops_per_us
        device = dataclasses.replace(device, exposed_epilogue=exposed, kernel_flops_per_us=rate)
    where = dataclasses.replace(context("auto"), device=device)
    return partition(trace(function, *LAYER)[0], where)


def primitives(group):
    return {eqn.primitive.name for eqn in group.jaxpr.eqns}


@pytest.mark.parametrize("function", [bias, bias_relu])
@pytest.mark.parametrize("exposed", [0.7, 1.25])
def test_a_bias_and_a_relu_are_left_to_xla_with_their_product(function, exposed):
    plan = planned(function, exposed)
    (group,) = plan.groups
    assert (group.kind, group.target) == ("gemm", "xla")
    assert {"dot_general", "add"} <= primitives(group)
    assert group.reason.startswith("cost model: ") and group.reason.endswith("as XLA fuses it")
    assert not group.fallback
    assert group.predicted_us == pytest.approx(plan.solution.objective_us, rel=1e-4)
    assert plan.solution.status == "optimal"


def test_a_gelu_is_fused_where_the_product_hides_enough_of_it():
    plan = planned(bias_gelu)
    (group,) = plan.groups
    assert (group.kind, group.target, group.reason) == ("gemm", "triton", "")
    assert {"dot_general", "add", "erfc"} <= primitives(group)
    assert group.predicted_us < group.xla_us
    assert group.predicted_us == pytest.approx(plan.solution.objective_us, rel=1e-4)


def test_a_gelu_is_a_kernel_of_its_own_where_nothing_is_hidden():
    plan = planned(bias_gelu, exposed=1.25)
    product, gelu = plan.groups
    assert (product.kind, product.target) == ("gemm", "xla")
    assert "erfc" not in primitives(product)
    assert product.reason.startswith("cost model: ")
    assert (gelu.kind, gelu.target) == ("pointwise", "triton")
    assert "erfc" in primitives(gelu)
    fused = planned(bias_gelu).groups[0]
    assert fused.predicted_us < product.predicted_us + gelu.predicted_us


@pytest.mark.parametrize("function", [bias_relu, bias_gelu])
def test_cublas_is_no_candidate_for_who_asks_for_kernels(function):
    plan = partition(trace(function, *LAYER)[0], context("triton"))
    (group,) = plan.groups
    assert (group.kind, group.target) == ("gemm", "triton")
    assert plan.solution.objective_us == pytest.approx(group.predicted_us, rel=1e-4)
