from __future__ import annotations

import gc
import weakref

import attentions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var
from programs import F32, PROGRAMS, close
from small_models import MODELS

import jevt
from jevt import _config, pipeline
from jevt import _jax_internals as internals
from jevt.partition import Plan, partition


def context(jaxpr, *, backend="auto", platforms=("cpu",), strict=False, environment=None):
    options = _config.Options(backend, strict, environment or _config.Environment())
    return pipeline.make_context(options, platforms, (False,) * len(jaxpr.invars), False)


def traced(name):
    fun, args = PROGRAMS[name]
    return jax.make_jaxpr(fun)(*args), jax.tree.leaves(args)


@pytest.mark.parametrize("backend", ["auto", "xla", "triton"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_stage_computes_the_program(name, backend):
    jaxpr, args = traced(name)
    trace = pipeline.compile(jaxpr, context(jaxpr, backend=backend))
    want = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)
    for stage in trace.stages:
        if stage.name != "partition":  # its constants are inputs
            close(jax.core.eval_jaxpr(stage.jaxpr, stage.jaxpr.consts, *args), want)


def test_stages():
    jaxpr, _ = traced("mlp_step")
    trace = pipeline.compile(jaxpr, context(jaxpr), name="mlp")
    names = [stage.name for stage in trace.stages]
    passes = [name for name, _ in pipeline.graph_passes(trace.context)]
    assert names == ["trace", *passes, "partition", "lower"]
    assert trace.stages[0].milliseconds == 0
    assert all(stage.milliseconds > 0 for stage in trace.stages[1:])
    assert trace.milliseconds == sum(s.milliseconds for s in trace.stages)
    assert isinstance(trace.plan, Plan) and trace.plan.groups
    assert trace.stage("partition").jaxpr is trace.plan.jaxpr
    assert trace.lowered is trace.stage("lower").jaxpr
    last = max(i for i, name in enumerate(names) if name == "dce")
    assert trace.stage("dce") is trace.stages[last]
    with pytest.raises(KeyError, match="the stages are trace, inline"):
        trace.stage("fuse")


def test_every_equation_is_in_one_group():
    for name in PROGRAMS:
        jaxpr, _ = traced(name)
        plan = pipeline.compile(jaxpr, context(jaxpr)).plan
        positions = sorted(i for g in plan.groups for i in g.eqns)
        assert positions == list(range(len(plan.jaxpr.eqns)))


def test_cached_by_jaxpr_and_context():
    jaxpr, _ = traced("layer_norm")
    first = pipeline.compile(jaxpr, context(jaxpr))
    assert pipeline.compile(jaxpr, context(jaxpr)) is first
    assert pipeline.compile(jaxpr, context(jaxpr, backend="xla")) is not first
    equal = jaxpr.replace(eqns=list(jaxpr.eqns))
    assert pipeline.compile(equal, context(jaxpr)) is not first


def test_cache_is_weak():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) * 2)(1.0)
    trace = weakref.ref(pipeline.compile(jaxpr, context(jaxpr)).stages[-1].jaxpr)
    assert trace() is not None
    del jaxpr
    jax.clear_caches()
    gc.collect()
    assert trace() is None


def test_constants_are_inputs_of_the_plan_and_constants_of_the_program():
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    inner = jax.jit(lambda v: v * jnp.asarray(table))
    jaxpr = jax.make_jaxpr(lambda x: inner(x) + 1.0)(F32)
    trace = pipeline.compile(jaxpr, context(jaxpr))
    assert len(trace.plan.jaxpr.invars) == 2 and not trace.plan.jaxpr.consts
    assert len(trace.lowered.invars) == 1 and len(trace.lowered.consts) == 1
    close(jax.core.eval_jaxpr(trace.lowered, trace.lowered.consts, F32), [F32 * table + 1])


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 5), (4, 0, 5), (4, 5, 0)])
def test_products_without_elements_on_a_gpu(m, k, n):
    def loss(x, y, w, v):
        total = x @ w + y @ v
        normal = (total - total.mean(0)) * jax.lax.rsqrt(total.var(0) + 1e-5)
        return jnp.sum(jax.nn.gelu(normal, approximate=False))

    shapes = (m, k), (m, 3), (k, n), (3, n)
    args = [np.ones(shape, jnp.bfloat16) for shape in shapes]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*args)
    cuda, program = context(jaxpr, platforms=("cuda",)), jaxpr
    for _, graph_pass in pipeline.graph_passes(cuda):
        program = graph_pass(program)
    plan = partition(program, cuda)
    for result in (program, plan.jaxpr):
        close(
            jax.core.eval_jaxpr(result, result.consts, *args),
            jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args),
        )


