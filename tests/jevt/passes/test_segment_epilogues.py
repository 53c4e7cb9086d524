"""What is added to a sum of segments, and its activation, run in the sum's kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
import sums_of_segments as sums
from jax.extend.core import check_jaxpr
from sums_of_segments import EDGES, FEATURES, NODES, draw, ends

import jevt
from jevt.passes import dce, segment_epilogues
from jevt.primitives.segment_epilogue import with_epilogue
from jevt.primitives.segments import spec_of
from jevt_kernels import aot, interpreter
from jevt_kernels.mainloops import MAINLOOPS

ARGS = (draw((NODES, FEATURES)), draw(EDGES), ends(), ends(seed=2), draw(FEATURES, seed=4))


def aggregate(h, w, src, dst):
    return jax.ops.segment_sum(h[src] * w[:, None], dst, num_segments=NODES)


def with_gradient(function):
    def both(h, *rest):
        out, pull = jax.vjp(lambda h: function(h, *rest), h)
        return out, pull(out)[0]

    return both


def degree(h, dst):
    return jnp.cos(jnp.arange(NODES, dtype=h.dtype))


# A function of h, w, src, dst and a bias, and how many of its equations join the sum.
EPILOGUES = {
    "add": (lambda h, w, s, d, b: aggregate(h, w, s, d) + h, 1),
    "relu": (lambda h, w, s, d, b: jax.nn.relu(aggregate(h, w, s, d) + h), 2),
    "bias": (lambda h, w, s, d, b: jnp.tanh(aggregate(h, w, s, d) + b), 2),
    "rows": (lambda h, w, s, d, b: aggregate(h, w, s, d) * degree(h, d)[:, None] + b, 2),
    "cast": (lambda h, w, s, d, b: (aggregate(h, w, s, d) * 2).astype(jnp.bfloat16), 2),
    "compare": (lambda h, w, s, d, b: aggregate(h, w, s, d) > h, 1),
}


def fused(jaxpr):
    result = dce.run(segment_epilogues.run(jaxpr))
    check_jaxpr(result)
    return result


def parts(jaxpr):
    return [e for e in jaxpr.eqns if e.primitive.name == "fused_segment_sum"]


@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name):
    function, count = EPILOGUES[name]
    before, _ = sums.rewritten(jax.make_jaxpr(function)(*ARGS))
    after = fused(before)
    (eqn,) = parts(after)
    inside = [e.primitive.name for e in eqn.params["epilogue"].jaxpr.eqns]
    assert len([n for n in inside if n not in ("broadcast_in_dim", "reshape")]) == count
    assert after.eqns[-1] is eqn
    (got,) = jax.core.eval_jaxpr(after, after.consts, *ARGS)
    want = function(*ARGS)
    assert got.dtype == want.dtype
    assert jnp.allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-2, atol=1e-4)
    assert segment_epilogues.run(after) is after


def test_forward_and_backward():
    """An activation, and what its gradient needs; the gradient's own addition."""
    before, _ = sums.rewritten(jax.make_jaxpr(with_gradient(EPILOGUES["relu"][0]))(*ARGS))
    after = fused(before)
    forward, backward = parts(after)
    assert len(forward.outvars) == 2
    assert len(backward.outvars) == 1
    got = jax.core.eval_jaxpr(after, after.consts, *ARGS)
    for g, w in zip(got, with_gradient(EPILOGUES["relu"][0])(*ARGS), strict=True):
        assert jnp.allclose(g, w, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        # made after the sum, from the sum, or of another shape
        lambda h, w, s, d, b: aggregate(h, w, s, d).sum(0),
        lambda h, w, s, d, b: (lambda a: a - a.mean(0))(aggregate(h, w, s, d)),
        lambda h, w, s, d, b: aggregate(h, w, s, d) @ h.T,
        lambda h, w, s, d, b: aggregate(h, w, s, d),
    ],
)
def test_left_alone(function):
    before, _ = sums.rewritten(jax.make_jaxpr(function)(*ARGS))
    assert segment_epilogues.run(before) is before


