"""Batch norms of products without the product in memory: the same values, no less exact."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import resnet_block
from jax import lax
from jax.extend.core import Jaxpr
from jax.sharding import PartitionSpec
from norms import canonical
from rewriting import cleaned, count, evaluate

from jevt import pipeline
from jevt._context import Context
from jevt.partition import partition
from jevt.partition.cost import DEVICES
from jevt.passes import convolutions, cse, dce, product_norms, raise_norms

# Launches and arithmetic cost nothing: bytes decide.
DEVICE = dataclasses.replace(DEVICES["H100"], xla_launch_us=0.0, cublas_flops_per_us=1e12)
CUDA = Context("cuda", "auto", False, (), DEVICE)
M, C, N = 120, 8, 37
BFLOAT16 = np.dtype(jnp.bfloat16)


def raised(fun, *args) -> Jaxpr:
    """The jaxpr in front of the pass: norms are composites, convolutions of 1×1 are products."""
    jaxpr = canonical(fun, *args)
    for graph_pass in (raise_norms.run, cse.run, dce.run, convolutions.run, cse.run):
        jaxpr = graph_pass(jaxpr)
    return jaxpr


def rewritten(jaxpr: Jaxpr, context: Context = CUDA) -> Jaxpr:
    """The jaxpr after the pass, which is well-typed and idempotent."""
    run = functools.partial(product_norms.run, context=context)
    return cleaned(run, jaxpr, dce.run, cse.run)


def wide(x):
    """In float32 at least: float64 stays, so that functions are their own references."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalised(y, scale=1.0, shift=0.0, epsilon=1e-5):
    """The normalised y in its type, mean and variance over all axes but the last."""
    z = wide(y)
    axes = tuple(range(y.ndim - 1))
    mean = z.mean(axes)
    variance = jnp.maximum(jnp.square(z).mean(axes) - jnp.square(mean), 0)
    return (
        ((z - mean) * (lax.rsqrt(variance + epsilon) * scale) + shift).astype(y.dtype),
        mean,
        variance,
    )


def dense(x, w, scale, shift):
    return normalised(x @ w, scale, shift)


def transposed(x, w, scale, shift):
    return normalised(x @ w.T, scale, shift)


def columns_first(x, w, scale, shift):
    return normalised(jnp.einsum("ctb,cn->tbn", x, w), scale, shift)


def with_float32_result(x, w, scale, shift):
    y, *statistics = normalised(wide(jnp.matmul(x, w)), scale, shift)
    return y.astype(x.dtype), *statistics


def without_scale(x, w, scale, shift):
    y, *statistics = normalised(x @ w, 1.0, shift)
    return y * jnp.tanh(scale).astype(y.dtype), *statistics


def without_shift(x, w, scale, shift):
    y, *statistics = normalised(x @ w, scale)
    return y + shift.astype(y.dtype), *statistics


def running(x, w, scale, shift):
    """flax's module, with its running statistics."""
    module = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=x.dtype)
    variables = {
        "params": {"scale": scale, "bias": shift},
        "batch_stats": {"mean": shift, "var": jnp.square(scale)},
    }
    y, new = module.apply(variables, x @ w, mutable=["batch_stats"])
    return y, *jax.tree.leaves(new)


def convolution(x, w, scale, shift, stride=1):
    y = lax.conv_general_dilated(
        x, w[None, None], (stride,) * 2, "VALID", dimension_numbers=resnet_block.NUMBERS
    )
    return normalised(y, scale, shift)


def strided(x, w, scale, shift):
    return convolution(x, w, scale, shift, 2)


def residual(x, w, scale, shift):
    """The end of a bottleneck."""
    y, *statistics = normalised(x @ w, scale, shift)
    other = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, w.shape[1] - x.shape[-1])])
    return jax.nn.relu(y + other), *statistics


