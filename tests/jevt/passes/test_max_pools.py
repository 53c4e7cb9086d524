"""Gradients of maximum pooling, written out: the same elements get the same gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from partitions import context
from rewriting import count, evaluate, near, rewritten, same, traced

from jevt.partition import partition
from jevt.passes import max_pools


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Arrays of any size are large enough."""
    monkeypatch.setattr(max_pools, "_SMALLEST", 0)


def pool(x, window, strides, padding, largest=True):
    beyond, choose = (-jnp.inf, lax.max) if largest else (jnp.inf, lax.min)
    return lax.reduce_window(x, np.array(beyond, x.dtype), choose, window, strides, padding)


def gradient(x, seed, *arguments):
    y, vjp = jax.vjp(lambda x: pool(x, *arguments), x)
    rng = np.random.default_rng(seed)
    return vjp(jnp.asarray(rng.standard_normal(y.shape), y.dtype))[0]


CASES = {
    "resnet": ((2, 9, 12, 3), (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))),
    "side by side": ((2, 32, 5), (1, 8, 1), (1, 8, 1), ((0, 0),) * 3),
    "what no window has": ((3, 11, 4), (1, 2, 1), (1, 4, 1), ((0, 0),) * 3),
    "overlapping": ((7, 6), (3, 4), (1, 1), ((2, 1), (0, 3))),
    "uneven padding": ((10, 3), (4, 1), (3, 1), ((0, 2), (0, 0))),
    "one window": ((4, 5), (4, 5), (1, 1), ((0, 0), (0, 0))),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, largest, dtype):
    shape, *arguments = CASES[name]
    with jax.enable_x64(dtype == jnp.float64):
        # Few different numbers: many windows have equal ones.
        numbers = np.random.default_rng(0).integers(-3, 4, shape)
        x = jnp.asarray(numbers, dtype)
        before = traced(lambda x: gradient(x, 1, *arguments, largest), x)
        after = rewritten(max_pools.run, before)
        assert count(before, "select_and_scatter_add") == 1
        assert count(after, "select_and_scatter_add") == 0 < count(after, "pool_gradient")
        near(evaluate(after, x), evaluate(before, x))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_pools_with_a_gradient(name, largest):
    """Their values are those of XLA's pools, NaN and infinities among them."""
    shape, *arguments = CASES[name]

    def both(x):
        y, vjp = jax.vjp(lambda x: pool(x, *arguments, largest), x)
        return y, *vjp(jnp.ones_like(y))

    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x.flat[::7], x.flat[3::11], x.flat[5::13] = np.nan, np.inf, -np.inf
    before = traced(both, x)
    after = rewritten(max_pools.run, before)
    assert count(after, "pool") == count(after, "pool_gradient") == 1
    same(evaluate(after, x)[:1], evaluate(before, x)[:1])


def test_pools_without_a_gradient_stay():
    shape, *arguments = CASES["resnet"]

    def fun(x):
        other = pool(x, (1, 2, 2, 1), *arguments[1:])
        return other, gradient(x, 1, *arguments), pool(x + 1, *arguments)

    after = rewritten(max_pools.run, traced(fun, jnp.ones(shape)))
    assert count(after, "reduce_window_max") == 2 and not count(after, "pool")


def test_infinities():
    x = jnp.asarray([[-np.inf] * 4, [1.0, np.inf, np.inf, 2.0], [-np.inf, -np.inf, 3.0, np.inf]])
    before = traced(lambda x: gradient(x, 0, (1, 2), (1, 2), ((0, 0), (0, 0))), x)
    after = rewritten(max_pools.run, before)
    near(evaluate(after, x), evaluate(before, x))


def test_in_the_body_of_a_loop():
    def loss(x):
        def layer(x, _):
            y = pool(x, (1, 3), (1, 1), ((0, 0), (1, 1)))
            return jnp.sin(y), None

        return lax.scan(layer, x, length=2)[0].sum()

    x = jnp.linspace(0, 9, 24).reshape(4, 6)
    before = traced(jax.grad(loss), x)
    after = rewritten(max_pools.run, before)
    assert count(before, "select_and_scatter_add") > 0
    assert count(after, "select_and_scatter_add") == 0
    near(evaluate(after, x), evaluate(before, x))


def test_it_is_a_call_of_its_own():
    """No group takes a part of it: its arrays of one term each would be stored."""
    shape, *arguments = CASES["resnet"]

    def masked(x):
        return jnp.where(x > 0, gradient(x, 1, *arguments), 0).sum(0)

    jaxpr = max_pools.run(traced(masked, jnp.ones(shape)))
    groups = partition(jaxpr, context("auto")).groups
    (pool,) = (g for g in groups if count(g.jaxpr, "pool_gradient"))
    assert pool.target == "xla" and len(pool.eqns) == 1 and "XLA" in pool.reason
    assert not pool.fallback


def test_left_alone(monkeypatch):
    def of(shape, *arguments, dtype=jnp.float32):
        return traced(lambda x: gradient(x, 1, *arguments), jnp.ones(shape, dtype))

    large = of((64,), (64,), (1,), ((0, 0),))
    assert max_pools.run(large) is large
    far = of((64, 64), (2, 2), (8, 8), ((0, 0), (0, 0)))
    assert max_pools.run(far) is far
    shape, *arguments = CASES["resnet"]
    narrow = of(shape, *arguments, dtype=jnp.float8_e5m2)
    assert max_pools.run(narrow) is narrow
    monkeypatch.setattr(max_pools, "_SMALLEST", 1 << 20)
    small = of(shape, *arguments)
    assert max_pools.run(small) is small
