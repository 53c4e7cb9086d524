"""The composite primitives of norms: values, types, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from jevt.passes import expand_composites
from jevt.primitives.norms import name_of, norm_gradient_p, norm_statistics_p


def bound(centred, axes, scale_shape, summed=None):
    """``(x, g, scale) -> statistics, gradient and its sums`` by the primitives."""

    def fun(x, g, scale):
        options = {"axes": axes, "centred": centred, "two_pass": True}
        statistics = norm_statistics_p.bind(x, epsilon=1e-5, **options)
        known = (statistics[0], statistics[2]) if centred else (statistics[1],)
        options["summed"] = axes if summed is None else summed
        rest = norm_gradient_p.bind(x, *known, g, scale.reshape(scale_shape), **options)
        return *statistics, *rest

    return fun


def formula(centred, axes, x, scale):
    mean = x.mean(axes, keepdims=True) if centred else 0.0
    square = ((x - mean) ** 2).mean(axes, keepdims=True)
    return (x - mean) / jnp.sqrt(square + 1e-5) * scale


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("shape", "axes", "scale_shape", "summed"),
    [
        ((3, 5, 8), (2,), (1, 1, 8), (2,)),
        ((3, 5, 8), (0, 1), (1, 1, 8), (0, 1)),
        ((3, 1, 7, 2, 4), (1, 2, 4), (1, 1, 1, 2, 4), (1, 2, 4)),
        ((3, 1, 7, 2, 4), (1, 2, 4), (1, 1, 1, 2, 4), (1, 2)),
        ((3, 6, 8), (1, 2), (1, 6, 8), (1,)),
        ((4, 6), (1,), (1, 1), (1,)),
        ((0, 6), (1,), (1, 6), (1,)),
    ],
)
def test_values(centred, shape, axes, scale_shape, summed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, g, scale = (
            jnp.asarray(rng.standard_normal(s) + 0.5, jnp.float64)
            for s in (shape, shape, (int(np.prod(scale_shape)),))
        )
        fun = bound(centred, axes, scale_shape, summed)
        results = fun(x, g, scale)
        _, vjp = jax.vjp(lambda x: formula(centred, axes, x, scale.reshape(scale_shape)), x)
        dx = results[3 if centred else 2]
        np.testing.assert_allclose(dx, vjp(g)[0], rtol=1e-12, atol=1e-13)
        kept = np.asarray(scale).reshape(scale_shape)
        scaled = g * kept if any(kept.shape[a] > 1 for a in summed) else g
        c = x - x.mean(axes, keepdims=True) if centred else x
        sums = [scaled.sum(summed), (scaled * c).sum(summed)][not centred :]
        for got, want in zip(results[-len(sums) :], sums, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
        jaxpr = jax.make_jaxpr(fun)(x, g, scale)
        plain = jaxpr_as_fun(expand_composites.run(jaxpr))
        for got in (plain(x, g, scale), jax.jit(fun)(x, g, scale)):
            for a, b in zip(got, results, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_bfloat16_cotangents_and_scales():
    rng = np.random.default_rng(0)
    x, g, scale = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 8), (5, 8), (8,)))
    fun = bound(True, (1,), (1, 8))
    narrow = fun(x, g.astype(jnp.bfloat16), scale.astype(jnp.bfloat16))
    assert {r.dtype for r in narrow} == {jnp.dtype("float32")}
    np.testing.assert_allclose(narrow[3], fun(x, g, scale)[3], atol=0.05)


@pytest.mark.parametrize(
    ("shape", "axes", "centred", "name"),
    [
        ((4, 6, 8), (2,), True, "layer_norm"),
        ((4, 6, 8), (1, 2), True, "layer_norm"),
        ((4, 6, 8), (0, 1), True, "batch_norm"),
        ((4, 8, 6, 6), (0, 2, 3), True, "batch_norm"),
        ((4, 6, 6, 2, 4), (1, 2, 4), True, "group_norm"),
        ((4, 6, 8), (2,), False, "rms_norm"),
    ],
)
def test_names(shape, axes, centred, name):
    assert name_of(shape, axes, centred=centred) == name


def test_wrong_use():
    x, row = jnp.ones((4, 8)), jnp.ones(4)
    options = {"axes": (1,), "centred": True, "two_pass": True}

    def bind(primitive, *args, **changed):
        return jax.make_jaxpr(lambda *args: primitive.bind(*args, **{**options, **changed}))(*args)

    with pytest.raises(TypeError, match="float32 or float64, got bfloat16"):
        bind(norm_statistics_p, x.astype(jnp.bfloat16), epsilon=0.0)
    with pytest.raises(ValueError, match="ascending order expected"):
        bind(norm_statistics_p, x, epsilon=0.0, axes=(1, 0))
    with pytest.raises(ValueError, match="expected statistics of shape"):
        bind(norm_gradient_p, x, row[:3], row, x, summed=(1,))
    with pytest.raises(ValueError, match="expected a scale that broadcasts"):
        bind(norm_gradient_p, x, row, row, x, jnp.ones(8), summed=(1,))
    with pytest.raises(ValueError, match="over some of the axes"):
        bind(norm_gradient_p, x, row, row, x, summed=(0,))