ROWS = {
    dense: (5, M // 5),
    transposed: (M,),
    columns_first: (M // 8, 8),
    convolution: (2, 5, 12),
    strided: (4, 13, 11),
}
SPELLINGS = [
    *(dense, transposed, columns_first, with_float32_result, without_scale, without_shift),
    *(running, convolution, strided, residual),
]


def trained(fun):
    """What a layer computes, and its gradients, as a step has them."""

    def step(x, w, scale, shift, g):
        y, vjp, statistics = jax.vjp(
            lambda *args: (fun(*args)[0], fun(*args)[1:]), x, w, scale, shift, has_aux=True
        )
        return y, *statistics, *vjp(g.astype(y.dtype))

    return step


def arguments(fun=dense, seed=0, mean=0.5):
    rng = np.random.default_rng(seed)
    shape = (*ROWS.get(fun, (M,)), C)
    x = rng.standard_normal(shape) + mean * rng.standard_normal(C)
    w = rng.standard_normal((C, N)) / math.sqrt(C)
    if fun is transposed:
        w = w.T
    if fun is columns_first:
        x = np.moveaxis(x, -1, 0)
    scale, shift = rng.uniform(0.5, 1.5, N), rng.standard_normal(N)
    shape = jax.eval_shape(fun, x, w, scale, shift)[0].shape
    g = rng.standard_normal(shape) + rng.standard_normal(N)
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, g)]
    return *narrow[:2], *(jnp.asarray(a, jnp.float32) for a in (scale, shift)), narrow[2]


def errors(got, want) -> list[float]:
    """The distance of each array, in the norm and by it."""
    pairs = [
        [np.asarray(a).astype(np.float64) for a in pair] for pair in zip(got, want, strict=True)
    ]
    return [float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in pairs]


def exact(fun, args):
    with jax.enable_x64(True):
        return jax.jit(fun)(*(jnp.asarray(np.asarray(a).astype(np.float64)) for a in args))


def check(fun, args, after: Jaxpr, floor: float = 1e-5):
    """No less exact than ``jax.jit``: its error, half of it again, and a little."""
    want, reference = jax.jit(fun)(*args), exact(fun, args)
    got = evaluate(after, *args, compiled=True)
    assert [a.dtype for a in got] == [a.dtype for a in want]
    pairs = list(zip(errors(got, reference), errors(want, reference), strict=True))
    assert all(ours <= 1.5 * theirs + floor for ours, theirs in pairs), pairs


def reads_of_products(jaxpr: Jaxpr, rows: int) -> int:
    """How many equations read products of so many rows and N columns, casts aside."""
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def is_product(v):
        maker = makers.get(v)
        if maker is not None and maker.primitive is lax.convert_element_type_p:
            return is_product(maker.invars[0])
        product = maker is not None and maker.primitive is lax.dot_general_p
        return product and v.aval.shape[-1] == N and v.aval.size == rows * N

    return sum(
        any(is_product(v) for v in eqn.invars if not hasattr(v, "val"))
        for eqn in jaxpr.eqns
        if eqn.primitive is not lax.convert_element_type_p
    )


@pytest.mark.parametrize("fun", SPELLINGS)
def test_spellings(fun):
    args = arguments(fun)
    step = trained(fun)
    before = raised(step, *args)
    after = rewritten(before)
    assert count(before, "norm_statistics") == count(before, "norm_gradient") == 1
    assert count(after, "norm_statistics") == count(after, "norm_gradient") == 0
    rows = args[-1].size // N
    assert reads_of_products(before, rows) == 3
    assert reads_of_products(after, rows) == 1  # what is normalised
    check(step, args, after)


@pytest.mark.parametrize("mean", [0, 3, 30, 100])
def test_means_far_from_zero(mean):
    """Of x, of y and of the cotangent, in deviations; sums of the gradient over rows are 0."""
    x, w, scale, shift, g = arguments(mean=mean)
    g = (wide(g) * 1e-3 + mean * 1e-4).astype(g.dtype)
    args = (x, w, scale, shift, g)
    step = trained(dense)
    after = rewritten(raised(step, *args))
    check(step, args, after)
    dx, plain = (fun[3] for fun in (evaluate(after, *args, compiled=True), jax.jit(step)(*args)))
    total, reference = (
        np.abs(np.asarray(d).astype(np.float64).sum((0, 1))).max() for d in (dx, plain)
    )
    rounding = 2.0**-9 * float(np.linalg.norm(np.asarray(dx).astype(np.float64), axis=(0, 1)).max())
    assert total <= 1.5 * reference + 3 * rounding


