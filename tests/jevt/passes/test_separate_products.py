"""Large products that share an operand and are joined have barriers of their own, nothing else."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from rewriting import cleaned, count, evaluate, near, same, traced

from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.passes import dce, separate_products

CUDA = Context("cuda", "auto", False, (), DEVICES["H100"])
B, T, F = 3, 5, 8


@pytest.fixture
def small(monkeypatch):
    """Products of any size are large."""
    monkeypatch.setattr(separate_products, "LEAST_BYTES", 0)


def separated(jaxpr, context=CUDA):
    """The jaxpr after the pass, which is well-typed and idempotent."""
    return cleaned(functools.partial(separate_products.run, context=context), jaxpr, dce.run)


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def barriers(jaxpr):
    return [eqn for eqn in jaxpr.eqns if eqn.primitive is lax.optimization_barrier_p]


def apart(jaxpr):
    """Whether no two products have an operand in common, through views."""
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def source(atom):
        while atom in makers and makers[atom].primitive in (lax.reshape_p, lax.transpose_p):
            atom = makers[atom].invars[0]
        return atom

    products = [eqn for eqn in jaxpr.eqns if eqn.primitive is lax.dot_general_p]
    sources = [source(a) for eqn in products for a in eqn.invars]
    return len(set(sources)) == len(sources)


def forward(x, *weights):
    return [x @ w for w in weights]


def gradients(x, *outputs):
    return [jnp.einsum("btf,btc->fc", x, d) for d in outputs]


def transposed(x, *outputs):
    return [jnp.einsum("btf,btc->cf", x, d) for d in outputs]


def on_either_side(x, d, e):
    return jnp.einsum("btf,btc->fc", x, d), jnp.einsum("btc,btf->cf", e, x)


def seen_otherwise(x, d, e):
    flat = jnp.einsum("mf,mc->fc", x.reshape(B * T, F), d.reshape(B * T, F))
    return flat, jnp.einsum("btf,btc->fc", x, e)


def seen_transposed(x, d, e):
    y = x.transpose(2, 0, 1).reshape(F, B * T)
    return y @ d.reshape(B * T, F), jnp.einsum("btf,btc->fc", x, e)


def joined(fun):
    """The function, with what it returns side by side."""

    def whole(*args):
        return jnp.concatenate([jnp.ravel(y) for y in jax.tree.leaves(fun(*args))])

    return whole


SHARED = [gradients, transposed, on_either_side, seen_otherwise, seen_transposed]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("fun", SHARED)
def test_kept_apart(fun, dtype, small):
    args = arrays(*[(B, T, F)] * 3, dtype=dtype)
    before = traced(joined(fun), *args)
    after = separated(before)
    assert not apart(before) and apart(after)
    assert len(barriers(after)) == 1
    same(evaluate(after, *args), evaluate(before, *args))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_each_is_behind_one_barrier_more(number, small):
    args = arrays((B, T, F), *[(F, F)] * number)
    before = traced(joined(forward), *args)
    after = separated(before)
    # XLA would make one of equal barriers, and join the products that read its result.
    assert len({eqn.invars[0] for eqn in barriers(after)}) == len(barriers(after)) == number - 1
    assert apart(after)
    same(evaluate(after, *args), evaluate(before, *args))


def test_forward_and_backward_share_barriers(small):
    def step(x, w, v):
        return jax.vjp(lambda x, w, v: (x @ w, x @ v), x, w, v)[1]((x[..., :F], x[..., F:]))

    args = arrays((B, T, 2 * F), (2 * F, F), (2 * F, F))
    before = traced(joined(lambda x, w, v: (x @ w, x @ v, step(x, w, v))), *args)
    after = separated(before)
    assert count(after, "dot_general") == 6
    assert len(barriers(after)) == 1  # of x; two products contract its features, two its tokens
    near(evaluate(after, *args), evaluate(before, *args))


def test_products_that_share_both_operands(small):
    def fun(x, y, z):
        return x @ y.T, x @ z.T, z @ y.T

    args = arrays(*[(F, F)] * 3)
    after = separated(traced(joined(fun), *args))
    assert apart(after)
    same(evaluate(after, *args), evaluate(traced(joined(fun), *args), *args))


def test_views_stay_with_the_product(small):
    # XLA lets cuBLAS read a transposed operand; before a barrier it would be transposed in memory.
    def fun(x, w, v):
        return x.T @ w, x.T @ v

    args = arrays((B, F), (B, F), (B, F))
    after = separated(traced(joined(fun), *args))
    assert [eqn.invars[0] for eqn in barriers(after)] == [after.invars[0]]
    same(evaluate(after, *args), evaluate(traced(joined(fun), *args), *args))


def test_a_large_product_stays_apart_from_small_ones(monkeypatch):
    args = arrays((B, T, F), (F, F), (F, 100 * F), (F, 200 * F))
    monkeypatch.setattr(separate_products, "LEAST_BYTES", 4 * 100 * F * F)
    after = separated(traced(joined(forward), *args))
    sizes = [
        eqn.outvars[0].aval.shape[-1] // F
        for eqn in after.eqns
        if eqn.primitive is lax.dot_general_p and eqn.invars[0] is not after.invars[0]
    ]
    assert sizes == [100, 200] and apart(after)


def test_donated_inputs_are_left_alone(small):
    args = arrays((B, T, F), (F, F), (F, F))
    before = traced(joined(forward), *args)
    donated = dataclasses.replace(CUDA, donated=(True, False, False))
    assert separate_products.run(before, donated) is before
    others = dataclasses.replace(CUDA, donated=(False, True, True))
    assert count(separated(before, others), "optimization_barrier") == 1


def test_in_bodies(small):
    def loss(ws, x):
        def layer(x, w):
            return jnp.concatenate([x @ w[0], x @ w[1]], axis=1)[:, ::2], ()

        return lax.scan(layer, x, ws)[0].sum()

    args = arrays((2, 2, F, F), (B, F))
    before = traced(jax.value_and_grad(loss), *args)
    after = separated(before)
    assert count(before, "optimization_barrier") == 0 < count(after, "optimization_barrier")
    same(evaluate(after, *args, compiled=True), evaluate(before, *args, compiled=True))


def test_inside_shard_map_only(small):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_ = PartitionSpec("data"), PartitionSpec()
    inside = jax.shard_map(joined(forward), mesh=mesh, in_specs=(rows, all_, all_), out_specs=rows)
    args = arrays((B, T, F), (F, F), (F, F))
    partitioned = dataclasses.replace(CUDA, partitioned=True)
    before = traced(inside, *args)
    after = separated(before, partitioned)
    assert count(after, "optimization_barrier") == 1
    same(evaluate(after, *args, compiled=True), evaluate(before, *args, compiled=True))
    outside = traced(joined(forward), *args)
    assert separate_products.run(outside, partitioned) is outside


def one_product(x, d, e):
    return x @ d[0].T, e


def nothing_shared(x, d, e):
    return x @ d[0].T, e @ d[1].T


def other_axes(x, d, e):
    # One contracts the tokens, one the features.
    return jnp.einsum("btf,btc->fc", x, d), jnp.einsum("btf,sf->bts", x, e[0])


def with_a_batch(x, d, e):
    return jnp.einsum("btf,btc->bfc", x, d), jnp.einsum("btf,btc->fc", x, e)


def with_itself(x, d, e):
    return jnp.einsum("btf,btg->fg", x, x), d, e


LEFT_ALONE = [one_product, nothing_shared, other_axes, with_a_batch, with_itself]


@pytest.mark.parametrize("fun", SHARED)
def test_products_that_nobody_joins_are_left_alone(fun, small):
    before = traced(fun, *arrays(*[(B, T, F)] * 3))
    assert separate_products.run(before, CUDA) is before


@pytest.mark.parametrize("fun", LEFT_ALONE)
def test_left_alone(fun, small):
    before = traced(joined(fun), *arrays(*[(B, T, F)] * 3))
    assert separate_products.run(before, CUDA) is before


def test_small_products_are_left_alone():
    before = traced(joined(gradients), *arrays(*[(B, T, F)] * 3))
    assert separate_products.run(before, CUDA) is before


@pytest.mark.parametrize("dtype", [jnp.float8_e5m2, jnp.int32, jnp.complex64])
def test_types_whose_cost_is_not_known_are_left_alone(dtype, small):
    args = [jax.ShapeDtypeStruct((B, T, F), dtype)] * 3
    before = traced(joined(gradients), *args)
    assert separate_products.run(before, CUDA) is before
