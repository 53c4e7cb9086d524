"""What runs a group, and by which configuration."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from partitions import context, trace

from jevt.partition import partition
from jevt.partition.cost import DEVICES
from jevt_kernels import limits

SHAPES = [(4096, 1024), (1024, 1024), (4096, 1024)]
OPERANDS = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SHAPES]


def residual(x, w, y):
    return jnp.tanh(x @ w + y)


def product_group(device, **options):
    where = dataclasses.replace(context("triton", **options), device=DEVICES[device])
    plan = partition(trace(residual, *OPERANDS)[0], where)
    (group,) = (g for g in plan.groups if g.kind == "gemm")
    assert group.target == "triton"
    return group


@pytest.mark.parametrize(("device", "described"), [("A100", False), ("L4", False), ("H100", True)])
def test_a_kernel_runs_as_its_gpu_allows(device, described):
    group = product_group(device)
    assert group.config.descriptors == described
    capability = DEVICES[device].compute_capability
    assert group.config == limits.default_config(group.spec, capability)


def test_where_there_is_no_gpu_nothing_is_chosen():
    assert product_group("H100", platform="cpu").config is None


@pytest.mark.parametrize(("columns", "target"), [(3, "xla"), (64, "triton")])
def test_sums_of_few_columns_are_left_to_xla(columns, target):
    def sums(x):
        return jnp.sum(x * x, 0), jnp.sum(x, 0)

    x = jax.ShapeDtypeStruct((1 << 20, columns), jnp.bfloat16)
    (group,) = partition(trace(sums, x)[0], context("auto")).groups
    assert (group.kind, group.target) == ("columnwise", target)
