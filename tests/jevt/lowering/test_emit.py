"""Plans become jaxprs with kernel equations, and every way out is recorded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jevt
from jevt.lowering import emit
from jevt_kernels import compat, launch, visitor


def layer_norm(x, scale):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale


def block(x, weight, scale):
    """Two norms of equal shapes around a matrix product."""
    with jax.named_scope("first"):
        x = layer_norm(x, scale)
    x = jnp.tanh(x @ weight)
    with jax.named_scope("second"):
        return layer_norm(x, scale)


def arguments(rows=64, width=128):
    key = jax.random.key(0)
    x = jax.random.normal(key, (rows, width))
    weight = jax.random.normal(jax.random.fold_in(key, 1), (width, width)) / width**0.5
    return x, weight, jnp.ones((width,))


def kernel_equations(trace):
    return [e for e in trace.stages[-1].jaxpr.eqns if e.primitive is emit.kernel_p]


def lower_for_cuda(step, *args):
    lowered = step.trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.as_text(debug_info=True), jevt.last_trace(step)


@pytest.mark.cuda_lowering
def test_groups_become_triton_calls():
    text, trace = lower_for_cuda(jevt.jit(block, backend="triton"), *arguments())
    groups = [g for g in trace.plan.groups if g.target == "triton"]
    assert [g.kind for g in groups] == ["rowwise", "gemm", "rowwise"]
    assert len(kernel_equations(trace)) == 3
    assert text.count("@triton_kernel_call_ffi(") == 3
    assert "dot_general" not in text


@pytest.mark.cuda_lowering
def test_equal_kernels_share_source_and_keep_their_scopes():
    def twice(x, scales):
        for layer in range(2):
            with jax.named_scope(f"norm_{layer}"):
                x = layer_norm(jnp.sort(x), scales[layer])
        return x

    x, _, scale = arguments()
    text, trace = lower_for_cuda(jevt.jit(twice, backend="triton"), x, [scale, scale])
    first, second = kernel_equations(trace)
    assert len(trace.sources) == 2
    assert len(set(trace.sources.values())) == 1
    assert first.params["spec"].name.startswith("rowwise_norm_")
    assert "norm_0" in str(first.source_info.name_stack)
    assert "norm_1" in str(second.source_info.name_stack)
    assert re.search(r"norm_0/g\d+_rowwise", text)


def test_lowered_jaxpr_evaluates_to_the_same_values():
    args = arguments()
    step = jevt.jit(block, backend="triton")
    trace = step.explain(*args)
    assert len(kernel_equations(trace)) == 3
    lowered = trace.stages[-1].jaxpr
    (got,) = jax.core.eval_jaxpr(lowered, lowered.consts, *args)
    np.testing.assert_allclose(got, block(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_kernels_run_in_the_interpreter():
    args = arguments(rows=12, width=40)
    step = jevt.jit(block, backend="interpret")
    got = step(*args)
    assert len(kernel_equations(jevt.last_trace(step))) == 3
    np.testing.assert_allclose(got, jax.jit(block)(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_check_names_the_group_that_differs(monkeypatch, tmp_path):
    """A kernel made wrong on purpose is found, and the reproduction holds its inputs."""
    monkeypatch.setenv("JEVT_CHECK", "1")
    monkeypatch.setenv("JEVT_DUMP_DIR", str(tmp_path))
    from jevt_kernels import interpreter

    right = interpreter.call
    monkeypatch.setattr(interpreter, "call", lambda *a, **k: [r + 1 for r in right(*a, **k)])
    x, _, scale = arguments(rows=12, width=40)
    step = jevt.jit(layer_norm, backend="interpret")

    def run_to_the_end():
        jax.block_until_ready(step(x, scale))
        jax.effects_barrier()

    with pytest.raises(
        Exception, match=r"group g\d+_rowwise\w*: output 0 of kernel rowwise_\w+ differs"
    ):
        run_to_the_end()
    (script,) = tmp_path.glob("jevt_rowwise_*/reproduce.py")
    compile(script.read_text(), script, "exec")
    assert "\nconfig = None\n" in script.read_text()
    assert list(tmp_path.glob("jevt_rowwise_*/inputs.npz"))


@pytest.mark.interpret
def test_check_is_silent_when_kernels_agree(monkeypatch):
    monkeypatch.setenv("JEVT_CHECK", "1")
    x, _, scale = arguments(rows=12, width=40)
    step = jevt.jit(layer_norm, backend="interpret")
    got = step(x, scale)
    jax.effects_barrier()
    np.testing.assert_allclose(got, layer_norm(x, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.cuda_lowering
def test_a_kernel_that_does_not_compile_goes_back_to_xla(monkeypatch):
    def refuse(spec, capability, config):
        raise RuntimeError(f"no registers left in {spec.name}")

    monkeypatch.setattr(launch, "precompile", refuse)
    step = jevt.jit(layer_norm, backend="triton")
    x, _, scale = arguments()
    with pytest.warns(jevt.JevtWarning, match="runs through XLA: kernel did not compile"):
        text, trace = lower_for_cuda(step, x, scale)
    assert "triton_kernel_call_ffi" not in text
    (group,) = [g for g in trace.plan.groups if g.kind == "rowwise"]
    assert group.target == "xla"
    assert group.fallback
    assert "no registers left" in group.reason


@pytest.mark.cuda_lowering
def test_one_warning_for_one_reason(monkeypatch):
    def refuse(spec, capability, config):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(launch, "precompile", refuse)
    x, weight, scale = arguments()
    step = jevt.jit(lambda *a: jax.lax.map(lambda _: block(*a), jnp.ones(3)), backend="triton")
    with pytest.warns(jevt.JevtWarning, match=r"3 groups \(g\d+_rowwise.*, …\) run ") as caught:
        _, trace = lower_for_cuda(step, x, weight, scale)
    assert len(caught) == 1
    assert len(trace.warnings) == 3


@contextlib.contextmanager
def jax_triton_missing():
    with pytest.MonkeyPatch.context() as patch:
        # None makes Python's import raise ModuleNotFoundError.
        patch.setitem(sys.modules, "jax_triton", None)
        yield


@contextlib.contextmanager
def triton_too_old():
    version = importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.metadata, "version", lambda n: "3.5.1" if n == "triton" else version(n)
        )
        yield


@contextlib.contextmanager
def gpu_too_old():
    class Volta:
        device_kind = "Tesla V100"
        compute_capability = "7.0"

    devices = jax.devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: [Volta()] if a == ("cuda",) else devices(*a))
        yield


@pytest.mark.cuda_lowering
@pytest.mark.parametrize(
    ("circumstance", "message"),
    [
        (jax_triton_missing, r"jax-triton, which is not installed. Install it with"),
        (triton_too_old, r"expected Triton 3.6 or newer, got 3.5.1. Upgrade it"),
        (gpu_too_old, r"expected a GPU of compute capability 8.0 or higher .* got 7.0"),
    ],
)
def test_machines_that_cannot_run_kernels(circumstance, message):
    """The program runs, with one warning; under ``strict`` it is an error; and nothing stays."""
    x, weight, scale = arguments()
    launch.precompile.cache_clear()
    compat.triton_version.cache_clear()
    compat.import_jax_triton.cache_clear()
    with circumstance():
        step = jevt.jit(block, backend="triton")
        with pytest.warns(jevt.JevtWarning, match=f"3 groups .* run through XLA.*{message}") as log:
            text, trace = lower_for_cuda(step, x, weight, scale)
        assert len(log) == 1
        assert "triton_kernel_call_ffi" not in text
        assert {g.target for g in trace.plan.groups} == {"xla"}
        with (
            pytest.warns(jevt.JevtWarning),
            pytest.raises(jevt.StrictError, match=message),
        ):
            lower_for_cuda(jevt.jit(block, backend="triton", strict=True), x, weight, scale)
    text, _ = lower_for_cuda(jevt.jit(block, backend="triton", strict=True), x, weight, scale)
    assert "triton_kernel_call_ffi" in text


@pytest.mark.cuda_lowering
def test_strict_makes_a_failed_kernel_an_error(monkeypatch):
    def refuse(spec, capability, config):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(launch, "precompile", refuse)
    x, _, scale = arguments()
    step = jevt.jit(layer_norm, backend="triton", strict=True)
    with (
        pytest.warns(jevt.JevtWarning, match="did not compile"),
        pytest.raises(jevt.StrictError, match="no registers left"),
    ):
        step.trace(x, scale).lower(lowering_platforms=("cuda",))


def adamw_step(params, state, grads):
    updates, state = optax.adamw(1e-3).update(grads, state, params)
    return optax.apply_updates(params, updates), state


def test_donated_buffers_are_written_in_place():
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones((64,))}
    state = optax.adamw(1e-3).init(params)
    trace = jevt.jit(adamw_step, backend="triton", donate_argnums=(0, 1)).explain(
        params, state, params
    )
    aliases = [len(e.params["spec"].aliases) for e in kernel_equations(trace)]
    assert sum(aliases) == 6  # parameter and two moments, of two arrays
    kept = jevt.jit(adamw_step, backend="triton").explain(params, state, params)
    assert sum(len(e.params["spec"].aliases) for e in kernel_equations(kept)) == 0


def test_a_donated_input_that_is_read_later_is_not_overwritten():
    def step(x):
        y = jnp.exp(x) * 2.0
        return y, jnp.sort(x)  # sort runs after the kernel could

    trace = jevt.jit(step, backend="triton", donate_argnums=0).explain(jnp.ones((512, 512)))
    order = [e.primitive.name for e in trace.stages[-1].jaxpr.eqns]
    for equation in kernel_equations(trace):
        if order.index("sort") > order.index("jevt_kernel"):
            assert equation.params["spec"].aliases == ()


@pytest.mark.interpret
def test_scan_bodies_hold_kernels():
    def layers(x, scales):
        return jax.lax.scan(lambda c, s: (layer_norm(c, s) + c, ()), x, scales)[0]

    x, scales = arguments(rows=8, width=32)[0], jnp.ones((3, 32))
    step = jevt.jit(layers, backend="interpret")
    np.testing.assert_allclose(step(x, scales), layers(x, scales), rtol=1e-5, atol=1e-5)
    trace = jevt.last_trace(step)
    bodies = [plan for _, plan in trace.plan.nested]
    assert [g.kind for g in bodies[0].groups if g.target == "triton"] == ["rowwise"]


@pytest.mark.interpret
def test_dropout_bits_are_those_of_jax_random():
    def dropout(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0.0)

    x = jax.random.normal(jax.random.key(1), (33, 47))
    step = jevt.jit(dropout, backend="interpret")
    got = step(x, jax.random.key(7))
    np.testing.assert_array_equal(got == 0, dropout(x, jax.random.key(7)) == 0)
    (equation,) = kernel_equations(jevt.last_trace(step))
    operations = [n.op for n in equation.params["spec"].tree if isinstance(n, visitor.Compute)]
    assert "threefry2x32" in operations


@pytest.mark.cuda_lowering
def test_what_is_compiled_beforehand_is_what_runs(monkeypatch):
    """Outputs in place change a kernel's text, so they are settled before it is tried."""
    tried = []
    compile_kernel = launch.precompile
    monkeypatch.setattr(
        launch, "precompile", lambda s, *a: (tried.append(s), compile_kernel(s, *a))
    )
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones((64,))}
    state = optax.adamw(1e-3).init(params)
    step = jevt.jit(adamw_step, backend="triton", donate_argnums=(0, 1))
    _, trace = lower_for_cuda(step, params, state, params)
    run = [e.params["spec"] for e in kernel_equations(trace)]
    assert any(spec.aliases for spec in run)
    assert run == [g.spec for g in trace.plan.groups if g.target == "triton"]
    assert len(tried) == len(set(tried))
    assert set(tried) == set(run)
