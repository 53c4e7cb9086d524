"""Steps with outputs that are wanted on demand: what is computed when, and from what."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from lazy_steps import W, X, Y, is_lazy, make_step, names
from programs import close
from small_models import MODELS

import jevt
from jevt import _call


def test_loss_and_metrics_are_computed_when_they_are_read():
    step = jevt.jit(make_step())
    want_w, want = jax.jit(make_step())(W, X, Y)
    for _ in range(3):
        w, metrics = step(W, X, Y)
        assert is_lazy((w, metrics)) == [False, True, True]
        assert set(metrics) == {"loss", "accuracy"} and metrics["loss"].shape == ()
        close(w, want_w)
        close(jax.device_get(metrics), want)


def test_the_equations_of_the_loss_are_gone_from_the_step():
    step = jevt.jit(make_step())
    _, metrics = step(W, X, Y)
    trace = jevt.last_trace(step)
    assert trace is step.explain(W, X, Y)
    with jevt.compute_lazy():
        whole = step.explain(W, X, Y)
    assert "log" in names(whole) and "argmax" in names(whole)
    assert "log" not in names(trace) and "argmax" not in names(trace)
    assert len(trace.stage("trace").jaxpr.outvars) == 1
    assert trace.lazy == ("result[1]['accuracy']", "result[1]['loss']") and whole.lazy == ()
    assert f"computed on demand, by jevt.lazy: {', '.join(trace.lazy)}\n" in str(trace)
    assert jevt.last_trace(step) is whole
    float(metrics["loss"])
    assert jevt.last_trace(step) is whole, "the second program is not the step"


def test_second_program_is_compiled_once_and_run_once_a_call(monkeypatch):
    compiled, runs = [], []
    compile_call = _call._compile

    def noted(*args):
        compiled.append(args[-1].owner.name)
        return compile_call(*args)

    monkeypatch.setattr(_call, "_compile", noted)

    @jevt.jit
    def step(x):
        seen = jax.pure_callback(
            lambda v: (runs.append(1), v)[1], jax.ShapeDtypeStruct((), jnp.float32), x.sum()
        )
        return x * 2, jevt.lazy((seen, seen + 1))

    outputs = [step(x) for x in (X, X + 1, X + 2)]
    assert compiled == ["step"] and runs == []
    for i, (_, (a, b)) in enumerate(outputs):
        assert float(b) == float(a) + 1 == (X + i).sum() + 1
    assert compiled == ["step", "step.lazy"] and len(runs) == 3
    float(step(X[:2])[1][0])
    assert compiled == ["step", "step.lazy"] * 2 and len(runs) == 4


def test_the_function_is_traced_once():
    traces = []

    @jevt.jit
    def step(x):
        traces.append(x.shape)
        return x * 2, jevt.lazy(jnp.sin(x))

    for _ in range(2):
        step(X)[1].block_until_ready()
        step.compute_lazy(X)
    step.lower(X), step.trace(X), step.eval_shape(X), step.explain(X), jax.jit(step)(X)
    assert len(traces) == 1
    step(X[:3])[1].block_until_ready()
    step.compute_lazy(X[:3])
    assert len(traces) == 2
    step.clear_cache()
    step(X)
    assert len(traces) == 3


# Everything in one program


def test_compute_lazy():
    step = jevt.jit(make_step())
    want = jax.jit(make_step())(W, X, Y)
    for _ in range(2):  # a first call that computes everything must not settle the later ones
        with jevt.compute_lazy():
            out = step(W, X, Y)
        assert is_lazy(out) == [False] * 3
        close(out, want)
        assert is_lazy(step(W, X, Y)) == [False, True, True]
        assert is_lazy(step.compute_lazy(W, X, Y)) == [False] * 3
        with jevt.compute_lazy(), jevt.compute_lazy(False):
            assert is_lazy(step(W, X, Y)) == [False, True, True]


def test_training_loop_that_logs_now_and_then():
    def run(step, every):
        w, losses = W, []
        for i in range(6):
            with jevt.compute_lazy(i % every == 0):
                w, metrics = step(w, X, Y)
            if i % every == 0:
                losses.append(float(metrics["loss"]))
        return w, losses

    w, losses = run(jevt.jit(make_step(), donate_argnums=()), 3)
    want_w, want = run(jax.jit(make_step()), 3)
    close((w, np.array(losses)), (want_w, np.array(want)))


def test_outputs_that_the_step_computes_anyway_are_arrays():
    def step(w, x):
        y = jnp.sin(x @ w)
        norm = jnp.sqrt((y * y).sum())
        return y / norm, jevt.lazy(norm), jevt.lazy(jnp.sqrt((y * y).sum())), jevt.lazy(norm + 1)

    out = jevt.jit(step)(W, X)
    assert is_lazy(out) == [False, False, False, True]
    close(jax.device_get(out), jax.jit(step)(W, X))


def test_a_mark_inside_an_expression_is_computed():
    step = jevt.jit(lambda x: {"loss": jevt.lazy(x.sum()) * 2, "n": jevt.lazy(x.mean())})
    assert is_lazy(step(X)) == [False, True]
    close(jax.device_get(step(X)), {"loss": X.sum() * 2, "n": X.mean()})


def test_nothing_but_lazy_outputs():
    step = jevt.jit(lambda x: jevt.lazy(jnp.sin(x)))
    assert isinstance(step(X), jevt.LazyArray)
    close(step(X).value, jnp.sin(X))
    assert step.explain(X).lowered.eqns == []


# Effects


def test_effects_happen_once_and_in_the_step(capfd):
    @jevt.jit
    def step(x):
        total = x.sum()
        jax.debug.print("total {}", total)
        return x * 2, jevt.lazy(jnp.sin(total))

    _, a = step(X)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("total") == 1
    close(a.value, jnp.sin(X.sum()))
    jax.effects_barrier()
    assert capfd.readouterr().out == ""
    assert "sin" not in names(step.explain(X))


def test_outputs_that_depend_on_effects_are_computed_with_a_warning():
    calls = []

    def count(v):
        calls.append(1)
        return v

    @jevt.jit
    def step(x):
        y = jax.experimental.io_callback(count, jax.ShapeDtypeStruct((), jnp.float32), x.sum())
        return x * 2, jevt.lazy({"a": y + 1, "b": jnp.sin(x)})

    with pytest.warns(jevt.JevtWarning, match=r"result\[1\]\['a'\] of step .*io_callback at .*py"):
        out = step(X)
    assert is_lazy(out) == [False, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = step(X)
    jax.block_until_ready(out)
    assert calls == [1, 1]


def test_mutable_arrays():
    @jevt.jit
    def step(ref, x):
        ref[...] += x
        return jevt.lazy((ref[...] * 2, x.sum()))

    ref = jax.new_ref(jnp.ones(3))
    with pytest.warns(jevt.JevtWarning, match=r"depends on"):
        doubled, total = step(ref, jnp.ones(3))
    ref[...] = jnp.zeros(3)
    close(doubled, 4 * jnp.ones(3))
    assert isinstance(total, jevt.LazyArray) and total == 3


# The rest of a train step


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(nn.gelu(x)))


@pytest.mark.parametrize("accumulate", [False, True])
def test_flax_with_gradient_accumulation(accumulate):
    net, optimizer = Net(), optax.sgd(1e-2, momentum=0.9)
    variables = net.init(jax.random.key(0), X, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    batches = (jnp.stack([X, X + 1]), jnp.stack([Y, Y]))

    def make(mark):
        def loss_fn(params, stats, key, x, y):
            variables = {"params": params, "batch_stats": stats}
            logits, new = net.apply(
                variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, (new["batch_stats"], {"loss": loss, "top": (logits.argmax(-1) == y).sum()})

        def step(params, stats, opt_state, key, xs, ys):
            differentiate = jax.grad(loss_fn, has_aux=True)

            def micro(carry, batch):
                total, stats = carry
                gradient, (stats, metrics) = differentiate(params, stats, key, *batch)
                return (jax.tree.map(jnp.add, total, gradient), stats), metrics

            if accumulate:
                zeros = jax.tree.map(jnp.zeros_like, params)
                (gradient, stats), metrics = lax.scan(micro, (zeros, stats), (xs, ys))
                metrics = jax.tree.map(jnp.mean, metrics)
            else:
                gradient, (stats, metrics) = differentiate(params, stats, key, xs[0], ys[0])
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            metrics["norm"] = optax.tree.norm(gradient)
            return optax.apply_updates(params, updates), stats, opt_state, mark(metrics)

        return step

    args = (params, stats, optimizer.init(params), jax.random.key(1), *batches)
    step = jevt.jit(make(jevt.lazy))
    got, want = step(*args), jax.jit(make(lambda x: x))(*args)
    assert not any(is_lazy(got[:-1])) and is_lazy(got[-1]) == [True] * 3
    close(got[:-1], want[:-1])
    close(jax.device_get(got[-1]), want[-1])
    reduced, whole = str(step.explain(*args).stage("dce").jaxpr), str(step.trace(*args).jaxpr)
    for primitive in ("argmax", "= log ", "= sqrt "):
        assert primitive in whole
    assert "argmax" not in reduced and "= log " not in reduced


@pytest.mark.parametrize("name", ["lstm", "gpt_checkpointed"])
def test_losses_of_models(name):
    fun, args = MODELS[name]()

    def marked(*args):
        return jax.tree.map(lambda x: jevt.lazy(x) if x.shape == () else x, fun(*args))

    got, want = jevt.jit(marked)(*args), jax.jit(fun)(*args)
    assert any(is_lazy(got))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=1e-2, atol=1e-3)


def test_value_and_grad_of_a_marked_loss():
    step = jevt.jit(jax.value_and_grad(lambda w: jevt.lazy(jnp.sum((X @ w) ** 2))))
    loss, gradient = step(W)
    assert isinstance(loss, jevt.LazyArray)
    close((loss.value, gradient), jax.value_and_grad(lambda w: jnp.sum((X @ w) ** 2))(W))


# What jax.jit promises


def test_dispatch_of_a_step_without_marks_is_in_cpp_whatever_was_called_before():
    step = jevt.jit(lambda x: x + 1)
    with jevt.compute_lazy():
        step(X)
    step.compute_lazy(X)
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code) if event == "call" else None)
    try:
        step(X)
    finally:
        sys.setprofile(None)
    assert [c for c in seen if "jax" in c.co_filename or "jevt" in c.co_filename] == []


def test_program_of_a_step_with_marks_is_dispatched_in_cpp():
    """Python puts the lazy arrays into the result; JAX's Python is not involved."""
    step = jevt.jit(make_step())
    step(W, X, Y)
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code) if event == "call" else None)
    try:
        step(W, X, Y)
    finally:
        sys.setprofile(None)
    assert not {c.co_name for c in seen} & {"_infer_params", "cache_miss", "_run_python_pjit"}


def test_functions_can_be_freed():
    def make():
        step = jevt.jit(make_step())
        float(step(W, X, Y)[1]["loss"])
        return weakref.ref(jevt.last_trace(step).stages[1].jaxpr), weakref.ref(step)

    references = make()
    jax.clear_caches()
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_errors_leave_nothing():
    step = jevt.jit(make_step(), donate_argnums=0)
    w = W + 0
    step(w, X, Y)
    with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
        step(w, X, Y)
    with pytest.raises(TypeError, match=r"type <class 'str'>.*path x"):
        step(W + 0, "text", Y)
    with pytest.raises(TypeError):
        step(W + 0, np.array(["text"]), Y)
    close(step(W + 0, X, Y)[0], make_step()(W, X, Y)[0])


def test_strict_applies_to_the_second_program(monkeypatch):
    def broken(jaxpr):
        raise IndexError("a defect")

    step = jevt.jit(make_step(), strict=True)
    _, metrics = step(W, X, Y)
    monkeypatch.setattr(jevt.pipeline, "GRAPH_PASSES", (("broken", broken),))
    with pytest.raises(IndexError, match="a defect"):
        float(metrics["loss"])
    monkeypatch.undo()
    assert float(metrics["loss"]) > 0
