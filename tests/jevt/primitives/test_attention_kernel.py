"""Where attention's backward pass is our kernel, and where it stays cuDNN's."""

from __future__ import annotations

import dataclasses
import functools

import attentions
import jax
import jax.numpy as jnp
import pytest
from rewriting import relative_norm

import jevt
from jevt import _jax_internals as internals
from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.primitives import attention_kernel
from jevt.primitives.attention import Shape, attention_backward_p, attention_p, backward_reference
from jevt.primitives.cudnn_attention import Case
from jevt_kernels import gluon_kernels

VIT = Case(Shape(128, 256, 256, 12, 12, 64, 64), "bfloat16", biased=False, trained=True)


def case(**changes):
    own = {f.name for f in dataclasses.fields(Case)}
    shape = dataclasses.replace(VIT.shape, **{k: v for k, v in changes.items() if k not in own})
    rest = {k: v for k, v in changes.items() if k in own}
    return dataclasses.replace(VIT, shape=shape, **rest)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"queries": 197, "keys": 197},
        {"queries": 154, "keys": 154},
        {"queries": 512, "keys": 512, "batch": 32, "heads": 16, "key_heads": 16},
        {"queries": 500, "keys": 487},
        {"queries": 512, "keys": 154},
        {"batch": 22},
    ],
)
def test_takes(changes):
    assert attention_kernel.obstacle(case(**changes), 90, causal=False) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "this is float32"),
        ({"biased": True}, "no bias and no mask"),
        ({"width": 128, "value_width": 128}, "heads of 64, not of 128 and 128"),
        ({"value_width": 128}, "heads of 64, not of 64 and 128"),
        ({"key_heads": 4}, "4 heads of keys for 12"),
        ({"queries": 513}, "513 queries and 256 keys: more than 512"),
        ({"keys": 1024}, "256 queries and 1024 keys: more than 512"),
        ({"batch": 21}, "252 heads in all: fewer than 264"),
        ({"keys": 153}, "153 keys fill too little of 1 tiles"),
        ({"keys": 486}, "486 keys fill too little of 2 tiles"),
        ({"queries": 153}, "153 queries for each tile"),
    ],
)
def test_leaves_to_cudnn(changes, reason):
    assert reason in attention_kernel.obstacle(case(**changes), 90, causal=False)


def test_masks_and_other_devices():
    assert "no bias and no mask" in attention_kernel.obstacle(VIT, 90, causal=True)
    for capability in (0, 80, 100):
        reason = attention_kernel.obstacle(VIT, capability, causal=False)
        assert f"9.0, this is {capability / 10}" in reason


def lowered(capability=90, layout="BTNH", causal=False, **changes):
    """The text of a backward pass that is lowered for CUDA."""
    shape = case(**changes).shape
    q = (shape.batch, shape.queries, shape.heads, shape.width)
    k = (shape.batch, shape.keys, shape.key_heads, shape.width)
    if layout == "BNTH":
        q, k = ((b, n, t, h) for b, t, n, h in (q, k))
    rows = (shape.batch, shape.heads, shape.queries)
    types = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (q, k, k, q, rows, q)]
    types[4] = jax.ShapeDtypeStruct(rows, jnp.float32)
    step = functools.partial(
        attention_backward_p.bind, scale=0.3, causal=causal, layout=layout, capability=capability
    )
    return jax.jit(step).trace(*types).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """Calls of the kernel, and of cuDNN."""
    assert "dot_general" not in text
    return text.count("@triton_kernel_call"), text.count("@__cudnn$fmhaSoftmaxBackward(")


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("layout", ["BTNH", "BNTH"])
def test_lowers_to_the_kernel(layout):
    for sizes in ({}, {"queries": 197, "keys": 197}, {"queries": 300, "keys": 500}):
        text = lowered(layout=layout, **sizes)
        assert calls(text) == (1, 0)
        assert "transpose" not in text


@pytest.mark.cuda_lowering
@pytest.mark.parametrize(
    "changes",
    [{"capability": 0}, {"capability": 80}, {"capability": 100}, {"batch": 2}, {"causal": True}],
)
def test_lowers_to_cudnn(changes):
    assert calls(lowered(**changes)) == (0, 1)


@pytest.mark.cuda_lowering
def test_a_kernel_that_does_not_compile(monkeypatch):
    def refuse(kernel, capability):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(gluon_kernels, "precompile", refuse)
    with pytest.warns(jevt.JevtWarning, match="through cuDNN: its kernel .* no registers left"):
        text = lowered()
    assert calls(text) == (0, 1)


def test_elsewhere_it_is_the_reference():
    q, k, v, d_out = attentions.operands()
    out, statistics = attention_p.bind(q, k, v, scale=0.3, causal=False, layout="BTNH")
    operands = (q, k, v, out, statistics, d_out)
    how = {"scale": 0.3, "causal": False, "layout": "BTNH"}
    got = jax.jit(functools.partial(attention_backward_p.bind, **how, capability=90))(*operands)
    assert relative_norm(got, backward_reference(*operands, **how)) < 1e-6


def step_of(attend):
    shape = (24, 256, 12, 64)
    types = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 4
    return attentions.training(attend), types


@pytest.mark.cuda_lowering
def test_a_step_calls_the_kernel(monkeypatch):
    """Forward by cuDNN, backward by the kernel, for the device of the compilation."""
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    step, types = step_of(jax.nn.dot_product_attention)
    jitted = jevt.jit(step)
    text = jitted.trace(*types).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax") == text.count("@triton_kernel_call") == 1
    reasons = {g.reason for g in jevt.last_trace(jitted).plan.groups if g.kind == "attention"}
    assert "one call: cuDNN's fused attention, or a kernel of its own" in reasons


@pytest.mark.cuda_lowering
def test_a_step_of_several_devices(monkeypatch):
    """Inside ``shard_map`` arrays are those of a device, and so is the kernel."""
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    step, types = step_of(jax.nn.dot_product_attention)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    local = jax.shard_map(step, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 4)
    text = jevt.jit(local).trace(*types).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax") == text.count("@triton_kernel_call") == 1


@pytest.mark.cuda_lowering
def test_steps_that_leave_all_to_libraries(monkeypatch):
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    step, types = step_of(jax.nn.dot_product_attention)
    jitted = jevt.jit(step, backend="xla")
    text = jitted.trace(*types).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax") == 2 and "triton" not in text


@pytest.mark.parametrize(
    ("context", "capability"),
    [
        (Context("cuda", "auto", False, (), DEVICES["H100"]), 90),
        (Context("cuda", "auto", False, (), DEVICES["A100"]), 80),
        (Context("cuda", "xla", False, (), DEVICES["H100"]), 0),
    ],
)
def test_the_pass_tells_the_device(context, capability):
    step = attentions.training(attentions.einsum())
    jaxpr, _ = attentions.raised(step, *attentions.operands(), context=context)
    (params,) = (e.params for e in jaxpr.eqns if e.primitive is attention_backward_p)
    assert params["capability"] == capability
