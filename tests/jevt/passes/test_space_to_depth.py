"""Strided convolutions of images become products or convolutions of cells; others stay."""

from __future__ import annotations

import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from partitions import context
from rewriting import count, evaluate, near, rewritten, traced

from jevt import pipeline
from jevt.passes import space_to_depth


def array(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def convolution(strides, padding="VALID", numbers=("NHWC", "HWIO", "NHWC"), **params):
    def function(x, w):
        return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **params)

    return function


def with_gradient(function):
    """The result, and the weights' gradient of something that reads all of it."""

    def step(x, w):
        out, pullback = jax.vjp(lambda w: function(x, w), w)
        return out, *pullback(jnp.cos(out))

    return step


PATCHES = {
    "of images": (convolution((14, 14)), array((2, 28, 42, 3)), array((14, 14, 3, 8)) / 32),
    "with a rest": (convolution((4, 2)), array((2, 31, 9, 3)), array((4, 2, 3, 5))),
    "cropped": (convolution((4, 4), ((0, -3), (0, 0))), array((2, 15, 8, 3)), array((4, 4, 3, 5))),
    "rows of no multiple": (convolution((3, 3)), array((2, 9, 9, 3)), array((3, 3, 3, 5))),
    "one window along an axis": (convolution((4, 8)), array((2, 12, 8, 3)), array((4, 8, 3, 5))),
    "window of one along an axis": (convolution((4, 1)), array((2, 12, 5, 3)), array((4, 1, 3, 5))),
    "features first in the image": (
        convolution((4, 2), numbers=("NCHW", "OIHW", "NHWC")),
        array((2, 3, 12, 8)),
        array((5, 3, 4, 2)),
    ),
    "signals": (
        convolution((4,), numbers=("NWC", "WIO", "NWC")),
        array((3, 21, 1)),
        array((4, 1, 6)),
    ),
    "volumes": (
        convolution((2, 3, 2), numbers=("NDHWC", "OIDHW", "NDHWC")),
        array((2, 4, 6, 4, 3)),
        array((5, 3, 2, 3, 2)),
    ),
}


