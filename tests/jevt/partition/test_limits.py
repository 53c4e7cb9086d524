"""What one kernel holds: operands, registers, one mainloop; and that long epilogues do fit."""

import jax
import jax.numpy as jnp
from jax import lax
from partitions import check_valid, context, trace

from jevt.lowering import spec
from jevt.partition import components, partition
from jevt_kernels import pressure


def kernels(function, *shapes, dtype="bfloat16"):
    operands = [jnp.ones(shape, dtype) for shape in shapes]
    jaxpr, consts = trace(function, *operands)
    plan = partition(jaxpr, context("triton"))
    check_valid(plan, [*consts, *operands], rtol=1e-2)
    found = [g for g in plan.groups if g.target == "triton"]
    for group in found:
        assert len(group.jaxpr.invars) + len(group.jaxpr.outvars) <= spec.MAX_OPERANDS
        assert pressure.least(group.spec) <= pressure.MOST
    return plan, found


def centred(*tensors):
    """Every operand is read before the sum along rows, and after it."""
    wide = [x.astype(jnp.float32) for x in tensors]
    mean = sum(wide).mean(-1, keepdims=True)
    return sum(jnp.abs(x - mean) for x in wide)


def test_few_operands_are_one_kernel():
    _, found = kernels(centred, *[(64, 1024)] * 8)
    assert [g.kind for g in found] == ["rowwise"]


def test_many_operands_are_several_kernels_within_the_limits(monkeypatch):
    monkeypatch.setattr(pressure, "MOST", 160)  # 16 elements a thread: ten values at a time
    plan, found = kernels(centred, *[(64, 1024)] * 16)
    assert len(found) > 1
    assert not any(g.fallback for g in plan.groups)


def test_more_operands_than_a_kernel_takes(monkeypatch):
    """Known to the program beforehand, so that it is solved once."""
    monkeypatch.setattr(spec, "MAX_OPERANDS", 12)
    monkeypatch.setattr(components, "MAX_OPERANDS", 12)
    plan, found = kernels(lambda *xs: sum(xs), *[(64, 128)] * 20)
    assert len(found) == 2
    assert all(len(g.jaxpr.invars) + len(g.jaxpr.outvars) <= 12 for g in found)
    assert (plan.solution.status, plan.solution.rounds) == ("optimal", 1)


def test_forty_pointwise_equations_around_one_mainloop():
    def step(x, w):
        y = x @ w
        for n in range(20):
            y = lax.max(y * y, jnp.bfloat16(n))
        return y

    operands = [jax.ShapeDtypeStruct(s, "bfloat16") for s in [(8192, 4096), (4096, 4096)]]
    jaxpr, _ = trace(step, *operands)
    plan = partition(jaxpr, context("triton"))
    (group,) = plan.groups
    assert (group.kind, group.target) == ("gemm", "triton")
    assert len(group.eqns) == 41
    assert plan.solution.status == "optimal"
