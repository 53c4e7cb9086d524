"""The composite primitives of softmax: values, types, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from jevt.passes import expand_composites
from jevt.primitives.softmax import softmax_gradient_p, softmax_statistics_p


def bound(axes, guarded):
    """``(x, g) -> statistics and gradient`` by the primitives."""

    def fun(x, g):
        maximum, total = softmax_statistics_p.bind(x, axes=axes, guarded=guarded)
        return maximum, total, *softmax_gradient_p.bind(x, maximum, total, g, axes=axes)

    return fun


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 5, 8), (2,)), ((3, 1, 7), (0, 2)), ((4, 1), (1,)), ((0, 6), (1,))],
)
def test_values(shape, axes, guarded):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, g = (jnp.asarray(rng.standard_normal(shape) * 3, jnp.float64) for _ in range(2))
        fun = bound(axes, guarded)
        maximum, total, dx = results = fun(x, g)
        logsumexp = jax.nn.logsumexp(x, axes)
        np.testing.assert_allclose(maximum + jnp.log(total), logsumexp, rtol=1e-12)
        _, vjp = jax.vjp(lambda x: jax.nn.softmax(x, axes), x)
        np.testing.assert_allclose(dx, vjp(g)[0], rtol=1e-12, atol=1e-13)
        plain = jaxpr_as_fun(expand_composites.run(jax.make_jaxpr(fun)(x, g)))
        for got in (plain(x, g), jax.jit(fun)(x, g)):
            for a, b in zip(got, results, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("guarded", "want"), [(False, np.nan), (True, 0.0)])
def test_rows_of_infinities(guarded, want):
    x = jnp.full((2, 3), -jnp.inf)
    fun = bound((1,), guarded)
    plain = jaxpr_as_fun(expand_composites.run(jax.make_jaxpr(fun)(x, x)))
    for total in (fun(x, x)[1], plain(x, x)[1]):
        np.testing.assert_array_equal(total, [want, want])


def test_bfloat16_cotangents():
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((5, 8)), jnp.float32) for _ in range(2))
    fun = bound((1,), False)
    narrow = fun(x, g.astype(jnp.bfloat16))
    assert {r.dtype for r in narrow} == {jnp.dtype("float32")}
    np.testing.assert_allclose(narrow[2], fun(x, g)[2], atol=0.01)


def test_wrong_use():
    x, row = jnp.ones((4, 8)), jnp.ones(4)

    def bind(primitive, *args, axes=(1,), **options):
        return jax.make_jaxpr(lambda *args: primitive.bind(*args, axes=axes, **options))(*args)

    with pytest.raises(TypeError, match="float32 or float64, got bfloat16"):
        bind(softmax_statistics_p, x.astype(jnp.bfloat16), guarded=False)
    with pytest.raises(ValueError, match="expected ascending axes of 2"):
        bind(softmax_statistics_p, x, axes=(1, 0), guarded=False)
    with pytest.raises(ValueError, match="expected ascending axes of 2"):
        bind(softmax_gradient_p, x, row, row, x, axes=(2,))
    with pytest.raises(ValueError, match="expected statistics of shape"):
        bind(softmax_gradient_p, x, row[:3], row, x)
