"""What every pass promises: same values and types, and nothing left for a second run."""

from __future__ import annotations

import jax
import jax.extend
import numpy as np
import pytest
from jax.extend.core import Jaxpr
from programs import PROGRAMS, close

from jevt import pipeline

PASSES = dict(pipeline.GRAPH_PASSES)


def evaluate(jaxpr: Jaxpr, *args):
    return jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)


def traced(name):
    fun, args = PROGRAMS[name]
    return jax.make_jaxpr(fun)(*args), jax.tree.leaves(args)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("pass_name", PASSES)
def test_alone(pass_name, name):
    jaxpr, args = traced(name)
    result = PASSES[pass_name](jaxpr)
    jax.extend.core.check_jaxpr(result)
    assert result.out_avals == jaxpr.out_avals
    assert result.in_avals == jaxpr.in_avals
    close(evaluate(result, *args), evaluate(jaxpr, *args))


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_order(name):
    jaxpr, args = traced(name)
    want = evaluate(jaxpr, *args)
    for pass_name, graph_pass in pipeline.GRAPH_PASSES:
        jaxpr = graph_pass(jaxpr)
        jax.extend.core.check_jaxpr(jaxpr)
        close(evaluate(jaxpr, *args), want)
        again = graph_pass(jaxpr)
        assert str(again) == str(jaxpr), f"{pass_name} is not idempotent"


@pytest.mark.parametrize("name", PROGRAMS)
def test_second_run_has_nothing_to_do(name):
    jaxpr, _ = traced(name)
    for _ in range(3):
        previous = jaxpr
        for _, graph_pass in pipeline.GRAPH_PASSES:
            jaxpr = graph_pass(jaxpr)
    assert jaxpr is previous or len(jaxpr.eqns) == len(previous.eqns)


@pytest.mark.parametrize("pass_name", PASSES)
def test_nothing_to_do_returns_the_same_object(pass_name):
    jaxpr = jax.make_jaxpr(lambda x, y: (x + y) * x)(1.0, 2.0)
    assert PASSES[pass_name](jaxpr) is jaxpr


@pytest.mark.parametrize("pass_name", PASSES)
def test_effects_stay_and_keep_their_order(pass_name):
    def f(x):
        for i in range(3):
            jax.debug.print("{} {}", i, x, ordered=True)
            x = jax.jit(lambda v: v + 1.0)(x)
        return x

    jaxpr = jax.make_jaxpr(f)(1.0)
    result = PASSES[pass_name](jaxpr)
    assert result.effects == jaxpr.effects
    prints = [e for e in result.eqns if e.effects]
    assert [e.invars[0].val for e in prints] == [0, 1, 2]


@pytest.mark.parametrize("pass_name", PASSES)
def test_names_and_settings_stay(pass_name):
    @jax.jit
    def inner(x):
        with jax.named_scope("inner_scope"):
            return jnp_sin(x) + 1.0

    def f(x):
        with jax.named_scope("outer_scope"), jax.default_matmul_precision("float32"):
            return inner(x @ x)

    jnp_sin = jax.numpy.sin
    jaxpr = jax.make_jaxpr(f)(np.ones((4, 4), np.float32))
    result = pipeline.GRAPH_PASSES[0][1](jaxpr)
    result = PASSES[pass_name](result)
    stacks = [str(e.source_info.name_stack) for e in result.eqns]
    assert stacks == ["outer_scope"] + ["outer_scope/jit(inner)/inner_scope"] * 2
    assert "test_all_passes.py" in jax.extend.source_info_util.summarize(result.eqns[1].source_info)


def test_linear_time():
    """Twice the equations, about twice the time."""
    import time

    def f(n):
        def step(x, key):
            for i in range(n):
                x = jax.nn.gelu(x) * (i % 7 + 0.5) + jax.nn.softmax(x)
                x = jax.numpy.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)
            return x

        jaxpr = jax.make_jaxpr(step)(np.ones((32, 64), np.float32), jax.random.key(0))
        start = time.perf_counter()
        for _, graph_pass in pipeline.GRAPH_PASSES:
            jaxpr = graph_pass(jaxpr)
        return time.perf_counter() - start, len(jaxpr.eqns)

    f(2)
    (short, few), (long, many) = f(20), f(80)
    assert many > 3.5 * few
    assert long < 3 and long < 12 * short + 0.2
