"""Convolutions that are matrix products become such, with the same values; others stay."""

from __future__ import annotations

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from partitions import context
from rewriting import before_and_after, count, evaluate, near, rewritten, traced

from benchmarks import registry
from benchmarks.options import Options
from jevt import pipeline
from jevt.passes import convolutions

FLOAT64 = jnp.float64


def array(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def convolution(strides=(1, 1), padding="VALID", numbers=("NHWC", "HWIO", "NHWC"), **params):
    def function(x, w):
        return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **params)

    return function


def with_gradients(function):
    """The result, and the gradients of something that reads all of it."""

    def step(x, w):
        out, pullback = jax.vjp(function, x, w)
        return out, *pullback(jnp.cos(out))

    return step


X, W = array((3, 6, 8, 4)), array((1, 1, 4, 5), seed=1)

# Whose three convolutions are all products.
STEPS = {
    "1×1": (convolution(), X, W),
    "strided": (convolution((2, 2)), X, W),
    "strided, of an odd image": (convolution((2, 3)), array((3, 7, 7, 4)), W),
    "one axis strided": (convolution((1, 2)), X, W),
    "no spatial axes": (convolution((), (), ("NC", "IO", "NC")), array((3, 4)), array((4, 5))),
    "three spatial axes": (
        convolution((1, 2, 1), numbers=("NDHWC", "DHWIO", "NDHWC")),
        array((2, 3, 4, 5, 6)),
        array((1, 1, 1, 6, 3)),
    ),
    "features first": (convolution(numbers=("CHWN", "IOHW", "CHWN")), X, array((3, 5, 1, 1))),
    "batch inside": (convolution(numbers=("HWNC", "HWOI", "HWNC")), X, array((1, 1, 5, 4))),
    "one image, features first": (
        convolution(numbers=("NCHW", "OIHW", "NCHW")),
        array((1, 4, 6, 7)),
        array((5, 4, 1, 1)),
    ),
    "one pixel, features first": (
        convolution(numbers=("NCHW", "OIHW", "NCHW")),
        array((3, 4, 1, 1)),
        array((5, 4, 1, 1)),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_without_convolutions(name):
    function, *args = STEPS[name]
    before = traced(with_gradients(function), *args)
    after = rewritten(convolutions.run, before)
    assert count(before, "conv_general_dilated") == 3
    assert count(after, "conv_general_dilated") == 0
    assert count(after, "dot_general") == 3
    near(evaluate(after, *args), evaluate(before, *args))


@pytest.mark.parametrize(
    ("function", "w"),
    [
        (convolution(), array((6, 8, 4, 5), seed=2)),
        (convolution(padding=((0, -2), (-1, 0))), W),
    ],
    ids=["whole window", "cropped"],
)
def test_a_step_whose_input_gradient_is_padded(function, w):
    args = X, w
    before = traced(with_gradients(function), *args)
    after = rewritten(convolutions.run, before)
    assert count(after, "dot_general") == 2 and count(after, "conv_general_dilated") == 1
    near(evaluate(after, *args), evaluate(before, *args))


LEFT_ALONE = {
    "padded": (convolution(padding=((0, 1), (0, 0))), X, W),
    "window of two": (convolution(), X, array((2, 1, 4, 5))),
    "part of the image": (convolution(), X, array((6, 7, 4, 5))),
    "padded whole window": (convolution(padding=((1, 0), (0, 0))), X, array((7, 8, 4, 5))),
    "one window axis of two": (convolution(), X, array((6, 1, 4, 5))),  # W lies between H and C
    "features first": (convolution(numbers=("NCHW", "OIHW", "NCHW")), X, array((5, 6, 1, 1))),
    "features move": (convolution(numbers=("NHWC", "HWIO", "NCHW")), X, W),
    "groups of features": (convolution(feature_group_count=2), X, array((1, 1, 2, 6))),
    "groups of the batch": (convolution(batch_group_count=3), X, array((1, 1, 4, 6))),
    "dilated and strided": (convolution((2, 1), ((0, 0), (0, 0)), lhs_dilation=(3, 1)), X, W),
    "integers": (convolution(), X.astype(jnp.int8), W.astype(jnp.int8)),
    "complex": (convolution(), X.astype(jnp.complex64), W.astype(jnp.complex64)),
    "no images": (convolution(), X[:0], W),
    "no features": (convolution(), X[..., :0], W[:, :, :0]),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    before = traced(*LEFT_ALONE[name])
    assert count(before, "conv_general_dilated") == 1
    assert convolutions.run(before) is before


LAYOUTS = (
    ("NWC", "WIO", "NWC"),
    ("NCW", "OIW", "NCW"),
    ("NHWC", "HWIO", "NHWC"),
    ("NHWC", "OHWI", "NHWC"),
    ("NCHW", "OIHW", "NCHW"),
    ("CHWN", "IHWO", "CHWN"),
    ("CHWN", "IHWO", "HWNC"),
    ("HWNC", "HWIO", "CHWN"),
    ("NDHWC", "DHWIO", "NDHWC"),
)


def random_convolution(seed):
    """A convolution's arguments and parameters, by far not all of which are products."""
    rng = random.Random(seed)
    layouts = rng.choice(LAYOUTS)
    left, right, _ = layouts
    spatial = [c for c in left if c not in "NC"]
    sizes = {"N": rng.choice((1, 3)), "C": rng.choice((1, 4)), "O": rng.choice((1, 5))}
    windows, params = {}, []
    for axis in spatial:
        size, window = rng.choice((1, 2, 5, 6)), 1
        stride, low, high, dilated, spread = 1, 0, 0, 1, 1
        match rng.randrange(6):
            case 0:
                stride = rng.choice((2, 3))
            case 1:
                window = size
                if rng.random() < 0.5:
                    dilated = rng.choice((2, 3))
                    size = (size - 1) * dilated + rng.choice((1, 2))
                    high = (window - 1) * dilated + 1 - size
            case 2:
                spread = rng.choice((2, 3))
                high = rng.choice((0, spread - 1))
            case 3:
                window = rng.choice((2, 3))
                low = high = 1
            case 4:
                low, high = rng.choice(((1, 0), (-1, 0), (0, -1)))
        if size + low + high < 1 or (size - 1) * spread + 1 + low + high < window:
            size += 3
        sizes[axis], windows[axis] = size, window
        params.append((stride, (low, high), spread, dilated))
    strides, padding, spreads, dilations = zip(*params, strict=True)
    function = convolution(strides, padding, layouts, lhs_dilation=spreads, rhs_dilation=dilations)
    features = {"I": sizes["C"], "O": sizes["O"]}
    shapes = [sizes[c] for c in left], [{**windows, **features}[c] for c in right]
    return function, shapes, layouts, dict(zip(spatial, params, strict=True)), windows, sizes


def is_product(layouts, params, windows, sizes, out):
    """Whether a convolution is a product in memory order, from which positions its windows read."""
    left, right, result = layouts
    extent = dict(zip(result, out, strict=True))
    roles = {"N": "free", "C": "summed", "O": "free", "I": "summed"}
    for axis, (stride, (low, _), spread, dilation) in params.items():
        reads = [
            [o * stride + j * dilation - low for j in range(windows[axis])]
            for o in range(extent[axis])
        ]
        if spread > 1 and sizes[axis] > 1:
            if windows[axis] > 1 or stride > 1:
                return False
        elif any(not 0 <= position < sizes[axis] for row in reads for position in row):
            return False
        if windows[axis] > 1 and extent[axis] > 1:
            return False
        roles[axis] = "summed" if windows[axis] > 1 else "free"

    def runs(names, shape):
        """The parts of an array in memory order, neighbours of one role together."""
        own = [(roles[c], c.replace("I", "C")) for c, n in zip(names, shape, strict=True) if n > 1]
        return [
            (role, [c for _, c in part]) for role, part in itertools.groupby(own, lambda x: x[0])
        ]

    # What the left operand holds after the slice, and the result before zeros come between.
    held = {
        c: windows[c] if roles[c] == "summed" else sizes[c] if params[c][2] > 1 else extent[c]
        for c in params
    }
    taken = [{**sizes, **held}, {**windows, "I": sizes["C"], "O": sizes["O"]}]
    a, b = (
        runs(names, [where[c] for c in names])
        for names, where in zip((left, right), taken, strict=True)
    )
    # The result's features go by the name of the weights'.
    shape = [
        sizes["O"] if c == "C" else sizes["N"] if c == "N" else held[c] if roles[c] == "free" else 1
        for c in result
    ]
    free = [c.replace("C", "O") for c, n in zip(result, shape, strict=True) if n > 1]
    parts = [dict(a), dict(b)]
    if len(a) > len(parts[0]) or len(b) > len(parts[1]):
        return False
    first, second = (part.get("free", []) for part in parts)
    return parts[0].get("summed") == parts[1].get("summed") and free in (
        first + second,
        second + first,
    )


def test_random_convolutions():
    found = {True: 0, False: 0}
    for seed in range(60):
        function, shapes, *facts = random_convolution(seed)
        dtype = jnp.float32 if seed % 2 else FLOAT64
        with jax.enable_x64(dtype is FLOAT64):
            args = [array(shape, dtype, seed) for shape in shapes]
            before = traced(function, *args)
            after = rewritten(convolutions.run, before)
            expected = is_product(*facts, before.outvars[0].aval.shape)
            assert (count(after, "dot_general") == 1) == expected, (seed, shapes, facts)
            assert (after is before) != expected
            found[expected] += 1
            if expected:
                limit = 1e-5 if seed % 2 else 1e-12
                near(evaluate(after, *args), evaluate(before, *args), limit)
    assert min(found.values()) > 15


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, FLOAT64])
def test_types(dtype):
    with jax.enable_x64(dtype is FLOAT64):
        args = [a.astype(dtype) for a in (X, W)]
        before = traced(with_gradients(convolution((2, 2))), *args)
        after = rewritten(convolutions.run, before)
        assert count(after, "dot_general") == 3
        near(evaluate(after, *args), evaluate(before, *args), 1e-12)


def products(jaxpr):
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]


