"""Second stages of sums along rows: what is counted is what the kernels leave."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from partitions import context, trace

from jevt.lowering import spec as lowering
from jevt.partition import cost, partition
from jevt_kernels import launch, partials

H100 = cost.DEVICES["H100"]


def sums(x):
    return x.sum(0)


def sums_of_rows(x):
    """A kernel with both kinds of sums holds whole rows."""
    return (x - x.mean(1, keepdims=True)).sum(0)


def left(jaxpr):
    """Bytes of the partial results that the kernel of a program leaves."""
    spec = lowering.build(jaxpr, "sums")
    assert spec.mainloop == "columnwise"
    source = launch.source_for(spec, None)
    written = partials.written(spec, source).outputs
    return sum(written[partial.output].nbytes for partial in source.partials)


def traced(function, shape):
    """A program, and its sum along rows."""
    jaxpr, _ = trace(function, jax.ShapeDtypeStruct(shape, jnp.float32))
    sums = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "reduce_sum")
    (reduction,) = (eqn for eqn in sums if eqn.params["axes"] == (0,))
    return jaxpr, reduction


@pytest.mark.parametrize(
    ("shape", "programs"),
    [
        ((8, 670208), 0),  # 10472 blocks of columns
        ((4096, 67584), 0),  # 1056
        ((4096, 33792), 2),
        ((64, 64), 0),  # one block of rows
        ((100, 3), 0),
        ((4100, 3), 5),  # three columns are a tile of four
        ((1 << 20, 3), 1024),
        ((1 << 24, 3), 1056),
        ((16384, 1000), 66),
        ((1 << 20, 1024), 66),
    ],
)
def test_programs_share_columns_before_rows(shape, programs):
    jaxpr, reduction = traced(sums, shape)
    assert cost.parts_bytes(reduction) == 2 * 4 * programs * shape[1]
    assert cost.parts_bytes(reduction) == 2 * left(jaxpr)
    launched = H100.xla_launch_us * (programs > 0)
    expected = cost.parts_bytes(reduction) / H100.bytes_per_us + launched
    assert cost.second_stage_us([reduction], H100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "programs"),
    [
        ((16384, 1024), 528),
        ((16384, 768), 528),
        ((300, 1000), 300),
        ((1003, 100), 126),  # eight rows a block
        ((1 << 17, 96), 528),
        ((7, 100), 0),
    ],
)
def test_a_kernel_that_holds_whole_rows_has_fewer_programs(shape, programs):
    jaxpr, reduction = traced(sums_of_rows, shape)
    assert cost.parts_bytes(reduction, whole=True) == 2 * 4 * programs * shape[1]
    assert cost.parts_bytes(reduction, whole=True) == 2 * left(jaxpr)


def objective_and_groups(function, shape):
    plan = partition(traced(function, shape)[0], context("triton"))
    return plan.solution.objective_us, sum(group.predicted_us for group in plan.groups)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (sums, (8, 670208)),
        (sums, (1 << 20, 64)),
        (sums, (1 << 16, 1024)),
        (sums_of_rows, (1 << 16, 1024)),
    ],
)
def test_the_solver_counts_them_as_the_plan_does(function, shape):
    objective, groups = objective_and_groups(function, shape)
    assert objective == pytest.approx(groups, abs=0.01)


def test_of_few_columns_the_solver_counts_no_fewer_for_whole_rows():
    objective, groups = objective_and_groups(sums_of_rows, (1 << 20, 64))
    assert cost.parts_bytes(traced(sums, (1 << 20, 64))[1]) == 2 * 4 * 1056 * 64
    saved = 2 * 4 * (1056 - 528) * 64 / H100.bytes_per_us
    assert objective == pytest.approx(groups + saved, abs=0.01)
