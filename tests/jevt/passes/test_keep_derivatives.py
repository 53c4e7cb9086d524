"""Derivatives of activations are kept where that spares the backward pass their arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewriting import cleaned, count, evaluate, traced

from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.passes import canonicalize, cse, dce, keep_derivatives

CUDA = Context("cuda", "auto", False, (), DEVICES["H100"])
M, K, N = 6, 5, 7

gelu = functools.partial(jax.nn.gelu, approximate=False)
TAKEN = {
    "gelu": gelu,
    "gelu by tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "mish": jax.nn.mish,
    "scaled": lambda x: 3.0 * gelu(x / 2.0) - 1.0,
    "negative": lambda x: -jax.nn.silu(-x),
}
#: Their derivatives follow from what the next product reads, or cost next to nothing.
LEFT = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "square": jnp.square}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Gradients of any size are large."""
    monkeypatch.setattr(keep_derivatives, "LEAST_BYTES", 0)


def layers(activation, x, w, b, v):
    """Two layers, in the type of the weights."""
    return activation(x @ w + b) @ v


def gradients(activation, *args):
    def loss(*args):
        return jnp.square(
            layers(activation, *args).astype(jnp.promote_types(jnp.float32, args[0].dtype))
        ).sum()

    return jax.grad(loss, argnums=tuple(range(len(args))))(*args)


def arrays(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = (M, K), (K, N), (N,), (N, K)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def before(fun, *args):
    jaxpr = traced(fun, *args)
    for graph_pass in (canonicalize.run, cse.run, dce.run):
        jaxpr = graph_pass(jaxpr)
    return jaxpr


def kept(jaxpr, context=CUDA):
    """The jaxpr after the pass, which is well-typed and idempotent."""
    return cleaned(functools.partial(keep_derivatives.run, context=context), jaxpr, dce.run)


def errors(results, exact):
    return [
        np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        for got, want in zip(results, exact, strict=True)
    ]


def exactly(fun, args):
    with jax.enable_x64(True):
        exact = fun(*(jnp.asarray(np.asarray(a, np.float64)) for a in args))
        return [np.asarray(r, np.float64) for r in jax.tree.leaves(exact)]


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kept(name, dtype):
    fun = functools.partial(gradients, TAKEN[name])
    args = arrays(dtype)
    after = kept(before(fun, *args))
    assert count(after, "optimization_barrier") == 1
    ours, theirs = evaluate(after, *args), jax.jit(fun)(*args)
    exact = exactly(fun, args)
    for mine, other in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert mine <= max(2e-2, 1.5 * other)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wider_types_are_left_alone(dtype):
    with jax.enable_x64(dtype == "float64"):
        jaxpr = before(functools.partial(gradients, gelu), *arrays(dtype))
        assert kept(jaxpr) == jaxpr


def test_the_backward_pass_only_multiplies():
    after = kept(before(functools.partial(gradients, gelu), *arrays()))
    (barrier,) = (e for e in after.eqns if e.primitive is lax.optimization_barrier_p)
    readers = [e for e in after.eqns if barrier.outvars[0] in e.invars]
    products = [e.outvars[0] for e in after.eqns if e.primitive is lax.dot_general_p]
    assert [e.primitive.name for e in readers] == ["mul"]
    assert any(readers[0].invars[0] is var for var in products)
    assert count(after, "erfc") == 1


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    jaxpr = before(functools.partial(gradients, LEFT[name]), *arrays())
    assert kept(jaxpr) == jaxpr


def test_what_is_read_as_before_is_not_kept_beside_it():
    """What the activation read is needed for another gradient."""

    def fun(x, w, b, v):
        def loss(x, w, b, v):
            h = x @ w + b
            y = (gelu(h) @ v).astype(jnp.float32)
            return jnp.square(y).sum() * jnp.square(h.astype(jnp.float32)).mean()

        return jax.grad(loss, argnums=(0, 1))(x, w, b, v)

    jaxpr = before(fun, *arrays())
    assert kept(jaxpr) == jaxpr


def test_what_is_an_output_is_not_kept():
    def fun(*args):
        return gradients(gelu, *args), args[0] @ args[1]

    jaxpr = before(fun, *arrays())
    assert kept(jaxpr) == jaxpr


def test_two_layers_keep_two():
    def fun(x, w, b, v):
        def loss(x, w, b, v):
            y = layers(gelu, x, w, b, v)
            return jnp.square(layers(jax.nn.silu, y, w, b, v).astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(x, w, b, v)

    args = arrays()
    after = kept(before(fun, *args))
    assert count(after, "optimization_barrier") == 2
    exact = exactly(fun, args)
    for mine, other in zip(
        errors(evaluate(after, *args), exact), errors(jax.jit(fun)(*args), exact), strict=True
    ):
        assert mine <= max(2e-2, 1.5 * other)


def test_wider_derivatives_are_not_kept():
    """A derivative of 32 bits is more than the product of 16 that it is made of."""

    def wide(x):
        return gelu(x.astype(jnp.float32))

    def fun(x, w, b, v):
        def loss(x, w, b, v):
            return jnp.square(wide(x @ w + b) @ v.astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(x, w, b, v)

    args = arrays()
    after = kept(before(fun, *args))
    wider = [
        e
        for e in after.eqns
        if e.primitive is lax.optimization_barrier_p and e.outvars[0].aval.dtype == jnp.float32
    ]
    assert not wider


def test_small_gradients(monkeypatch):
    monkeypatch.setattr(keep_derivatives, "LEAST_BYTES", 1 << 20)
    jaxpr = before(functools.partial(gradients, gelu), *arrays())
    assert kept(jaxpr) == jaxpr


def test_automatic_partitioning():
    jaxpr = before(functools.partial(gradients, gelu), *arrays())
    assert kept(jaxpr, dataclasses.replace(CUDA, partitioned=True)) == jaxpr


def test_the_body_of_a_loop():
    def fun(x, w, b, v):
        def step(x, _):
            return x - 0.01 * gradients(gelu, x, w, b, v)[0], None

        return lax.scan(step, x, None, length=3)[0]

    args = arrays()
    after = kept(before(fun, *args))
    assert count(after, "optimization_barrier") == 1
    (error,) = errors(evaluate(after, *args), [np.asarray(jax.jit(fun)(*args), np.float64)])
    assert error < 1e-2


def calls(function, *args):
    """How many Python calls a function makes."""
    number = itertools.count()
    sys.setprofile(lambda frame, event, _: event == "call" and next(number))
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return next(number)


def test_time_is_proportional_to_the_number_of_layers():
    def layers(number, x, w):
        for _ in range(number):
            x = x + jax.nn.silu(x @ w) * (x @ w)
        return jnp.square(x).sum()

    def deep(number):
        args = (jnp.ones((2, 2), jnp.bfloat16),) * 2
        return traced(jax.grad(functools.partial(layers, number)), *args)

    few, many = (calls(kept, deep(number)) for number in (5, 40))
    assert many < 10 * few
