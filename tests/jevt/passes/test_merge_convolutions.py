"""Convolutions of one input become one, with the same values; others stay."""

from __future__ import annotations

import dataclasses
import functools
import random

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from partitions import context
from rewriting import count, evaluate, near, relative_norm, rewritten, traced

from benchmarks import registry
from benchmarks.options import Options
from jevt import pipeline
from jevt.passes import dce, inline, merge_convolutions
from jevt.passes._gather import gathered
from jevt.passes.merged_convolutions import price

CUDA = context()
NAME = "conv_general_dilated"


@pytest.fixture
def cheap(monkeypatch):
    """One convolution is faster, however small."""
    monkeypatch.setattr(price, "predicted_us", lambda merged, readers, device: 1e6)


def merged(jaxpr):
    """The jaxpr after the pass, which is well-typed and idempotent."""
    return rewritten(functools.partial(merge_convolutions.run, context=CUDA), jaxpr)


def array(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arrays(*shapes, dtype=jnp.float32):
    return [array(shape, seed, dtype) for seed, shape in enumerate(shapes)]


def convolutions(strides, paddings, numbers=("NWC", "WIO", "NWC"), **params):
    """Of one input, with a padding each."""

    def function(x, *filters):
        pairs = zip(filters, paddings, strict=True)
        return [
            lax.conv_general_dilated(x, w, strides, pad, dimension_numbers=numbers, **params)
            for w, pad in pairs
        ]

    return function


def with_gradients(function):
    """The results, and the gradients of something that reads all of them."""

    def step(x, *filters):
        outs, pullback = jax.vjp(function, x, *filters)
        return outs, pullback([jnp.cos(out) for out in outs])

    return step


CASES = {
    "text": (
        convolutions((2,), ["SAME"] * 3),
        arrays((3, 32, 5), (2, 5, 4), (4, 5, 4), (8, 5, 4)),
    ),
    "text of odd length": (
        convolutions((2,), ["SAME"] * 3),
        arrays((3, 33, 5), (2, 5, 3), (5, 5, 7), (8, 5, 1)),
    ),
    "the widest first": (
        convolutions((1,), ["SAME"] * 3),
        arrays((2, 21, 3), (7, 3, 2), (1, 3, 3), (4, 3, 5)),
    ),
    "a window less than the stride": (
        convolutions((2,), ["SAME"] * 2),
        arrays((2, 34, 3), (1, 3, 2), (3, 3, 4)),
    ),
    "explicit": (
        convolutions((1,), [((0, 4),), ((3, 2),)]),
        arrays((2, 20, 3), (3, 3, 2), (4, 3, 4)),
    ),
    "windows side by side": (
        convolutions((1,), [((3, 0),), ((0, 3),)]),
        arrays((2, 20, 3), (2, 3, 2), (2, 3, 4)),
    ),
    "one window": (
        convolutions((3,), ["VALID"] * 2),
        arrays((2, 20, 3), (4, 3, 2), (4, 3, 4)),
    ),
    "dilated": (
        convolutions((1,), ["SAME"] * 2, rhs_dilation=(2,)),
        arrays((2, 20, 3), (3, 3, 2), (5, 3, 4)),
    ),
    "images": (
        convolutions((2, 1), ["SAME"] * 3, ("NHWC", "HWIO", "NHWC")),
        arrays((2, 12, 11, 3), (3, 3, 3, 2), (2, 5, 3, 4), (5, 1, 3, 3)),
    ),
    "features first": (
        convolutions((1, 1), ["SAME"] * 2, ("NCHW", "OIHW", "NCHW")),
        arrays((2, 3, 12, 11), (2, 3, 3, 3), (4, 3, 5, 5)),
    ),
    "volumes": (
        convolutions((1, 2, 1), ["SAME"] * 2, ("NDHWC", "OIDHW", "NDHWC")),
        arrays((2, 5, 6, 7, 2), (3, 2, 3, 1, 3), (2, 2, 1, 3, 3)),
    ),
}


def exactly(step, args):
    """The results in float64."""
    with jax.enable_x64(True):
        results = step(*(np.asarray(a, np.float64) for a in args))
        return [np.asarray(result) for result in jax.tree.leaves(results)]


@pytest.mark.parametrize("name", CASES)
def test_a_step(name, cheap):
    function, args = CASES[name]
    step, number = with_gradients(function), len(args) - 1
    before = traced(step, *args)
    after = merged(before)
    assert count(before, NAME) == 3 * number
    # Results are parts of one, gradients of filters too; those of the input are not merged.
    assert count(after, NAME) == 1 + 1 + number
    got = evaluate(after, *args, compiled=True)
    near(got, jax.tree.leaves(jax.jit(step)(*args)))
    assert relative_norm(got, exactly(step, args)) < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_random_windows(seed, cheap):
    """Cut off, not padded: XLA's convolutions on CPUs are wrong where a side is either."""
    rng = random.Random(seed)
    axes = rng.choice((1, 2))
    strides = [rng.choice((1, 2, 3)) for _ in range(axes)]
    dilations = [rng.choice((1, 1, 2)) for _ in range(axes)]
    sizes = [rng.randrange(24, 28) for _ in range(axes)]
    results = [rng.randrange(5, 16 // stride + 1) for stride in strides]
    paddings, filters = [], []
    for number in range(3):
        windows = [rng.randrange(1, 5) for _ in range(axes)]
        padding = []
        for i, window in enumerate(windows):
            low = -dilations[i] * rng.randrange(2)
            reach = (results[i] - 1) * strides[i] + (window - 1) * dilations[i] + 1
            padding.append((low, reach - sizes[i] - low))
        paddings.append(padding)
        filters.append(array((*windows, 3, rng.randrange(1, 5)), number))
    numbers = ("NWC", "WIO", "NWC") if axes == 1 else ("NHWC", "HWIO", "NHWC")
    function = convolutions(strides, paddings, numbers, rhs_dilation=dilations)
    x = array((2, *sizes, 3), 3)

    def step(x, *filters):
        outs, pullback = jax.vjp(functools.partial(function, x), *filters)
        return outs, pullback([jnp.cos(out) for out in outs])

    before = traced(step, x, *filters)
    after = merged(before)
    assert count(before, NAME) == 6
    assert count(after, NAME) == 2
    near(evaluate(after, x, *filters), evaluate(before, x, *filters))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_types(dtype, cheap):
    function, args = CASES["text of odd length"]
    args = [x.astype(dtype) for x in args]
    step = with_gradients(function)
    before = traced(step, *args)
    after = merged(before)
    assert count(after, NAME) == 1 + 1 + 3
    exact = exactly(step, args)
    got, usual = (evaluate(jaxpr, *args, compiled=True) for jaxpr in (after, before))
    assert relative_norm(got, exact) < 1.2 * relative_norm(usual, exact) < 0.05


def test_a_type_of_the_result(cheap):
    function = convolutions((1,), ["SAME"] * 2, preferred_element_type=jnp.float32)
    args = arrays((2, 20, 3), (2, 3, 4), (5, 3, 4), dtype=jnp.bfloat16)
    before = traced(function, *args)
    after = merged(before)
    assert count(after, NAME) == 1
    near(evaluate(after, *args), evaluate(before, *args))


def test_padding_is_the_same_on_both_sides_where_it_may_be(cheap):
    """XLA would copy the input."""
    function, args = CASES["text"]
    assert paddings(merged(traced(function, *args))) == [((3, 3),)]
    # 32 elements: one more zero at the end is read by no window.
    function = convolutions((2,), [((1, 0),), ((0, 0),)])
    args = arrays((3, 32, 5), (3, 5, 4), (2, 5, 4))
    before = traced(function, *args)
    after = merged(before)
    assert paddings(after) == [((1, 1),)]
    near(evaluate(after, *args), evaluate(before, *args))


def paddings(jaxpr):
    return [eqn.params["padding"] for eqn in jaxpr.eqns if eqn.primitive.name == NAME]


X, W, V = arrays((2, 20, 4), (3, 4, 5), (5, 4, 6))
TEXT = convolutions((1,), ["SAME"] * 2)

LEFT_ALONE = {
    "results of two lengths": (convolutions((1,), ["VALID"] * 2), X, W, V),
    "layouts": (
        lambda x, w, v: [
            *convolutions((1,), ["SAME"])(x, w),
            *convolutions((1,), ["SAME"], ("NWC", "WIO", "NCW"))(x, v),
        ],
        X,
        W,
        V,
    ),
    "strides": (
        lambda x, w, v: [
            *convolutions((1,), ["VALID"])(x, w),
            *convolutions((2,), [((0, 21),)])(x, v),
        ],
        X,
        W,
        V,
    ),
    "places between the elements of a dilated window": (
        convolutions((1,), [((2, 2),), ((3, 1),)], rhs_dilation=(2,)),
        X,
        W,
        W + 1,
    ),
    "inputs": (lambda x, w, v: TEXT(x, w, v)[:1] + TEXT(x + 1, w, v)[1:], X, W, V),
    "filters enough": (TEXT, X, array((3, 4, 128)), V),
    "highest precision": (
        convolutions((1,), ["SAME"] * 2, precision=lax.Precision.HIGHEST),
        X,
        W,
        V,
    ),
    "groups": (
        convolutions((1,), ["SAME"] * 2, feature_group_count=2),
        X,
        array((3, 2, 4)),
        array((5, 2, 6)),
    ),
    "spread": (convolutions((1,), [((1, 1),), ((2, 2),)], lhs_dilation=(2,)), X, W, V),
    "integers": (TEXT, *(a.astype(jnp.int8) for a in (X, W, V))),
    "nothing": (TEXT, X[:0], W, V),
    "no spatial axes": (
        convolutions((), [(), ()], ("NC", "IO", "NC")),
        array((3, 4)),
        array((4, 5)),
        array((4, 6)),
    ),
    "padded on one side, cropped on the other": (
        convolutions((1,), [((3, -2),), ((4, -2),)]),
        X,
        W,
        array((4, 4, 5)),
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name, cheap):
    before = traced(*LEFT_ALONE[name])
    assert count(before, NAME) == 2
    assert merge_convolutions.run(before, CUDA) is before


def test_float64_is_left_alone(cheap):
    with jax.enable_x64(True):
        before = traced(TEXT, *(np.asarray(a, np.float64) for a in (X, W, V)))
    assert merge_convolutions.run(before, CUDA) is before


def test_weak_types_are_left_alone(cheap):
    """A type of a result that Python's numbers do not change is another type to who traces on."""
    types = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=True) for a in (X, W, V)]
    before = traced(TEXT, *types)
    assert merge_convolutions.run(before, CUDA) is before


def test_meshes_are_left_alone(cheap):
    before = traced(TEXT, X, W, V)
    partitioned = dataclasses.replace(CUDA, partitioned=True)
    assert merge_convolutions.run(before, partitioned) is before
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(X, jax.NamedSharding(mesh, PartitionSpec("x")))
        explicit = traced(TEXT, sharded, W, V)
    assert merge_convolutions.run(explicit, CUDA) is explicit


# What the cost model says


def of_shapes(fun, *shapes, dtype=jnp.bfloat16):
    return traced(fun, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def summed(function):
    """Something that reads the results in place."""
    return lambda *args: [jnp.sum(jax.nn.relu(out)) for out in function(*args)]


def test_xmlcnn():
    """The three convolutions, and the three gradients of their filters; not in the small one."""
    for size, expected in (("full", 2), ("smoke", 6)):
        workload = registry.make("xmlcnn", Options(size=size))
        program = jax.make_jaxpr(workload.step)(*workload.shapes())
        for _, run in pipeline.graph_passes(CUDA):
            program = run(program)
        assert count(program, NAME) == expected


def test_many_windows_of_one_element_are_not_padded():
    images = convolutions((1, 1), ["SAME"] * 2, ("NCHW", "OIHW", "NCHW"))
    before = of_shapes(summed(images), (64, 192, 28, 28), (96, 192, 1, 1), (96, 192, 5, 5))
    assert merge_convolutions.run(before, CUDA) is before
    alike = of_shapes(summed(images), (64, 192, 28, 28), (96, 192, 5, 5), (96, 192, 5, 5))
    assert count(merged(alike), NAME) == 1


def test_those_that_gain_most_are_merged():
    """As long as none has filters enough: of five with 48 three, and two."""
    before = of_shapes(
        summed(convolutions((1,), ["SAME"] * 5)),
        (256, 512, 256),
        *((width, 256, 48) for width in (9, 3, 7, 5, 3)),
    )
    found = [e.invars[1].aval.shape for e in merged(before).eqns if e.primitive.name == NAME]
    assert sorted(found) == [(3, 256, 96), (9, 256, 144)]


def test_results_that_would_be_copied():
    """Convolutions that are bound by memory: one reading of the input less, but two copies more."""
    function, shapes = TEXT, ((1024, 512, 64), (1, 64, 63), (3, 64, 64))
    assert count(merged(of_shapes(summed(function), *shapes)), NAME) == 1
    copied = of_shapes(function, *shapes)
    assert merge_convolutions.run(copied, CUDA) is copied


@pytest.mark.parametrize(
    ("fields", "runs"),
    [({}, True), ({"backend": "xla"}, False), ({"platform": "cpu"}, False)],
)
def test_only_where_groups_become_kernels(fields, runs):
    names = [name for name, _ in pipeline.graph_passes(context(**fields))]
    assert ("merge_convolutions" in names) == runs


# Order


def values(fun, *args, convolutions):
    """Checks the values after the pass, and how many convolutions are left."""
    before = traced(fun, *args)
    after = merged(before)
    assert count(after, NAME) == convolutions
    near(evaluate(after, *args), evaluate(before, *args))


def test_readers_wait(cheap):
    def fun(x, w, v):
        first = jnp.tanh(TEXT(x, w, v)[0])
        scale = jnp.exp(v)
        return first * 2, TEXT(x, w, scale)[1], jnp.sum(first)

    values(fun, X, W, V, convolutions=1)


def test_one_that_depends_on_another(cheap):
    def directly(x, w):
        (first,) = convolutions((1,), [((2, 2),)])(x, w)
        return convolutions((1,), [((2, 2),)])(x, jnp.tanh(first)[0, :5, :4, None])

    def through_filters(x, w, v):
        scale = jnp.sum(TEXT(x, w, v)[0])
        return TEXT(x, w, v * scale)

    values(directly, X, W, convolutions=2)
    values(through_filters, X, W, V, convolutions=2)


def test_a_result_that_is_the_filters_of_another(cheap):
    def fun(x, w):
        first = lax.conv(x, w, (1, 1), "SAME")
        return first, lax.conv(x, first, (1, 1), "SAME")

    values(fun, *arrays((3, 3, 3, 3), (3, 3, 3, 3)), convolutions=2)


def test_two_groups_that_wait_for_each_other(cheap):
    """a₁ → b₁ and b₂ → a₂: either may be merged, both may not."""

    def fun(x, z, w, v):
        a1, b2 = TEXT(x, w, v)[0], TEXT(z, w, v)[1]
        b1 = TEXT(z, w * jnp.sum(a1), v)[0]
        a2 = TEXT(x, w, v * jnp.sum(b2))[1]
        return a1, a2, b1, b2

    before = traced(fun, X, X + 1, W, V)
    after = merge_convolutions.run(before, CUDA)
    assert 3 <= count(after, NAME) <= 4
    near(evaluate(after, X, X + 1, W, V), evaluate(before, X, X + 1, W, V))


def test_effects_keep_their_order(cheap):
    def fun(x, w, v):
        first = TEXT(x, w, v)[0]
        jax.debug.print("first {}", jnp.sum(first), ordered=True)
        jax.debug.print("second {}", jnp.sum(v), ordered=True)
        return first, TEXT(x, w, v + 1)[1]

    before = inline.run(dce.run(jax.make_jaxpr(fun)(X, W, V)))
    after = merge_convolutions.run(before, CUDA)
    jax.extend.core.check_jaxpr(after)
    assert count(after, NAME) == 1
    assert after.effects == before.effects

    def printed(jaxpr):
        return [eqn.params for eqn in jaxpr.eqns if eqn.effects]

    assert printed(after) == printed(before)


def test_gathered():
    def fun(x):
        a = jnp.sin(x)
        b = jnp.cos(a)
        c = jnp.exp(x)
        d = jnp.tanh(x)
        return a, b, c + d

    jaxpr = jax.make_jaxpr(fun)(1.0)

    def names(groups):
        return [eqn.primitive.name for eqn in gathered(jaxpr, groups).eqns]

    assert names([(0, 2)]) == ["sin", "exp", "cos", "tanh", "add"]
    assert names([(0, 3)]) == ["exp", "sin", "tanh", "cos", "add"]
    assert gathered(jaxpr, [(0, 1), (2, 3)]) is jaxpr
    assert gathered(jaxpr, []) is jaxpr
    assert gathered(jaxpr, [(0, 4)]).eqns[-2].primitive.name in ("sin", "cos", "add")


def test_bodies(cheap):
    def fun(x, w, v):
        def body(carry, x):
            outs = with_gradients(TEXT)(x, w * carry, v)
            return carry + 1e-3 * jnp.sum(outs[0][1]), outs

        return lax.scan(body, jnp.float32(1), jnp.stack([x, x + 1]))

    values(fun, X, W, V, convolutions=4)