@pytest.mark.parametrize("others", [0.1, 0.03, 0.01])
def test_inputs_with_few_directions(others):
    """Columns of x that are nearly sums of two others: xᵀx is what errors are multiplied by."""
    rng = np.random.default_rng(0)
    x, w, scale, shift, g = arguments(mean=0)
    few = rng.standard_normal((*x.shape[:-1], 2)) @ rng.standard_normal((2, C))
    few = jnp.asarray(few + others * np.asarray(x, np.float32), jnp.bfloat16)
    step = trained(dense)
    args = (few, w, scale, shift, g)
    check(step, args, rewritten(raised(step, *args)), floor=1e-4)


@pytest.mark.parametrize("others", [0.1, 0.03])
def test_weights_against_a_common_part(others):
    """What all columns of x have in common, 10 and 30 times the rest, is no part of y."""
    rng = np.random.default_rng(0)
    x, w, scale, shift, g = arguments(mean=0)
    common = np.abs(rng.standard_normal((*x.shape[:-1], 1)))
    x = jnp.asarray(common + others * np.asarray(x, np.float32), jnp.bfloat16)
    w = np.asarray(w, np.float32)
    args = (x, jnp.asarray(w - w.mean(0), jnp.bfloat16), scale, shift, g)
    step = trained(dense)
    check(step, args, rewritten(raised(step, *args)), floor=1e-4)


@pytest.mark.parametrize(("fun", "others"), [(dense, 1.0), (dense, 0.1), (transposed, 1.0)])
def test_cotangents_along_the_result(fun, others):
    """A gradient of which little is left."""
    x, w, scale, shift, g = arguments(fun)
    y = fun(x, w, 1.0, 0.0)[0]
    args = (x, w, scale, shift, (wide(y) + others * wide(g)).astype(g.dtype))
    step = trained(fun)
    check(step, args, rewritten(raised(step, *args)))


def test_columns_without_variance():
    x, w, scale, shift, g = arguments()
    args = (x.at[..., :3].set(2.0), w.at[3:, :5].set(0.0).at[:, 0].set(0.0), scale, shift, g)
    got = evaluate(rewritten(raised(trained(dense), *args)), *args)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in got)
    np.testing.assert_array_equal(np.asarray(got[2])[:5] < 1e-5, True)


def test_the_sum_of_products():
    """Products of 16 bits, operands contiguous along what is contracted: one kernel takes them."""
    args = arguments()
    after = rewritten(raised(trained(dense), *args))
    sums = [
        eqn
        for eqn in after.eqns
        if eqn.primitive is lax.add_p and eqn.outvars[0].aval.shape == args[0].shape
    ]
    makers = {v: eqn for eqn in after.eqns for v in eqn.outvars}
    first, second = sums
    products = [makers[v] for v in (*first.invars, second.invars[1])]
    assert second.invars[0] is first.outvars[0]
    assert [eqn.primitive for eqn in products] == [lax.dot_general_p] * 3
    assert all(v.aval.dtype == BFLOAT16 for eqn in products for v in eqn.invars)
    assert [eqn.params["dimension_numbers"][0] for eqn in products] == [((2,), (1,))] * 3


def test_steps_of_a_scan():
    args = arguments()

    def steps(x, w, scale, shift, g):
        def step(w, _):
            y, *_, dx, dw, _, _ = trained(dense)(x, w, scale, shift, g)
            return w - (0.01 * wide(dw)).astype(w.dtype), (y, dx)

        w, (y, dx) = lax.scan(step, w, length=2)
        return w, y, dx

    before = raised(steps, *args)
    after = rewritten(before)
    assert count(before, "norm_gradient") == 1 > count(after, "norm_gradient")
    check(steps, args, after, floor=1e-3)


