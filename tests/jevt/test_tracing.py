from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevt import tracing


def traced_inside_jit(fun, *args, options=None, **kwargs):
    """What ``tracing.trace`` returns inside of an enclosing ``jax.jit``."""
    seen = []
    options = options or {}

    def wrapper(*args, **kwargs):
        seen.append(tracing.trace(fun, args, kwargs, options))
        return 0

    jax.jit(wrapper, **options).trace(*args, **kwargs)
    return seen[0]


def test_operands_are_constants_then_leaves():
    table = jnp.arange(3.0)
    traced = traced_inside_jit(
        lambda p, *, k: p["a"] + table * k, {"a": np.ones(3), "b": 2.0}, k=1.0
    )
    assert traced.jaxpr.consts == [] and len(traced.operands) == 4 == len(traced.jaxpr.invars)
    assert traced.operands[0] is table
    assert [v.aval.shape for v in traced.jaxpr.invars] == [(3,), (3,), (), ()]


def test_captured_tracers_are_operands():
    def outer(y):
        traced = tracing.trace(lambda: y * 2.0, (), {}, {})
        assert traced.operands == (y,)
        return jax.core.eval_jaxpr(traced.jaxpr, [], *traced.operands)[0]

    assert jax.jit(outer)(3.0) == 6.0
    assert jax.grad(outer)(3.0) == 2.0


def test_static_arguments_are_no_operands():
    traced = traced_inside_jit(
        lambda n, x, *, mode: x * n, 2, 3.0, mode="m",
        options={"static_argnums": 0, "static_argnames": "mode"},
    )  # fmt: skip
    assert len(traced.operands) == 1


def test_donated():
    traced = traced_inside_jit(
        lambda s, x, *, k: s, {"a": 1.0, "b": 2.0}, 3.0, k=4.0,
        options={"donate_argnums": 0, "donate_argnames": "k"},
    )  # fmt: skip
    assert traced.donated == (True, True, False, True)


def test_each_call_traces():
    calls = []

    def fun(x):
        calls.append(1)
        return x

    traced_inside_jit(fun, 1.0)
    traced_inside_jit(fun, 1.0)
    assert len(calls) == 2


def test_output_tree():
    traced = traced_inside_jit(lambda x: {"y": (x, None)}, 1.0)
    assert jax.tree.unflatten(traced.out_tree, [7]) == {"y": (7, None)}


def test_static_argument_with_a_tracer_in_it():
    class Bag:
        def __init__(self, value):
            self.value = value

    jax.tree_util.register_pytree_node(Bag, lambda b: ([b.value], None), lambda _, v: Bag(v[0]))

    def outer(y):
        return jax.jit(
            lambda bag, x: tracing.trace(lambda b, v: v, (bag, x), {}, {"static_argnums": 0}),
            static_argnums=0,
        )(Bag(y), 1.0)

    with pytest.raises(TypeError, match="expected 1 arrays among the arguments, got 2"):
        jax.jit(outer)(2.0)