def test_no_more_results_than_are_worth_it():
    def function(h, w, src, dst, b):
        total = aggregate(h, w, src, dst)
        return total + 1, total + 2, total + 3, total * h

    before, _ = sums.rewritten(jax.make_jaxpr(function)(*ARGS))
    after = fused(before)
    assert all(len(eqn.outvars) <= segment_epilogues.MAX_RESULTS for eqn in parts(after))
    got = jax.core.eval_jaxpr(after, after.consts, *ARGS)
    for g, w in zip(got, function(*ARGS), strict=True):
        assert jnp.allclose(g, w, atol=1e-4)


def test_two_sums_that_are_added():
    """The second takes the first one in, not the other way around."""

    def function(h, w, src, dst, b):
        return aggregate(h, w, src, dst) + aggregate(h, w, dst, src)

    before, _ = sums.rewritten(jax.make_jaxpr(function)(*ARGS))
    after = fused(before)
    assert [e.primitive.name for e in after.eqns if "segment_sum" in e.primitive.name] == [
        "segment_sum",
        "fused_segment_sum",
    ]
    (got,) = jax.core.eval_jaxpr(after, after.consts, *ARGS)
    assert jnp.allclose(got, function(*ARGS), atol=1e-4)


def test_inside_a_loop():
    def function(h, w, src, dst, b):
        step = lambda h, _: (EPILOGUES["relu"][0](h, w, src, dst, b), None)  # noqa: E731
        return jax.lax.scan(step, h, length=2)[0]

    before, _ = sums.rewritten(jax.make_jaxpr(function)(*ARGS))
    after = fused(before)
    assert "fused_segment_sum" in str(after)
    (got,) = jax.core.eval_jaxpr(after, after.consts, *ARGS)
    assert jnp.allclose(got, function(*ARGS), atol=1e-4)


def kernel_of(name, dtype=jnp.float32, features=FEATURES, weights=(EDGES,), blocks=0):
    """A sum's kernel with the epilogue of a spelling, and operands for it."""
    function = EPILOGUES[name][0]
    _, w, src, dst, _ = ARGS
    args = draw((NODES, features), dtype), w.astype(dtype), src, dst, draw(features, dtype)
    before, _ = sums.rewritten(jax.make_jaxpr(function)(*args))
    (eqn,) = parts(fused(before))
    rng = np.random.default_rng(0)
    bounds = np.sort(rng.integers(0, EDGES + 1, NODES + 1)).astype(np.int32)
    operands = [bounds, np.zeros((2, blocks), np.int32), src, args[0], draw(weights, dtype)]
    params = {key: eqn.params[key] for key in ("dtype", "fills")}
    spec = with_epilogue(spec_of(operands, **params), eqn.params["epilogue"].jaxpr)
    extras = [draw(t.shape, t.dtype, seed=5) for t in spec.inputs[4 + bool(blocks) :]]
    return spec, [np.asarray(a) for a in (bounds, *operands[2:], *extras)]


@pytest.mark.interpret
@pytest.mark.parametrize("name", EPILOGUES)
def test_the_kernel(name):
    spec, operands = kernel_of(name)
    got, want = interpreter.run(spec, *operands), contract.referred(spec, *operands)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(g, np.float32), np.asarray(w, np.float32), rtol=1e-2, atol=1e-4
        )


@pytest.mark.interpret
def test_the_kernel_of_several_heads():
    spec, operands = kernel_of("bias", weights=(EDGES, 3))
    (got,), (want,) = interpreter.run(spec, *operands), contract.referred(spec, *operands)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch):
    for name, blocks in (("relu", 0), ("rows", EDGES // 512), ("bias", 0)):
        spec, _ = kernel_of(name, jnp.bfloat16, 64, blocks=blocks)
        for config in MAINLOOPS["segments"].configs(spec):
            assert aot.compile(spec, arch, config=config).spill_bytes == 0


@pytest.mark.cuda_lowering
def test_a_step_calls_one_kernel_for_both():
    nodes, edges = 5000, 40000
    h, bias = draw((nodes, 64)), draw(64)
    src, dst = ends((edges,), high=nodes), ends((edges,), high=nodes, seed=2)

    @functools.partial(jevt.jit, strict=True)
    def step(h, src, dst):
        return jax.nn.relu(jax.ops.segment_sum(h[src], dst, num_segments=nodes) + bias)

    text = step.trace(h, src, dst).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") >= 2
    plan = jevt.last_trace(step).plan
    assert any("fused_segment_sum" in str(e.primitive) for e in plan.jaxpr.eqns)
    assert not [e for e in plan.jaxpr.eqns if e.primitive.name == "max"]
