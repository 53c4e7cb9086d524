"""Concatenations that products read become products with each part, with the same values."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import raised
from jax import lax
from jax.sharding import PartitionSpec
from rewriting import cleaned, count, evaluate, largest, near, relative_norm, traced

from jevt import _jax_internals as internals
from jevt import pipeline
from jevt._context import Context
from jevt.partition import partition, products, siblings
from jevt.partition.cost import DEVICES
from jevt.passes import cse, dce, split_concatenations

# Launches cost nothing, and arithmetic what it does in large products: nearly everything.
DEVICE = dataclasses.replace(
    DEVICES["H100"], xla_launch_us=0.0, triton_launch_us=0.0, cublas_flops_per_us=1e4
)
CUDA = Context("cuda", "auto", False, (), DEVICE)
B, T, H, D = 3, 101, 3, 8
F = H * D


@pytest.fixture
def small(monkeypatch):
    """Concatenations of any size are split; XLA pads no operand of a small product."""
    monkeypatch.setattr(products, "_SPLIT_RESULTS", 0)
    monkeypatch.setattr(split_concatenations, "LEAST_BYTES", 0)
    monkeypatch.setattr(split_concatenations, "MIN_COLUMNS", 1)


def split(jaxpr, context=CUDA):
    """The jaxpr after the pass, which is well-typed and idempotent."""
    run = functools.partial(split_concatenations.run, context=context)
    return cleaned(run, jaxpr, cse.run, dce.run)


def largest_joined(jaxpr) -> int:
    """Elements of the largest concatenation, bodies included."""
    joins = lax.concatenate_p
    return largest(jaxpr, lambda e: e.outvars[0].aval.size if e.primitive is joins else 0)


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal(shape) / math.sqrt(shape[-1]), dtype) for shape in shapes
    ]


def gradients(join):
    """What reads the joined gradient of a layer ``y @ w + b``, as autodiff writes it."""

    def fun(y, w, *parts):
        d = join(*parts)
        d_y = jnp.einsum("btc,fc->btf", d, w)
        d_w = jnp.einsum("btf,btc->fc", y, d)
        return d_y, d_w, d.sum((0, 1))

    return fun


def along_columns(*parts):
    return jnp.concatenate(parts, -1)


def along_tokens_first(*parts):
    # As with the batch in one axis; the products see it otherwise.
    flat = [x.reshape(B * T, -1) for x in parts]
    return jnp.concatenate(flat, -1).reshape(B, T, -1)


def in_heads(*parts):
    heads = [x.reshape(B, T, -1, D) for x in parts]
    return jnp.concatenate(heads, 2).reshape(B, T, -1)


WIDTHS = [(F, F), (F, F, F), (3 * D, D), (D, 4 * D, 2 * D), (2 * D, D, 3 * D, D)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("join", [along_columns, along_tokens_first, in_heads])
@pytest.mark.parametrize("widths", WIDTHS)
def test_same_values(widths, join, dtype, small):
    parts = [(B, T, width) for width in widths]
    args = arrays((B, T, D), (D, sum(widths)), *parts, dtype=dtype)
    before = traced(gradients(join), *args)
    after = split(before)
    assert largest_joined(before) == B * T * sum(widths)
    assert largest_joined(after) == D * sum(widths)  # the weight's gradient
    assert count(after, "dot_general") == 2 * len(widths)
    near(evaluate(after, *args), evaluate(before, *args))
    wide = [a.astype(jnp.float32) for a in args]
    near(evaluate(after, *args), [v.astype(dtype) for v in jax.jit(gradients(join))(*wide)])


def test_stacked(small):
    def stacked(y, w, q, k, v):
        d = jnp.stack([q, k, v], 2)
        d_y = jnp.einsum("btkhd,fkhd->btf", d, w.reshape(F, 3, H, D))
        d_w = jnp.einsum("btf,btkhd->fkhd", y, d)
        return d_y, d_w, d.sum((0, 1))

    args = arrays((B, T, F), (F, 3 * F), *[(B, T, H, D)] * 3)
    before = raised(stacked, *args)[0]
    after = split(before)
    assert largest_joined(after) == F * 3 * F
    near(evaluate(after, *args), jax.jit(stacked)(*args))


def test_in_the_middle_of_an_axis(small):
    # Each head has its query, key and value side by side.
    def interleaved(y, w, q, k, v):
        return gradients(lambda *p: jnp.stack(p, 3).reshape(B, T, -1))(y, w, q, k, v)

    args = arrays((B, T, F), (F, 3 * F), *[(B, T, H, D)] * 3)
    before = raised(interleaved, *args)[0]
    after = split(before)
    assert largest_joined(after) == F * 3 * F
    near(evaluate(after, *args), jax.jit(interleaved)(*args))


def test_on_the_right(small):
    # The concatenation is the right operand, and the products have a batch.
    def right(x, y, *parts):
        d = jnp.concatenate(parts, 1)
        return jnp.einsum("brc,bcd->brd", x, d), jnp.einsum("btd,bcd->btc", y, d)

    args = arrays((B, 4, 5 * D), (B, 4, F), (B, 2 * D, F), (B, 3 * D, F))
    before = traced(right, *args)
    after = split(before)
    assert largest_joined(after) == B * 4 * 5 * D < largest_joined(before)
    assert count(after, "dot_general") == 4
    near(evaluate(after, *args), jax.jit(right)(*args))


def test_products_in_float32_of_narrow_operands(small):
    def wide(y, w, *parts):
        d = jnp.concatenate(parts, -1)
        product = jnp.einsum("btc,fc->btf", d, w, preferred_element_type=jnp.float32)
        return product, d.astype(jnp.float32).sum((0, 1))

    args = arrays((B, T, F), (F, 3 * F), *[(B, T, F)] * 3, dtype=jnp.bfloat16)
    before = traced(wide, *args)
    after = split(before)
    assert count(after, "dot_general") == 3
    got, want = evaluate(after, *args), evaluate(before, *args)
    assert relative_norm(got, want) < 1e-6  # nothing is rounded on the way


def test_the_order_of_a_sum(small):
    # With the product on the left, XLA adds what there is so far in cuBLAS's call.
    args = arrays((B, T, F), (F, 3 * F), *[(B, T, F)] * 3)
    after = split(traced(gradients(along_columns), *args))
    makers = {v: eqn for eqn in after.eqns for v in eqn.outvars}
    sums = [eqn for eqn in after.eqns if eqn.primitive is lax.add_p]
    assert len(sums) == 2
    for eqn in sums:
        assert makers[eqn.invars[0]].primitive is lax.dot_general_p


def test_error_of_rounded_sums(small):
    """Each of three products is rounded, and each sum: five times for one."""
    args = arrays((B, T, 64), (64, 3 * 64), *[(B, T, 64)] * 3, dtype=jnp.bfloat16)
    before = traced(gradients(along_columns), *args)
    exact = jax.jit(gradients(along_columns))(*[a.astype(jnp.float32) for a in args])
    after = split(before)
    assert largest_joined(after) < largest_joined(before)
    one, three = (relative_norm(evaluate(j, *args)[:1], exact[:1]) for j in (before, after))
    assert 1e-3 < one < three < 1.8 * one


def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v)


def heads(x):
    return x.reshape(*x.shape[:-1], -1, D)


def by_index(x, w, b):
    y = (x @ w + b).reshape(*x.shape[:-1], 3, H, D)
    return attend(y[..., 0, :, :], y[..., 1, :, :], y[..., 2, :, :])


def by_split(x, w, b):
    return attend(*map(heads, jnp.split(x @ w + b, 3, -1)))


def causal(x, w, b):
    q, k, v = map(heads, jnp.split(x @ w + b, 3, -1))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def interleaved(x, w, b):
    y = (x @ w + b).reshape(*x.shape[:-1], H, 3, D)
    return attend(y[..., 0, :], y[..., 1, :], y[..., 2, :])


def heads_first(x, w, b):
    q, k, v = (heads(p).transpose(0, 2, 1, 3) for p in jnp.split(x @ w + b, 3, -1))
    s = (q @ k.swapaxes(-1, -2)) * D**-0.5
    s = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), s, -jnp.inf)
    return (jax.nn.softmax(s) @ v).transpose(0, 2, 1, 3)


def einsum(x, w, b):
    y = jnp.einsum("btf,fkhd->btkhd", x, w.reshape(F, 3, H, D)) + b.reshape(3, H, D)
    return attend(y[:, :, 0], y[:, :, 1], y[:, :, 2])


def grouped(x, w, b):
    y = x @ w[:, : 5 * D] + b[: 5 * D]
    return attend(*map(heads, jnp.split(y, [3 * D, 4 * D], -1)))


def trained(fun):
    def step(*args):
        return jax.value_and_grad(lambda *a: (fun(*a) ** 2).sum(), (0, 1, 2))(*args)

    return step


def operands(dtype=jnp.float32):
    return arrays((B, T, F), (F, 3 * F), (3 * F,), dtype=dtype)


SPELLINGS = [by_index, by_split, causal, interleaved, heads_first, einsum, grouped]


@pytest.mark.parametrize("fun", SPELLINGS)
def test_gradients_of_attention(fun, small):
    args = operands()
    before = raised(trained(fun), *args)[0]
    after = split(before)
    assert count(before, "attention_backward") == 1
    assert largest_joined(after) <= F * 3 * F < largest_joined(before)
    # One forward; of each part, the gradients with respect to input and weight.
    assert count(after, "dot_general") == count(before, "dot_general") + 4
    near(evaluate(after, *args), evaluate(before, *args))
    near(
        jax.tree.leaves(evaluate(after, *args)), jax.tree.leaves(jax.jit(trained(fun))(*args)), 1e-4
    )


def test_layers_of_a_scan(small):
    def loss(w, b, x):
        def layer(x, parameters):
            return x + by_index(x, *parameters).reshape(x.shape), ()

        return (lax.scan(layer, x, (w, b))[0] ** 2).sum()

    w, b, x = arrays((2, F, 3 * F), (2, 3 * F), (B, T, F))
    step = jax.value_and_grad(loss, (0, 1, 2))
    before = raised(step, w, b, x)[0]
    after = split(before)
    assert largest_joined(after) <= F * 3 * F < largest_joined(before)
    near(evaluate(after, w, b, x, compiled=True), evaluate(before, w, b, x, compiled=True))


def test_vmap_over_weights(small):
    args = arrays((2, B, T, F), (2, F, 3 * F), *[(2, B, T, F)] * 3)
    before = traced(jax.vmap(gradients(along_columns)), *args)
    after = split(before)
    assert largest_joined(after) == 2 * F * 3 * F < largest_joined(before)
    near(evaluate(after, *args), evaluate(before, *args))


def test_inside_shard_map_only(small):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_ = PartitionSpec("data"), PartitionSpec()
    fun = gradients(along_columns)

    def summed(*args):
        d_y, d_w, d_b = fun(*args)
        return d_y, lax.psum(d_w, "data"), lax.psum(d_b, "data")

    specs = (rows, all_, rows, rows)
    inside = jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=(rows, all_, all_))
    args = arrays((B, T, F), (F, 2 * F), (B, T, F), (B, T, F))
    partitioned = dataclasses.replace(CUDA, partitioned=True)
    before = traced(inside, *args)
    after = split(before, partitioned)
    assert largest_joined(after) == F * 2 * F < largest_joined(before)
    near(evaluate(after, *args, compiled=True), evaluate(before, *args, compiled=True))
    outside = traced(fun, *args)
    assert split_concatenations.run(outside, partitioned) is outside


def whole_is_returned(y, w, *parts):
    d = along_columns(*parts)
    return *gradients(along_columns)(y, w, *parts), d


def whole_is_changed(y, w, *parts):
    d = along_columns(*parts)
    return *gradients(along_columns)(y, w, *parts), jnp.sin(d).sum((0, 1))


def summed_across_parts(y, w, *parts):
    d = along_columns(*parts)
    return *gradients(along_columns)(y, w, *parts), d.sum(-1)


def parts_are_computed(y, w, *parts):
    return gradients(along_columns)(y, w, *(jnp.sin(part) for part in parts))


def parts_are_transposed(y, w, *parts):
    # cuBLAS would need copies of the parts, in another order.
    parts = (p.reshape(B, H, T, D).transpose(0, 2, 1, 3).reshape(B, T, F) for p in parts)
    return gradients(along_columns)(y, w, *parts)


def whole_is_transposed(y, w, *parts):
    d = along_columns(*parts).reshape(B, T, 3 * H, D).transpose(0, 2, 1, 3).reshape(B, -1, T, D)
    return (jnp.einsum("bhtd,hdf->btf", d, w.reshape(3 * H, D, F)),)


def whole_is_cut_elsewhere(y, w, *parts):
    # Columns of two parts are in one row of five.
    d = along_columns(*parts).reshape(B, T, 8, 3 * F // 8)
    return (jnp.einsum("btij,fij->btf", d, w.reshape(F, 8, 3 * F // 8)),)


def multiplied_with_itself(y, w, *parts):
    d = along_columns(*parts)
    return (jnp.einsum("btc,btd->cd", d, d),)


def batch(y, w, *parts):
    d = jnp.concatenate(parts, 0)
    return (jnp.einsum("btc,bsc->bts", d, d + 1),)


LEFT_ALONE = [
    *(whole_is_returned, whole_is_changed, summed_across_parts, parts_are_computed),
    *(parts_are_transposed, whole_is_transposed, multiplied_with_itself, batch),
    whole_is_cut_elsewhere,
]


@pytest.mark.parametrize("fun", LEFT_ALONE)
def test_left_alone(fun, small):
    args = arrays((B, T, F), (F, 3 * F), *[(B, T, F)] * 3)
    before = traced(fun, *args)
    assert count(before, "concatenate") > 0
    assert split_concatenations.run(before, CUDA) is before


@pytest.mark.parametrize(("name", "value"), [("LEAST_BYTES", 1 << 20), ("MIN_COLUMNS", F + 1)])
def test_small_parts_are_left_alone(name, value, small, monkeypatch):
    args = arrays((B, T, F), (F, 3 * F), *[(B, T, F)] * 3)
    before = traced(gradients(along_columns), *args)
    assert split_concatenations.run(before, CUDA) is not before
    monkeypatch.setattr(split_concatenations, name, value)
    assert split_concatenations.run(before, CUDA) is before


def test_what_costs_more_is_left_alone(small):
    args = arrays((B, T, F), (F, 3 * F), *[(B, T, F)] * 3)
    before = traced(gradients(along_columns), *args)
    launches = dataclasses.replace(DEVICE, xla_launch_us=2.0)
    assert split_concatenations.run(before, dataclasses.replace(CUDA, device=launches)) is before


@pytest.mark.parametrize("dtype", [jnp.float8_e5m2, jnp.int32, jnp.complex64])
def test_types_whose_cost_is_not_known_are_left_alone(dtype, small):
    shapes = ((B, T, F), (F, 2 * F), (B, T, F), (B, T, F))
    before = traced(
        lambda y, w, *parts: jnp.einsum("btc,fc->btf", along_columns(*parts), w),
        *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes),
    )
    assert split_concatenations.run(before, CUDA) is before


def random_program(seed):
    """Parts, their concatenation through random views, and products and sums that read it."""
    rng = np.random.default_rng(seed)
    widths = (rng.integers(1, 4, size=rng.integers(2, 5)) * 6).tolist()
    axis, others = int(rng.integers(3)), (7, 6)
    shapes = [(*others[:axis], width, *others[axis:]) for width in widths]

    def fun(*parts):
        rng = np.random.default_rng(seed)
        d = jnp.concatenate(parts, axis)
        for step in rng.integers(0, 3, size=3):
            at = int(rng.integers(d.ndim))
            if step == 0 and d.shape[at] % 2 == 0:
                d = d.reshape(*d.shape[:at], d.shape[at] // 2, 2, *d.shape[at + 1 :])
            elif step == 1 and at > 0 and d.ndim > 2:
                d = d.reshape(*d.shape[: at - 1], -1, *d.shape[at + 1 :])
            else:
                d = d.reshape(*d.shape[:at], 1, *d.shape[at:])
        n = int(rng.integers(1, d.ndim))
        rows, columns = list(range(n)), list(range(n, d.ndim))
        left, right = (
            rng.standard_normal(s).astype(np.float32) for s in (d.shape[:n], d.shape[n:])
        )
        return (
            jnp.tensordot(left[None], d, ([r + 1 for r in rows], rows)),
            jnp.tensordot(d, right[..., None], (columns, list(range(len(columns))))),
            *([d.sum(tuple(rows))] if rng.integers(2) else []),
        )

    return fun, arrays(*shapes)


def test_random_programs(small, monkeypatch):
    monkeypatch.setattr(split_concatenations, "cublas_us", lambda eqn, device: 0.0)
    count_of_split = 0
    for seed in range(12):
        fun, args = random_program(seed)
        before = traced(fun, *args)
        after = split_concatenations.run(before, CUDA)
        jax.extend.core.check_jaxpr(after)
        near(evaluate(dce.run(after), *args, compiled=True), evaluate(before, *args, compiled=True))
        count_of_split += after is not before
    assert count_of_split > 4


def plan(fun, *args, monkeypatch):
    """The plan of a program as for an H100 with cuDNN."""
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91900)
    context = Context("cuda", "auto", False, (False,) * len(args), DEVICES["H100"])
    jaxpr = jax.make_jaxpr(fun)(*args)
    for _, graph_pass in pipeline.graph_passes(context):
        jaxpr = graph_pass(jaxpr)
    return partition(jaxpr, context)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_large_is_joined(is_causal, monkeypatch):
    """A ViT-B's block and a GPT-2's at their full size, forward and backward."""
    b, t, h, d = (16, 1024, 12, 64) if is_causal else (128, 256, 12, 64)

    def step(x, w, bias):
        def loss(*args):
            x, w, bias = args
            y = (x @ w + bias).reshape(b, t, 3, h, d)
            y = jax.nn.dot_product_attention(
                y[:, :, 0], y[:, :, 1], y[:, :, 2], is_causal=is_causal
            )
            return (y**2).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(x, w, bias)

    shapes = ((b, t, h * d), (h * d, 3 * h * d), (3 * h * d,))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    result = plan(step, *args, monkeypatch=monkeypatch)
    assert [g.kind for g in result.groups].count("attention") == 2
    assert largest_joined(result.jaxpr) == math.prod(shapes[1])
    # XLA does not join the weight's gradients again.
    (weight,) = (e for e in result.jaxpr.eqns if e.outvars == [result.jaxpr.outvars[2]])
    assert siblings.merged(result.jaxpr).isdisjoint(weight.invars)
    # The additions are in kernels of products.
    adding = [g for g in result.groups if any(e.primitive is lax.add_p for e in g.jaxpr.eqns)]
    assert {g.kind for g in adding} == {"gemm"}
    monkeypatch.setattr(split_concatenations, "MIN_COLUMNS", 1 << 20)
    whole = plan(step, *args, monkeypatch=monkeypatch)
    assert largest_joined(whole.jaxpr) == 3 * math.prod(shapes[0])
    times = [sum(g.predicted_us or 0 for g in p.groups) for p in (result, whole)]
    copy = 2 * 2 * largest_joined(whole.jaxpr) / DEVICES["H100"].bytes_per_us  # no group counts it
    assert times[0] < times[1] + copy - (10 if is_causal else 30)
