from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jevt.passes import expose_random_bits, inline

KEY = jax.random.key(42)


def run(fun, *args):
    jaxpr = inline.run(jax.make_jaxpr(fun)(*args))
    return jaxpr, expose_random_bits.run(jaxpr)


def primitives(jaxpr):
    return {e.primitive.name for e in jaxpr.eqns}


def same(before, after, *args):
    want = jax.core.eval_jaxpr(before, before.consts, *args)
    got = jax.core.eval_jaxpr(after, after.consts, *args)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("shape", [(1024,), (64, 17), (2, 3, 5, 7, 11), (1, 2048, 1)])
def test_same_bits(width, shape):
    with jax.enable_x64(True):
        dtype = jnp.dtype(f"uint{width}")
        before, after = run(lambda k: jax.random.bits(k, shape, dtype), KEY)
        assert "random_bits" in primitives(before) and "random_bits" not in primitives(after)
        assert {"threefry2x32", "iota"} <= primitives(after)
        assert "iota_2x32_shape" not in primitives(after)
        same(before, after, KEY)


@pytest.mark.parametrize(
    "draw",
    [
        lambda k: jax.random.bernoulli(k, 0.3, (64, 32)),
        lambda k: jax.random.normal(k, (64, 32), jnp.bfloat16),
        lambda k: jax.random.uniform(jax.random.fold_in(k, 3), (2000,)),
        lambda k: jax.random.randint(jax.random.split(k)[1], (64, 32), 0, 10),
        lambda k: jax.random.categorical(k, jnp.zeros((64, 32))),
        lambda k: jax.random.permutation(k, 2000),
    ],
)
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_same_draws(draw, make_key):
    key = make_key(5)
    before, after = run(draw, key)
    assert "threefry2x32" in str(after)
    same(before, after, key)


def test_batches_of_keys():
    keys = jax.random.split(KEY, (2, 3))
    before, after = run(jax.vmap(jax.vmap(lambda k: jax.random.bits(k, (40, 10)))), keys)
    assert "threefry2x32" in primitives(after)
    same(before, after, keys)


def test_inside_loops():
    def f(key, x):
        def body(c, i):
            keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, c.shape)
            return jnp.where(keep, c * 2, c), ()

        return lax.scan(body, x, jnp.arange(4))[0]

    args = KEY, jnp.ones((64, 32))
    before, after = run(f, *args)
    (scan,) = [e for e in after.eqns if e.primitive.name == "scan"]
    assert "threefry2x32" in primitives(scan.params["jaxpr"])
    same(before, after, *args)


def test_wrapped_keys_are_unwrapped():
    _, after = run(lambda k: jax.random.bits(k, (64, 32)), jax.random.PRNGKey(0))
    assert "random_unwrap" not in primitives(after)


def test_what_stays():
    for fun, key in [
        (lambda k: jax.random.bits(k, (1023,)), KEY),
        (lambda k: jax.random.bits(k, (0, 4096)), KEY),
        (lambda k: jax.random.bits(k, (2048,)), jax.random.key(0, impl="rbg")),
        (lambda k: jax.random.bits(k, (2048,)), jax.random.key(0, impl="unsafe_rbg")),
        (jax.random.split, KEY),
    ]:
        before, after = run(fun, key)
        assert after is before
    with jax.threefry_partitionable(False):
        before, after = run(lambda k: jax.random.bits(k, (2048,)), KEY)
        assert after is before


def test_positions_beyond_32_bits_stay():
    jaxpr = jax.make_jaxpr(lambda k: jax.random.bits(k, (2**16, 2**16)))(KEY)
    assert expose_random_bits.run(inline.run(jaxpr)).eqns[-1].primitive.name == "random_bits"


def test_the_setting_of_the_trace_counts():
    with jax.threefry_partitionable(False):
        jaxpr = inline.run(jax.make_jaxpr(lambda k: jax.random.bits(k, (2048,)))(KEY))
    assert expose_random_bits.run(jaxpr) is jaxpr


def test_sources_and_scopes_are_the_users():
    def f(k):
        with jax.named_scope("dropout"):
            return jax.random.bits(k, (64, 32))

    _, after = run(f, KEY)
    assert all("dropout" in str(e.source_info.name_stack) for e in after.eqns)
    assert all(
        "test_expose_random_bits.py" in jax.extend.source_info_util.summarize(e.source_info)
        for e in after.eqns
    )