def test_bottleneck():
    rng = np.random.default_rng(0)
    shapes = ((1, 1, 16, 4), (3, 3, 4, 4), (1, 1, 4, 32), (1, 1, 16, 32))
    params = [
        (
            jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.bfloat16),
            jnp.asarray(rng.uniform(0.5, 1.5, shape[-1]), jnp.float32),
            jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32),
        )
        for shape in shapes
    ]
    x = jnp.asarray(rng.standard_normal((4, 10, 12, 16)), jnp.bfloat16)
    target = jnp.asarray(rng.standard_normal((4, 5, 6, 32)), jnp.float32)
    notes: list[str] = []
    before = raised(resnet_block.step, params, x, target)
    after = dce.run(product_norms.run(before, CUDA, notes.append))
    assert notes == ["batch norms of products: 2 without the product in memory"]
    got = evaluate(after, *jax.tree.leaves((params, x, target)), compiled=True)
    want = jax.tree.leaves(jax.jit(resnet_block.step)(params, x, target))
    assert max(errors(got, want)) < 2e-2
    assert count(before, "norm_gradient") == 4
    assert count(after, "norm_gradient") == 2  # 1×1 to few columns, and 3×3


def test_inside_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local(x, w, scale, shift, g):
        y, mean, variance, dx, *gradients = trained(dense)(x, w, scale, shift, g)
        means = [lax.pmean(a, "data") for a in (mean, variance)]
        return y, *means, dx, *gradients

    step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, whole, whole, whole, rows),
        out_specs=(rows, whole, whole, rows, whole, whole, whole),
    )
    args = arguments()
    partitioned = dataclasses.replace(CUDA, partitioned=True)
    before = raised(step, *args)
    after = rewritten(before, partitioned)
    assert count(before, "norm_gradient") == 1 > count(after, "norm_gradient")
    check(trained(dense), args, after)
    outside = raised(trained(dense), *args)
    assert product_norms.run(outside, partitioned) is outside


def returned(x, w, scale, shift):
    y = x @ w
    return normalised(y, scale, shift)[0], y


def read_by_others(x, w, scale, shift):
    y = x @ w
    return normalised(y, scale, shift)[0] + jnp.sin(y), scale


def normalised_twice(x, w, scale, shift):
    y = x @ w
    z, mean, variance = normalised(y, scale, shift)
    return z + (wide(y) * mean).astype(y.dtype), variance


def biased(x, w, scale, shift):
    return normalised(x @ w + shift.astype(x.dtype), scale, shift)


def two_passes(x, w, scale, shift):
    z = wide(x @ w)
    centred = z - z.mean((0, 1))
    rstd = lax.rsqrt(jnp.square(centred).mean((0, 1)) + 1e-5)
    return (centred * rstd * scale + shift).astype(x.dtype), rstd


def layer_norm(x, w, scale, shift):
    z = wide(x @ w)
    mean = z.mean(-1, keepdims=True)
    variance = jnp.square(z).mean(-1, keepdims=True) - jnp.square(mean)
    return ((z - mean) * lax.rsqrt(variance + 1e-5) * scale + shift).astype(x.dtype), mean


def over_some_rows(x, w, scale, shift):
    y, *statistics = jax.vmap(lambda y: normalised(y, scale, shift))(x @ w)
    return y, *statistics


def of_a_constant_input(x, w, scale, shift):
    return dense(lax.stop_gradient(x), w, scale, shift)


def of_a_constant_weight(x, w, scale, shift):
    return dense(x, lax.stop_gradient(w), scale, shift)


def with_axes_of_batch(x, w, scale, shift):
    y = jnp.einsum("btc,bcn->btn", x, jnp.stack([w] * x.shape[0]))
    return normalised(y, scale, shift)


LEFT_ALONE = [
    *(returned, read_by_others, normalised_twice, biased, two_passes, layer_norm, over_some_rows),
    *(of_a_constant_input, of_a_constant_weight, with_axes_of_batch),
]


