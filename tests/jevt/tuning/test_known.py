"""Measured times replace predicted ones: they flip decisions and choose configurations."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from partitions import context, trace

import jevt
from jevt.lowering import emit
from jevt.partition import format_plan, from_json, partition, summary, to_json
from jevt.tuning import improve, known
from jevt_kernels import launch
from jevt_kernels.tuning import Record, Snapshot, offered

X = jnp.ones((4096, 1024))


def softmax(x):
    return jax.nn.softmax(x)


def doubled(x):
    return x * 2 + 1


def snapshot(group, record):
    return Snapshot.of({known.key(group.spec, group.jaxpr): record}, None)


def planned(function, *arguments, backend="auto", **fields):
    return partition(trace(function, *arguments)[0], context(backend, **fields))


def only(plan):
    (group,) = plan.groups
    return group


def with_record(function, record, backend="auto", x=X):
    """The group before and after; ``record`` may be a function of the group."""
    before = only(planned(function, x, backend=backend))
    made = record(before) if callable(record) else record
    return before, only(planned(function, x, backend=backend, known=snapshot(before, made)))


def second(group):
    return offered(group.spec)[1]


def same(one, two):
    """Whether groups are the same but for the names of their kernels."""
    renamed = dataclasses.replace(one.spec, name=two.spec.name)
    return dataclasses.replace(one, jaxpr=two.jaxpr, spec=renamed) == two


def test_a_measured_loss_leaves_a_group_to_xla():
    before, after = with_record(softmax, lambda g: Record(second(g), 30.0, 20.0))
    assert before.target == "triton" and before.measured_us is None
    assert after.target == "xla"
    assert after.reason == "measured: 30.0 µs as a kernel, 20.0 µs as XLA runs it"
    assert not after.fallback
    assert (after.measured_us, after.config) == (20.0, None)
    assert after.predicted_us == after.xla_us == before.xla_us


def test_a_measured_gain_makes_a_group_a_kernel():
    before, after = with_record(doubled, lambda g: Record(second(g), 10.0, 20.0))
    assert before.target == "xla" and before.reason.startswith("cost model: ")
    assert (after.target, after.reason) == ("triton", "")
    assert after.measured_us == 10.0
    assert after.config == second(before)


def test_a_tie_is_the_kernels():
    assert with_record(softmax, lambda g: Record(second(g), 20.0, 20.0))[1].target == "triton"


def test_without_xlas_time_predictions_decide_and_the_configuration_stays():
    _, after = with_record(softmax, lambda g: Record(second(g), 30.0, None))
    assert (after.target, after.measured_us, after.config) == ("triton", 30.0, second(after))
    before, after = with_record(doubled, lambda g: Record(second(g), 30.0, None))
    assert same(after, before)


def test_backend_triton_takes_the_configuration_whatever_is_faster():
    _, after = with_record(softmax, lambda g: Record(second(g), 30.0, 20.0), backend="triton")
    assert (after.target, after.measured_us, after.config) == ("triton", 30.0, second(after))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_kernel_without_right_results_is_a_fallback(backend):
    _, after = with_record(softmax, Record(None, None, 20.0, "wrong: output 0"), backend=backend)
    assert (after.target, after.reason) == ("xla", "measured: wrong: output 0")
    assert after.fallback


def test_what_the_mainloop_does_not_offer_is_not_run():
    def foreign(group):
        return Record(dataclasses.replace(second(group), num_warps=16, num_stages=7), 1.0, 2.0)

    before, after = with_record(softmax, foreign)
    assert same(after, before)


def test_backends_that_run_no_kernels_ask_for_no_times():
    _, after = with_record(softmax, lambda g: Record(second(g), 1.0, 9.0), backend="xla")
    assert (after.target, after.measured_us) == ("xla", None)


def test_other_shapes_and_programs_have_other_times():
    def of(function, *arguments):
        group = only(planned(function, *arguments, backend="triton"))
        return known.key(group.spec, group.jaxpr)

    keys = {of(softmax, X), of(softmax, X[1:]), of(softmax, X.astype(jnp.bfloat16)), of(doubled, X)}
    assert len(keys) == 4
    assert of(softmax, X) == of(jax.nn.softmax, X)


def test_equal_layers_share_a_time():
    def twice(x):
        return jax.nn.softmax(jnp.sort(jax.nn.softmax(jnp.sort(x))))

    plan = planned(twice, X)
    kernels = [g for g in plan.groups if g.spec is not None]
    assert len(kernels) == 2
    assert len({known.key(g.spec, g.jaxpr) for g in kernels}) == 1
    slow = snapshot(kernels[0], Record(second(kernels[0]), 30.0, 20.0))
    after = planned(twice, X, known=slow)
    assert [g.target for g in after.groups if g.spec is not None] == ["xla", "xla"]


def test_plans_show_measured_times_and_survive_json():
    before, _ = with_record(softmax, Record(None, None, 1.0))
    plan = planned(softmax, X, known=snapshot(before, Record(second(before), 12.5, 20.0)))
    assert "12.5*" in format_plan(plan)
    after = from_json(to_json(plan), plan.jaxpr)
    assert only(after).config == second(before)
    assert to_json(after) == to_json(plan)
    lost = planned(softmax, X, known=snapshot(before, Record(second(before), 30.0, 20.0)))
    assert summary(lost)["xla"] == {"measured: XLA is faster": 1}


def test_contexts_differ_by_what_is_known():
    before, _ = with_record(softmax, Record(None, None, 1.0))
    one = context(known=snapshot(before, Record(None, None, 1.0)))
    assert one == context(known=snapshot(before, Record(None, None, 1.0)))
    assert hash(one) == hash(context(known=snapshot(before, Record(None, None, 1.0))))
    assert one != context(known=snapshot(before, Record(None, None, 2.0)))


def gelu_layer(x, w, b):
    h = x @ w + b
    return h, jax.nn.gelu(h, approximate=False)


LAYER = tuple(
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((16384, 1024), (1024, 4096), (4096,))
)


def parts(plan):
    return [(g.kind, g.target) for g in plan.groups]


def relu_layer(x, w, b):
    return jnp.maximum(x @ w + b, 0)


def test_what_is_to_be_measured_is_planned_though_predicted_to_be_slower():
    assert parts(planned(relu_layer, *LAYER)) == [("gemm", "xla")]
    assert parts(planned(relu_layer, *LAYER, tune=True)) == [("gemm", "triton")]
    assert parts(planned(doubled, X)) == [("pointwise", "xla")]
    assert parts(planned(doubled, X, tune=True)) == [("pointwise", "triton")]


@pytest.mark.parametrize("tune", [False, True])
def test_a_product_is_grouped_by_what_was_measured(tune):
    product = only(planned(gelu_layer, *LAYER, tune=True))
    config = offered(product.spec)[0]

    def told(kernel_us, xla_us):
        record = Record(config, kernel_us, xla_us)
        return planned(gelu_layer, *LAYER, tune=tune, known=snapshot(product, record))

    # cuBLAS, which adds the bias, and a kernel for the rest are predicted to take 298 µs
    assert parts(told(250.0, 400.0)) == [("gemm", "triton")]
    assert only(told(250.0, 400.0)).config == config
    assert parts(told(400.0, 250.0)) == [("gemm", "xla")]
    assert parts(told(500.0, 400.0)) == [("gemm", "xla"), ("pointwise", "triton")]


def told(monkeypatch, make):
    """Compilations know what ``make`` says of the one group of their program."""
    device = improve.consult("cpu", None, False)[0]

    def consult(platform, folder, tune):
        return dataclasses.replace(device, compute_capability=90), make(), False

    monkeypatch.setattr(improve, "consult", consult)


def kernel_equations(trace):
    return [e for e in trace.stages[-1].jaxpr.eqns if e.primitive is emit.kernel_p]


def test_the_stores_configuration_is_what_is_emitted(monkeypatch):
    x = jnp.ones((96, 128))
    group = only(planned(softmax, x, backend="triton"))
    config = second(group)
    told(monkeypatch, lambda: snapshot(group, Record(config, 1.0, 2.0)))
    trace = jevt.jit(softmax, backend="triton").explain(x)
    (equation,) = kernel_equations(trace)
    assert equation.params["config"] == config
    (text,) = trace.sources.values()
    assert text == launch.source_for(equation.params["spec"], config).text


@pytest.mark.cuda_lowering
def test_the_stores_configuration_is_what_is_launched(monkeypatch):
    x = jnp.ones((96, 128))
    group = only(planned(softmax, x, backend="triton"))
    config = second(group)
    assert config.num_warps != offered(group.spec)[0].num_warps
    told(monkeypatch, lambda: snapshot(group, Record(config, 1.0, 2.0)))
    called = []
    call = launch.call

    def spy(spec, *operands, **options):
        called.append(options["config"])
        return call(spec, *operands, **options)

    monkeypatch.setattr(launch, "call", spy)
    step = jevt.jit(softmax, backend="triton")
    text = step.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" in text
    assert called == [config, config]  # compiled beforehand, and in the program


@pytest.mark.interpret
def test_the_stores_configuration_computes_the_same(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (13, 50))
    group = only(planned(softmax, x, backend="triton"))
    told(monkeypatch, lambda: snapshot(group, Record(second(group), 1.0, 2.0)))
    step = jevt.jit(softmax, backend="interpret")
    np.testing.assert_allclose(step(x), jax.nn.softmax(x), rtol=1e-5, atol=1e-6)
    (equation,) = kernel_equations(jevt.last_trace(step))
    assert equation.params["config"] == second(group)
