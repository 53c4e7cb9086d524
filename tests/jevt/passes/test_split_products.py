"""Products that are read in parts become products of the parts, with the same values."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from rewriting import cleaned, count, evaluate, largest, near

from jevt import _jax_internals as internals
from jevt import pipeline
from jevt._context import Context
from jevt.partition import partition
from jevt.partition.cost import DEVICES
from jevt.passes import cse, dce, raise_attention, sink_constants, split_products
from jevt.pipeline import GRAPH_PASSES

# A call costs nothing, so that small arrays are as profitable as large ones.
DEVICE = dataclasses.replace(DEVICES["H100"], xla_launch_us=0.0)
CUDA = Context("cuda", "auto", False, (), DEVICE)
B, T, H, D = 3, 37, 3, 8
F = H * D


@pytest.fixture
def small(monkeypatch):
    """Products of any size are split."""
    monkeypatch.setattr(split_products, "LEAST_BYTES", 0)
    monkeypatch.setattr(split_products, "MIN_COLUMNS", 8)


def canonical(fun, *args):
    """What the pass is given: attention of any type is a call."""
    jaxpr = jax.make_jaxpr(fun)(*args)
    for _, graph_pass in GRAPH_PASSES:
        jaxpr = graph_pass(jaxpr)
    jaxpr = raise_attention.run(sink_constants.run(jaxpr), CUDA, obstacle=lambda case, context: "")
    return dce.run(cse.run(jaxpr))


def split(jaxpr, context=CUDA):
    """The jaxpr after the pass, which is well-typed and idempotent."""
    return cleaned(functools.partial(split_products.run, context=context), jaxpr, cse.run, dce.run)


def largest_slice(jaxpr) -> int:
    """Elements of the largest array that a slice is taken of, bodies included."""
    return largest(jaxpr, lambda e: e.invars[0].aval.size if e.primitive is lax.slice_p else 0)


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal(shape) / math.sqrt(shape[0]), dtype) for shape in shapes
    ]


def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v)


def heads(x):
    return x.reshape(*x.shape[:-1], -1, D)


def by_index(x, w, b):
    y = (x @ w + b).reshape(*x.shape[:-1], 3, H, D)
    return attend(y[..., 0, :, :], y[..., 1, :, :], y[..., 2, :, :])


def by_split(x, w, b):
    return attend(*map(heads, jnp.split(x @ w + b, 3, -1)))


def interleaved(x, w, b):
    y = (x @ w + b).reshape(*x.shape[:-1], H, 3, D)
    return attend(y[..., 0, :], y[..., 1, :], y[..., 2, :])


def transposed(x, w, b):
    y = (x @ w + b).reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4)
    q, k, v = y
    s = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k) * D**-0.5)
    return jnp.einsum("bhqk,bhkd->bqhd", s, v)


def einsum(x, w, b):
    y = jnp.einsum("btf,fkhd->btkhd", x, w.reshape(F, 3, H, D)) + b.reshape(3, H, D)
    return attend(y[:, :, 0], y[:, :, 1], y[:, :, 2])


def scaled_and_cast(x, w, b):
    y = lax.dot_general(x, w, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    y = (y * 0.5 + b).astype(x.dtype)
    return attend(*map(heads, jnp.split(y, 3, -1)))


def flattened(x, w, b):
    y = (x.reshape(B * T, F) @ w + b).reshape(B, T, 3 * H, D)
    return attend(y[:, :, :H], y[:, :, H : 2 * H], y[:, :, 2 * H :])


def convolutions(x, w, b):
    p, q, r = jnp.split(x @ w + b, 3, -1)
    kernel = jnp.ones((3, F, F), x.dtype) / F
    return sum(
        lax.conv_general_dilated(y, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        for y in (p, q, r)
    )


def products(x, w, b):
    p, q, r = jnp.split(x @ w + b, 3, -1)
    return (p @ w) * (q @ w) + r @ w


SPELLINGS = [
    *(by_index, by_split, interleaved, transposed, einsum, scaled_and_cast, flattened),
    *(convolutions, products),
]


def operands(dtype=jnp.float32):
    return arrays((B, T, F), (F, 3 * F), (3 * F,), dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("fun", SPELLINGS)
def test_same_values(fun, dtype, small):
    args = operands(dtype)
    before = canonical(fun, *args)
    after = split(before)
    assert largest_slice(before) >= B * T * 3 * F
    assert largest_slice(after) <= F * 3 * F
    assert count(after, "dot_general") == count(before, "dot_general") + 2
    near(evaluate(after, *args), evaluate(before, *args))
    wide = [a.astype(jnp.float32) for a in args]
    near(evaluate(after, *args), [jax.jit(fun)(*wide).astype(dtype)])


@pytest.mark.parametrize("fun", [by_index, transposed, einsum])
def test_gradients(fun, small):
    def step(*args):
        return jax.value_and_grad(lambda *a: (fun(*a) ** 2).sum(), (0, 1, 2))(*args)

    args = operands()
    before = canonical(step, *args)
    after = split(before)
    assert largest_slice(before) > F * 3 * F >= largest_slice(after)
    # The backward pass reads the gradient of q, k and v as one array.
    assert count(after, "dot_general") == count(before, "dot_general") + 2
    near(evaluate(after, *args), evaluate(before, *args))
    near(jax.tree.leaves(evaluate(after, *args)), jax.tree.leaves(jax.jit(step)(*args)), 1e-4)


def test_heads_of_two_kinds(small):
    def grouped(x, w):
        q, k, v = jnp.split(x @ w, [4 * D, 5 * D], -1)
        return attend(heads(q), heads(k), heads(v))

    args = arrays((B, T, 16), (16, 6 * D))
    before = canonical(grouped, *args)
    after = split(before)
    widths = [e.outvars[0].aval.shape[-1] for e in after.eqns if e.primitive is lax.dot_general_p]
    assert widths == [4 * D, D, D]
    near(evaluate(after, *args), evaluate(before, *args))


@pytest.mark.parametrize("order", ["qkv", "kvq", "kqv"])
def test_narrow_parts_stay_together(order, small, monkeypatch):
    widths = {"q": 5 * D, "k": D, "v": D}

    def one_key_head(x, w, b):
        y = jnp.split(x @ w + b, np.cumsum([widths[name] for name in order])[:-1], -1)
        parts = dict(zip(order, y, strict=True))
        return attend(*(heads(parts[name]) for name in "qkv"))

    args = arrays((B, T, 8), (8, 7 * D), (7 * D,))
    monkeypatch.setattr(split_products, "MIN_COLUMNS", 2 * D)
    before = canonical(one_key_head, *args)
    if order == "kqv":  # none of the two has a neighbour
        assert split_products.run(before, CUDA) is before
        return
    after = split(before)
    found = [e.outvars[0].aval.shape[-1] for e in after.eqns if e.primitive is lax.dot_general_p]
    assert sorted(found) == [2 * D, 5 * D]
    near(evaluate(after, *args), evaluate(before, *args))


def test_what_kernels_read_stays_together(small):
    def rotated(x, w):
        q, k, v = (heads(part) for part in jnp.split(x @ w, 3, -1))
        return attend(jnp.sin(q), jnp.sin(k), v)

    args = arrays((B, T, 8), (8, 3 * F))
    before = canonical(rotated, *args)
    after = split(before)
    found = [e.outvars[0].aval.shape[-1] for e in after.eqns if e.primitive is lax.dot_general_p]
    assert sorted(found) == [F, 2 * F]
    near(evaluate(after, *args), evaluate(before, *args))


def test_only_what_is_read_is_computed(small):
    def some(x, w):
        y = x @ w
        return attend(heads(y[..., F : 2 * F]), heads(y[..., F : 2 * F]), heads(y[..., :F]))

    args = operands()[:2]
    before = canonical(some, *args)
    after = split(before)
    sizes = [e.outvars[0].aval.size for e in after.eqns if e.primitive is lax.dot_general_p]
    assert sizes == [B * T * F] * 2
    near(evaluate(after, *args), evaluate(before, *args))


def test_weight_on_the_left(small):
    # The parts are rows of the result: pieces of its memory unless the batch comes first.
    def left(w, x):
        y = jnp.einsum("brf,btf->brt", w, x)
        kernel = jnp.ones((3, T, T), x.dtype)
        return [
            lax.conv_general_dilated(
                p, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
            for p in jnp.split(y, 3, 1)
        ]

    args = arrays((B, 3 * F, 4), (B, T, 4))
    before = canonical(left, *args)
    after = split(before)
    assert count(after, "dot_general") == 3
    near(evaluate(after, *args), evaluate(before, *args))


def test_vmap_over_weights(small):
    args = arrays((2, B, T, F), (2, F, 3 * F), (2, 3 * F))
    before = canonical(jax.vmap(by_index), *args)
    after = split(before)
    assert largest_slice(after) <= 2 * F * 3 * F < largest_slice(before)
    near(evaluate(after, *args), evaluate(before, *args))


def test_layers_of_a_scan(small):
    def loss(w, b, x):
        def layer(x, parameters):
            return x + by_index(x, *parameters).reshape(x.shape), ()

        return (lax.scan(layer, x, (w, b))[0] ** 2).sum()

    w, b, x = arrays((2, F, 3 * F), (2, 3 * F), (B, T, F))
    step = jax.value_and_grad(loss, (0, 1, 2))
    before = canonical(step, w, b, x)
    after = split(before)
    assert largest_slice(before) > F * 3 * F >= largest_slice(after)
    near(evaluate(after, w, b, x, compiled=True), evaluate(before, w, b, x, compiled=True))


def test_inside_shard_map_only(small):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_ = PartitionSpec("data"), PartitionSpec()
    inside = jax.shard_map(by_index, mesh=mesh, in_specs=(rows, all_, all_), out_specs=rows)
    args = operands()
    partitioned = dataclasses.replace(CUDA, partitioned=True)
    before = canonical(inside, *args)
    after = split(before, partitioned)
    assert largest_slice(after) <= F * 3 * F < largest_slice(before)
    near(evaluate(after, *args, compiled=True), evaluate(before, *args, compiled=True))
    outside = canonical(by_index, *args)
    assert split_products.run(outside, partitioned) is outside


def whole_is_read(x, w, b):
    y = x @ w + b
    return attend(*map(heads, jnp.split(y, 3, -1))), y


def whole_is_summed(x, w, b):
    y = x @ w + b
    return attend(*map(heads, jnp.split(y, 3, -1))), y.sum(-1)


def gate(x, w, b):
    p, q, r = jnp.split(x @ w + b, 3, -1)
    return jax.nn.silu(p) * q * r


def rotated(x, w, b):
    # Each part is changed by a kernel, which reads its slice in place.
    return attend(*(jnp.sin(heads(p)) for p in jnp.split(x @ w + b, 3, -1)))


def overlapping(x, w, b):
    y = x @ w + b
    return attend(heads(y[..., :F]), heads(y[..., F // 3 : F // 3 + F]), heads(y[..., 2 * F :]))


def rows_of_the_result(x, w, b):
    y = x.reshape(B, T, F) @ w[:, :F] + b[:F]
    return attend(heads(y[:1]), heads(y[1:2]), heads(y[2:]))


def other_order(x, w, b):
    y = (x @ w + b).reshape(B, T, 3, H, D)
    kernel = jnp.ones((3, T, T), x.dtype)
    return [
        lax.conv_general_dilated(
            y[:, :, i].reshape(B, T, F).transpose(0, 2, 1),
            kernel,
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        for i in range(3)
    ]


def separate(x, w, b):
    q, k, v = (x @ w[:, i * F : (i + 1) * F] + b[i * F : (i + 1) * F] for i in range(3))
    return attend(heads(q), heads(k), heads(v))


LEFT_ALONE = [
    *(whole_is_read, whole_is_summed, gate, rotated, overlapping, rows_of_the_result),
    *(other_order, separate),
]


@pytest.mark.parametrize("fun", LEFT_ALONE)
def test_left_alone(fun, small):
    before = canonical(fun, *operands())
    assert split_products.run(before, CUDA) is before


@pytest.mark.parametrize(("name", "value"), [("LEAST_BYTES", 1 << 20), ("MIN_COLUMNS", F + 1)])
def test_small_parts_are_left_alone(name, value, small, monkeypatch):
    before = canonical(by_index, *operands())
    assert split_products.run(before, CUDA) is not before
    monkeypatch.setattr(split_products, name, value)
    assert split_products.run(before, CUDA) is before


@pytest.mark.parametrize("dtype", [jnp.float8_e5m2, jnp.int32, jnp.complex64])
def test_types_whose_cost_is_not_known_are_left_alone(dtype, small):
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((B * T, F), (F, 3 * F))]
    before = canonical(lambda x, w: jnp.split(x @ w, 3, -1), *args)
    assert split_products.run(before, CUDA) is before


def test_few_rows_are_left_alone(small):
    x, w, b = operands()
    before = canonical(by_index, x[:1, :2], w, b)
    assert split_products.run(before, CUDA) is before


def random_chain(seed):
    """A product, random views and small operands, and its parts; and arguments."""
    rng = np.random.default_rng(seed)
    batch, rows, columns = (
        (2,) * rng.integers(2),
        (5, 7),
        tuple(rng.permutation([2, 3, 4]).tolist()),
    )
    weight_first, steps = bool(rng.integers(2)), rng.integers(0, 5, size=4).tolist()
    x, w = arrays((*batch, *rows, 3), (*batch, 3, math.prod(columns)))

    def fun(x, w):
        rng = np.random.default_rng(seed)
        free = ["ij", "c"][:: -1 if weight_first else 1]
        b = "b" * len(batch)
        y = jnp.einsum(f"{b}ijk,{b}kc->{b}{free[0]}{free[1]}", x, w)
        axes = [*b, *free[0], *free[1]]
        for step in steps:
            if step == 0 and "c" in axes:
                at = axes.index("c")
                y = y.reshape(*y.shape[:at], *columns, *y.shape[at + 1 :])
                axes[at : at + 1] = "lmn"
            elif step == 1:
                order = rng.permutation(len(axes)).tolist()
                y, axes = y.transpose(order), [axes[i] for i in order]
            elif step == 2:
                small = [n if a in "clmn" else 1 for a, n in zip(axes, y.shape, strict=True)]
                y = y + rng.standard_normal(small).astype(np.float32)
            elif step == 3:
                y = jnp.maximum(y, rng.standard_normal()) * 2
            else:
                y, axes = jnp.expand_dims(y, 1), [axes[0], "", *axes[1:]]
        at = axes.index(rng.choice([a for a in axes if a and a in "clmn"]))
        return jnp.split(y, [1, y.shape[at] - 1] if y.shape[at] > 2 else 2, at)

    return fun, (x, w)


def test_random_chains(small, monkeypatch):
    monkeypatch.setattr(split_products, "cublas_us", lambda eqn, device: 0.0)
    monkeypatch.setattr(split_products, "MIN_COLUMNS", 1)
    count_of_split = 0
    for seed in range(12):
        fun, args = random_chain(seed)
        before = canonical(fun, *args)
        after = split_products.run(before, CUDA)
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


def test_nothing_large_is_copied(monkeypatch):
    """A ViT-B's block at its full size, forward and backward."""
    b, t, h, d = 128, 256, 12, 64

    def step(x, w, bias):
        def loss(*args):
            x, w, bias = args
            y = (x @ w + bias).reshape(b, t, 3, h, d)
            return (attend(y[:, :, 0], y[:, :, 1], y[:, :, 2]) ** 2).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(x, w, bias)

    shapes = ((b, t, h * d), (h * d, 3 * h * d), (3 * h * d,))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    result = plan(step, *args, monkeypatch=monkeypatch)
    assert [g.kind for g in result.groups].count("attention") == 2
    assert largest_slice(result.jaxpr) == math.prod(shapes[1])
    monkeypatch.setattr(split_products, "MIN_COLUMNS", 1 << 20)
    unsplit = plan(step, *args, monkeypatch=monkeypatch)
    assert largest_slice(unsplit.jaxpr) == 3 * math.prod(shapes[0])
    times = [sum(g.predicted_us or 0 for g in p.groups) for p in (result, unsplit)]
    assert times[0] < times[1] - 60