@pytest.mark.parametrize("fun", LEFT_ALONE)
def test_left_alone(fun):
    before = raised(trained(fun), *arguments())
    assert count(before, "norm_statistics") == 1
    assert product_norms.run(before, CUDA) is before


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_types_are_left_alone(dtype):
    x, w, scale, shift, g = arguments()
    before = raised(trained(dense), x.astype(dtype), w.astype(dtype), scale, shift, g)
    assert count(before, "norm_gradient") == 1
    assert product_norms.run(before, CUDA) is before


def test_cotangents_in_float32_are_left_alone():
    def step(x, w, scale, shift, g):
        y, vjp = jax.vjp(lambda x, w: wide(normalised(wide(x @ w), scale, shift)[0]), x, w)
        return y, *vjp(wide(g) / 3)

    before = raised(step, *arguments())
    assert count(before, "norm_gradient") == 1
    assert product_norms.run(before, CUDA) is before


def test_without_a_gradient():
    before = raised(dense, *arguments()[:-1])
    assert count(before, "norm_statistics") == 1
    assert product_norms.run(before, CUDA) is before


@pytest.mark.parametrize("columns", [C // 2, C, 2 * C - 1])
def test_few_columns_are_left_alone(columns):
    x, w, scale, shift, g = arguments()
    args = (x, w[:, :columns], scale[:columns], shift[:columns], g[..., :columns])
    before = raised(trained(dense), *args)
    assert count(before, "norm_gradient") == 1
    assert product_norms.run(before, CUDA) is before


def test_what_costs_more_is_left_alone():
    before = raised(trained(dense), *arguments())
    launches = dataclasses.replace(CUDA, device=DEVICES["H100"])
    assert product_norms.run(before, launches) is before
    slow = dataclasses.replace(CUDA, device=dataclasses.replace(DEVICE, cublas_flops_per_us=1.0))
    assert product_norms.run(before, slow) is before


def of_resnet(x, w, scale, shift, other, g):
    """The end of a bottleneck between the products of its neighbours."""

    def layer(x, w, scale, shift, other):
        return jax.nn.relu(normalised(x @ w, scale, shift)[0] + other)

    y, vjp = jax.vjp(layer, x, w, scale, shift, other)
    return y, *vjp(g)


def test_plan():
    """y and dy are in no memory, and the product's kernel has normalisation, residual and relu."""
    rows, narrow, columns = 100352, 128, 512
    shapes = [(rows, narrow), (narrow, columns), (columns,), (columns,), *[(rows, columns)] * 2]
    types = [BFLOAT16, BFLOAT16, np.float32, np.float32, BFLOAT16, BFLOAT16]
    jaxpr = jax.make_jaxpr(of_resnet)(*map(jax.ShapeDtypeStruct, shapes, types))
    context = dataclasses.replace(CUDA, device=DEVICES["H100"])
    notes: list[str] = []
    for _, graph_pass in pipeline.graph_passes(context, notes.append):
        jaxpr = graph_pass(jaxpr)
    assert any("without the product in memory" in note for note in notes)
    plan = partition(jaxpr.with_consts(()), context)
    large = [
        group
        for group in plan.groups
        for v in group.jaxpr.outvars
        if v.aval.size == rows * columns and v.aval.dtype == BFLOAT16
    ]
    # The result, and the residual's gradient, which is what the norm's gradient begins with.
    assert len(large) == 2
    forward = next(g for g in large if any(e.primitive is lax.max_p for e in g.jaxpr.eqns))
    assert forward.kind == "gemm" and forward.target == "triton"
    assert sum(e.primitive is lax.dot_general_p for e in forward.jaxpr.eqns) == 1


def test_only_for_gpus():
    names = {name for name, _ in pipeline.graph_passes(CUDA)}
    assert "product_norms" in names
    for other in (
        dataclasses.replace(CUDA, platform="cpu"),
        dataclasses.replace(CUDA, backend="xla"),
        dataclasses.replace(CUDA, partitioned=True),
    ):
        assert "product_norms" not in {name for name, _ in pipeline.graph_passes(other)}
