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
    if source.stages is not None:
        spec = source.stages.steps[0].spec
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
        ((8, 670208), 0),  # 5236 blocks of columns
        ((4096, 67584), 0),  # 528
        ((4096, 40000), 2),  # 313
        ((64, 128), 0),  # four blocks of rows
        ((80, 128), 2),
        ((100, 3), 0),
        ((4100, 3), 3),  # nine tiles of four columns, of which a program walks four
        ((1 << 20, 3), 128 * 64),  # 64 rows are one
        ((1 << 24, 3), 176 * 64),
        ((1 << 20, 16), 528),
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
        (sums, (1 << 20, 3)),
        (sums_of_rows, (1 << 16, 1024)),
        (sums_of_rows, (1 << 20, 64)),
    ],
)
def test_the_solver_counts_them_as_the_plan_does(function, shape):
    objective, groups = objective_and_groups(function, shape)
    assert objective == pytest.approx(groups, abs=0.01)


def test_rows_of_few_columns_are_xlas_unless_something_else_is_stored():
    """Alone both take as long, and XLA's are no launch more; of many columns ours are faster."""

    def beside(x):
        return x.sum(0), jnp.exp(x)

    for function, columns, target in (
        (sums, 3, "xla"),
        (beside, 3, "triton"),
        (sums, 64, "triton"),
    ):
        jaxpr, reduction = traced(function, (1 << 20, columns))
        assert cost.narrow_columns([reduction]) == (4 / 3 if columns == 3 else 1)
        (group,) = partition(jaxpr, context("auto")).groups
        assert group.target == target
    odd = traced(sums, ((1 << 20) + 1, 3))[1]
    assert cost.narrow_columns([odd]) == 16 / 3