@pytest.mark.parametrize("name", ["lstm", "mixed_precision", "mixture_of_experts"])
def test_models_have_no_fallbacks(name):
    """Whatever is left to XLA in a usual step is left to it by decision."""
    fun, args = MODELS[name]()
    trace = jevt.jit(fun, backend="triton", strict=True).explain(*args)
    assert trace.warnings == ()
    assert [g for g in trace.plan.groups if g.target == "triton"]


def test_context():
    jaxpr, _ = traced("layer_norm")
    environment = _config.Environment(fuel=3, check=True)
    made = context(jaxpr, backend="triton", strict=True, environment=environment)
    assert (made.platform, made.backend, made.strict) == ("cpu", "triton", True)
    assert (made.fuel, made.check, made.partitioned) == (3, True, False)
    assert hash(made) == hash(
        context(jaxpr, backend="triton", strict=True, environment=environment)
    )
    several = context(jaxpr, backend="triton", platforms=("cpu", "cuda"))
    assert several.backend == "xla", "one text for several platforms holds no kernels"


def test_check_finds_an_ill_typed_result(monkeypatch):
    def wrong(jaxpr):
        (eqn,) = jaxpr.eqns
        too_large = Var(eqn.outvars[0].aval.update(shape=(9,)))
        return jaxpr.replace(eqns=[eqn.replace(outvars=[too_large])], outvars=[])

    jaxpr = jax.make_jaxpr(jnp.sin)(1.0)
    jaxpr = jaxpr.eqns[0].params["jaxpr"] if len(jaxpr.eqns[0].params) > 2 else jaxpr
    monkeypatch.setattr(pipeline, "GRAPH_PASSES", (("wrong", wrong),))
    with pytest.raises(AssertionError, match="JEVT_CHECK: pass 'wrong'"):
        pipeline.compile(jaxpr, context(jaxpr, environment=_config.Environment(check=True)))


def test_check_finds_nothing_wrong_with_right_stages(monkeypatch):
    monkeypatch.setenv("JEVT_CHECK", "1")
    for fun, args in map(PROGRAMS.get, ("layer_norm_grad", "scan_grad", "remat", "captured")):
        close(jevt.jit(fun, backend="xla")(*args), jax.jit(fun)(*args))


def test_control_flow_has_plans_of_its_own():
    jaxpr, _ = traced("scan")
    assert pipeline.compile(jaxpr, context(jaxpr)).plan.nested


@pytest.mark.cuda_lowering
def test_lowered_for_cuda_on_a_machine_without_a_gpu():
    f = jevt.jit(lambda x: jax.nn.softmax(x) * 2.0, backend="triton")
    text = f.trace(jnp.ones((256, 512))).lower(lowering_platforms=("cuda",)).as_text()
    trace = jevt.last_trace(f)
    assert trace.context.platform == "cuda"
    kernels = [g for g in trace.plan.groups if g.target == "triton"]
    assert [g.name for g in kernels] == list(trace.sources)
    assert len(kernels) == 1 and text.count("stablehlo.custom_call") == 1
    assert "@triton.jit" in trace.sources[kernels[0].name]
    # The same function for this machine's own platform is another compilation.
    close(f(F32), jax.jit(f.__wrapped__)(F32))
    assert jevt.last_trace(f).context.platform == jax.default_backend().replace("gpu", "cuda")


@pytest.mark.cuda_lowering
def test_attention_for_cuda(monkeypatch):
    """Forward and backward are one cuDNN call each; nothing of the scores' size is left."""
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    step = jevt.jit(attentions.training(attentions.einsum(softmax=attentions.in_float32)))
    args = attentions.operands(queries=64, keys=64, dtype=jnp.bfloat16)
    text = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax") == 2 and "64x64" not in text
    trace = jevt.last_trace(step)
    groups = [g for g in trace.plan.groups if g.kind == "attention"]
    assert [g.jaxpr.eqns[0].primitive.name for g in groups] == ["attention", "attention_backward"]
    assert [g.reason for g in groups] == [
        "one call: cuDNN's fused attention",
        "one call: cuDNN's fused attention, or a kernel of its own",
    ]
    assert not any(g.fallback for g in groups)
    assert "exp" not in [e.primitive.name for e in trace.plan.jaxpr.eqns]
    assert not trace.notes and not trace.warnings


@pytest.mark.cuda_lowering
def test_attention_that_stays_is_reported(monkeypatch):
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)
    step = jevt.jit(attentions.training(attentions.einsum()), strict=True)
    args = attentions.operands(queries=64, keys=64)
    text = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn" not in text
    trace = jevt.last_trace(step)
    note, softmax = trace.notes
    assert note.startswith("raise_attention: attention at ") and "this is float32" in note
    assert softmax == "raise_softmax: softmax: 1 forward, 1 backward"
    assert trace.stage("raise_attention").notes and f"# {note}" in str(trace)