OVERLAPPING = {
    "7×7 of a ResNet": (
        convolution((2, 2), ((3, 3), (3, 3))),
        array((2, 24, 28, 3)),
        array((7, 7, 3, 8)) / 8,
    ),
    "of an odd image": (
        convolution((2, 2), ((3, 3), (3, 3))),
        array((2, 23, 27, 3)),
        array((7, 7, 3, 8)) / 8,
    ),
    "3×3": (convolution((2, 2), "SAME"), array((2, 12, 13, 3)), array((3, 3, 3, 5))),
    "whole cells": (convolution((2, 3)), array((2, 12, 13, 3)), array((4, 6, 3, 5))),
    "one axis strided": (convolution((2, 1)), array((2, 12, 7, 3)), array((4, 3, 3, 5))),
    "cut off": (
        convolution((2, 2), ((-1, 2), (1, -3))),
        array((2, 12, 13, 3)),
        array((4, 3, 3, 5)),
    ),
    "patches, padded": (
        convolution((4, 4), ((2, 2), (0, 0))),
        array((2, 12, 12, 3)),
        array((4, 4, 3, 5)),
    ),
    "signals": (
        convolution((5,), ((4, 3),), ("NWC", "WIO", "NWC")),
        array((3, 61, 1)),
        array((10, 1, 6)),
    ),
    "features first in the image": (
        convolution((2, 2), numbers=("NCHW", "OIHW", "NHWC")),
        array((2, 3, 12, 10)),
        array((5, 3, 4, 3)),
    ),
    "volumes": (
        convolution((2, 2, 2), "SAME", ("NDHWC", "OIDHW", "NDHWC")),
        array((2, 8, 6, 9, 1)),
        array((5, 1, 3, 3, 3)),
    ),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_a_step_of_stride_one(name):
    function, *args = OVERLAPPING[name]
    before = traced(with_gradient(function), *args)
    after = rewritten(space_to_depth.run, before)
    assert count(before, "conv_general_dilated") == 2
    found = [e.params for e in after.eqns if e.primitive.name == "conv_general_dilated"]
    products = count(after, "dot_general")
    assert len(found) + products == 2
    assert all({*params["window_strides"], *params["rhs_dilation"]} == {1} for params in found)
    assert products == (2 if name == "patches, padded" else 0)
    near(evaluate(after, *args), evaluate(before, *args))


@pytest.mark.parametrize("seed", range(40))
def test_random_windows(seed):
    rng = random.Random(seed)
    axes = rng.choice((1, 2))
    strides = [rng.choice((1, 2, 3)) for _ in range(axes)]
    windows = [stride * rng.choice((1, 2)) + rng.choice((0, 1)) for stride in strides]
    sizes = [window * rng.choice((2, 3)) + rng.choice((0, 1, 2)) for window in windows]
    # XLA's convolutions on CPUs are wrong where one side is padded and the other cut off.
    padding = [rng.choice(((0, 0), (1, 2), (2, 0), (-1, 0), (-1, -1))) for _ in range(axes)]
    numbers = ("NWC", "WIO", "NWC") if axes == 1 else ("NHWC", "HWIO", "NHWC")
    function = convolution(strides, padding, numbers)
    args = array((2, *sizes, 3), seed=seed), array((*windows, 3, 4), seed=seed + 1)
    before = traced(with_gradient(function), *args)
    near(evaluate(rewritten(space_to_depth.run, before), *args), evaluate(before, *args))


@pytest.mark.parametrize("name", PATCHES)
def test_a_step_without_convolutions(name):
    function, *args = PATCHES[name]
    before = traced(with_gradient(function), *args)
    after = rewritten(space_to_depth.run, before)
    assert count(before, "conv_general_dilated") == 2
    assert count(after, "conv_general_dilated") == 0
    assert count(after, "dot_general") == 2
    near(evaluate(after, *args), evaluate(before, *args))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_types(dtype):
    function, *args = PATCHES["of images"]
    args = [x.astype(dtype) for x in args]
    after = rewritten(space_to_depth.run, traced(with_gradient(function), *args))
    assert count(after, "dot_general") == 2
    exact = with_gradient(function)(*(x.astype(jnp.float32) for x in args))
    for got, want in zip(evaluate(after, *args), exact, strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


def test_what_is_not_finite_stays_in_its_patch():
    function, x, w = PATCHES["rows of no multiple"]
    x = x.at[0, 1, 1, 0].set(jnp.inf).at[1, 4, 4, 1].set(jnp.nan)
    w = w.at[0, 0, 0, 2].set(-jnp.inf)
    after = rewritten(space_to_depth.run, traced(function, x, w))
    near(evaluate(after, x, w), [function(x, w)])


def test_patches_are_made_once():
    """Of the image, for the result and for the gradient."""
    function, *args = PATCHES["of images"]
    bfloat16 = [x.astype(jnp.bfloat16) for x in args]
    program = jax.make_jaxpr(with_gradient(function))(*bfloat16)
    for _, run in pipeline.graph_passes(context()):
        program = run(program)
    assert count(program, "conv_general_dilated") == 0
    padded = [e.outvars[0].aval.shape for e in program.eqns if e.primitive.name == "pad"]
    assert padded == [(2, 2, 3, 592), (1, 1, 592, 8)], "588, to 16 bytes"


X, W = array((2, 12, 12, 3)), array((4, 4, 3, 5))

LEFT_ALONE = {
    "gaps": (convolution((4, 5)), X, W),
    "not strided": (convolution((1, 1)), X, W),
    "dilated": (convolution((4, 4), rhs_dilation=(1, 2)), X, W),
    "spread": (convolution((4, 4), ((0, 0), (0, 0)), lhs_dilation=(2, 1)), X, W),
    "groups": (convolution((4, 4), feature_group_count=3), X, array((4, 4, 1, 6))),
    "features that fill 16 bytes": (
        convolution((4, 4)),
        array((2, 12, 12, 4)),
        array((4, 4, 4, 5)),
    ),
    "features first in the result": (
        convolution((4, 4), numbers=("NHWC", "HWIO", "NCHW")),
        X,
        W,
    ),
    "pixels": (convolution((1, 1)), X, array((1, 1, 3, 5))),
    "one patch": (convolution((4, 4)), X[:, :4, :4], W),
    "integers": (convolution((4, 4)), X.astype(jnp.int8), W.astype(jnp.int8)),
    "no images": (convolution((4, 4)), X[:0], W),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    before = traced(*LEFT_ALONE[name])
    assert count(before, "conv_general_dilated") == 1
    assert space_to_depth.run(before) is before


def test_gradients_of_images_are_left_alone():
    function = convolution((4, 4))

    def step(x, w):
        return jax.vjp(function, x, w)[1](jnp.ones_like(function(x, w)))

    before = traced(step, X, W)
    after = rewritten(space_to_depth.run, before)
    assert count(after, "conv_general_dilated") == 1
    near(evaluate(after, X, W), evaluate(before, X, W))


def test_a_dilated_convolution_is_no_gradient():
    """Which it resembles: of three images, its windows are larger than what they are moved over."""
    function = convolution((1, 1), rhs_dilation=(2, 2))
    before = traced(function, array((3, 20, 20, 8)), array((3, 3, 8, 5)))
    assert space_to_depth.run(before) is before


def test_a_module_under_vmap_and_scan():
    module = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID")
    images = array((3, 2, 8, 12, 3))
    params = module.init(jax.random.key(0), images[0])

    def step(params, images):
        def loss(params, image):
            return jnp.square(module.apply(params, image)).sum()

        mapped = jax.vmap(jax.grad(loss), (None, 0))(params, images)
        total, _ = lax.scan(lambda c, x: (c + loss(params, x), ()), 0.0, images)
        return mapped, total

    before = traced(step, params, images)
    after = rewritten(space_to_depth.run, before)
    args = *jax.tree.leaves(params), images
    near(evaluate(after, *args), evaluate(before, *args))


@pytest.mark.parametrize(
    ("fields", "runs"),
    [({}, True), ({"backend": "xla"}, False), ({"platform": "cpu"}, False)],
)
def test_only_where_groups_become_kernels(fields, runs):
    names = [name for name, _ in pipeline.graph_passes(context(**fields))]
    assert ("space_to_depth" in names) == runs