def test_precision_and_type_of_the_result():
    precision = (lax.Precision.HIGHEST, lax.Precision.DEFAULT)
    numbers = ("CHWN", "IHWO", "CHWN")  # the weights come first
    function = convolution(precision=precision, preferred_element_type=jnp.float32, numbers=numbers)
    args = X.astype(jnp.bfloat16), array((3, 1, 1, 5), jnp.bfloat16)
    (product,) = products(rewritten(convolutions.run, traced(function, *args)))
    assert [v.aval.ndim for v in product.invars] == [2, 4]
    assert product.params["precision"] == precision[::-1]
    assert product.params["preferred_element_type"] == jnp.float32


def test_scopes_stay():
    def function(x, w):
        with jax.named_scope("bottleneck"):
            return convolution()(x, w)

    (product,) = products(convolutions.run(traced(function, X, W)))
    assert "bottleneck" in str(product.source_info.name_stack)


def test_a_slice_is_shared_and_weights_are_not_reversed():
    after = rewritten(convolutions.run, traced(with_gradients(convolution((2, 2))), X, W))
    assert count(after, "slice") == 1
    assert count(after, "rev") == 0


def test_zeros_between_pixels_are_no_scatter():
    after = rewritten(convolutions.run, traced(with_gradients(convolution((2, 2))), X, W))
    assert count(after, "pad") == 0 and count(after, "select_n") == 1
    odd = traced(with_gradients(convolution((2, 2))), array((3, 7, 8, 4)), W)
    assert count(rewritten(convolutions.run, odd), "pad") == 1


def test_inside_scan():
    def function(x, w):
        return lax.scan(lambda c, _: (convolution()(c, w), None), x, length=2)[0]

    args = X, array((1, 1, 4, 4))
    before = traced(function, *args)
    after = rewritten(convolutions.run, before)
    assert count(after, "conv_general_dilated") == 0
    near(evaluate(after, *args), evaluate(before, *args))


def test_all_of_resnets_are_found():
    workload = registry.make("resnet", Options(size="smoke"))
    state = jax.eval_shape(workload.init, 0)
    before = traced(workload.step, state, workload.batch(0))
    own = [e for e in before.eqns if e.primitive.name == "conv_general_dilated"]
    rest = count(rewritten(convolutions.run, before), "conv_general_dilated")
    # Two bottlenecks with a shortcut each: three convolutions of 1×1, one of 3×3; and the stem,
    # whose input has no gradient.
    assert (len(own), rest) == (3 * 8 + 2, 3 * 2 + 2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"backend": "triton"}, True),
        ({"fuel": 3}, True),
        ({"backend": "xla"}, False),
        ({"partitioned": True}, False),
        ({"platform": "cpu"}, False),
    ],
)
def test_only_where_groups_become_kernels(fields, expected):
    names = [name for name, _ in pipeline.graph_passes(context(**fields))]
    assert ("convolutions" in names) == expected


CASES = {
    "forward": (convolution(), X, W),
    "step, strided": (with_gradients(convolution((2, 2))), X, W),
    "step, strided, of an odd image": (with_gradients(convolution((2, 2))), X[:, :5], W),
    "features first": (convolution(numbers=("CHWN", "IOHW", "CHWN")), X, array((3, 5, 1, 1))),
    "whole window": (convolution(), X, array((6, 8, 4, 5))),
}


def test_golden(golden):
    golden("passes/convolutions.txt", before_and_after(CASES, convolutions.run))
