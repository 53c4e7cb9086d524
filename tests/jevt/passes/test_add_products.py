"""Products that are added up are one sum of products; others stay as they are."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from rewriting import cleaned, count, evaluate, traced

from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.passes import add_products, dce
from jevt_kernels.mainloops.terms import MOST_TERMS

CUDA = Context("cuda", "auto", False, (), DEVICES["H100"])
B, T, H, D, F = 2, 5, 3, 4, 7


@pytest.fixture
def cheap(monkeypatch):
    """One kernel is faster, however small."""
    monkeypatch.setattr(add_products, "cublas_us", lambda eqn, device: 1e6)


def added(jaxpr, context=CUDA):
    """The jaxpr after the pass, which is well-typed and idempotent."""
    return cleaned(functools.partial(add_products.run, context=context), jaxpr, dce.run)


def arrays(*shapes, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def error(jaxpr, fun, args):
    """The relative error of the results, against float64 and of those of the program as it is."""
    with jax.enable_x64(True):
        exact = fun(*(np.asarray(a, np.float64) for a in args))
    reference = [np.asarray(r, np.float64) for r in jax.tree.leaves(exact)]

    def norm(results):
        return max(
            np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
            for got, want in zip(jax.tree.leaves(results), reference, strict=True)
        )

    return norm(evaluate(jaxpr, *args)), norm(jax.jit(fun)(*args))


def products(*args):
    return functools.reduce(jnp.add, [x @ y for x, y in zip(args[::2], args[1::2], strict=True)])


def projections(dq, dk, dv, wq, wk, wv):
    """The gradient of what queries, keys and values are made of."""
    pairs = (dq, wq), (dk, wk), (dv, wv)
    return functools.reduce(jnp.add, [jnp.einsum("bthd,fhd->btf", d, w) for d, w in pairs])


PROJECTIONS = [(B, T, H, D)] * 3 + [(F, H, D)] * 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_projections(dtype, cheap):
    args = arrays(*PROJECTIONS, dtype=dtype)
    jaxpr = added(traced(projections, *args))
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["product_sum"]
    ours, theirs = error(jaxpr, projections, args)
    assert ours <= 1.1 * theirs + 1e-3


def test_different_extents_of_k(cheap):
    def fun(g, x, a, b):
        return g @ a + x @ b

    args = arrays((9, 16), (9, 4), (16, 5), (4, 5))
    jaxpr = added(traced(fun, *args))
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["product_sum"]
    ours, theirs = error(jaxpr, fun, args)
    assert ours <= 1.1 * theirs + 1e-3


def test_residuals_are_added_behind(cheap):
    def fun(r, x, a, s, y, b):
        return (r + x @ a) + (s + y @ b)

    args = arrays((6, 8), (6, 4), (4, 8), (6, 8), (6, 3), (3, 8))
    jaxpr = added(traced(fun, *args))
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["product_sum", "add", "add"]
    ours, theirs = error(jaxpr, fun, args)
    assert ours <= 1.1 * theirs + 1e-3


def test_batches(cheap):
    def fun(x, y, v, w):
        return x @ y + jnp.einsum("bmk,bnk->bmn", v, w) + x @ (2 * y)

    args = arrays((3, 4, 5), (3, 5, 6), (3, 4, 7), (3, 6, 7))
    jaxpr = added(traced(fun, *args))
    # The operands of one kernel agree in whether they are contiguous along k.
    assert count(jaxpr, "product_sum") == 1 and count(jaxpr, "dot_general") == 1
    ours, theirs = error(jaxpr, fun, args)
    assert ours <= 1.1 * theirs + 1e-3


def test_at_most_so_many(cheap):
    args = arrays(*[(4, 4)] * (2 * MOST_TERMS + 2))
    jaxpr = added(traced(products, *args))
    assert count(jaxpr, "product_sum") == 1 and count(jaxpr, "dot_general") == 1


def test_the_body_of_a_loop(cheap):
    def fun(x, ws):
        return lax.scan(lambda x, w: (x @ w[0] + jnp.tanh(x) @ w[1], None), x, ws)[0]

    args = arrays((4, 8), (3, 2, 8, 8))
    jaxpr = added(traced(fun, *args))
    assert count(jaxpr, "product_sum") == 1 and not count(jaxpr, "dot_general")
    ours, theirs = error(jaxpr, fun, args)
    assert ours <= 1.1 * theirs + 1e-3


@pytest.mark.parametrize(
    "fun",
    [
        lambda x, y: (lambda p: (p + y @ x, p))(x @ y),  # a product is read twice
        lambda x, y: (x @ y) - (y @ x),
        lambda x, y: (x @ y) + y,
        lambda x, y: (x @ y)[0] + (y @ x),
        lambda x, y: (x @ y).T + (y @ x),
        lambda x, y: (lambda p: p + p)(x @ y),
        lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32).sum() + (y @ x),
    ],
)
def test_left_alone(fun, cheap):
    args = arrays((8, 8), (8, 8))
    before = traced(fun, *args)
    assert added(before) == before


def test_float32_is_left_alone(cheap):
    args = arrays((8, 8), (8, 8), dtype=jnp.float32)
    before = traced(lambda x, y: x @ y + y @ x, *args)
    assert added(before) == before


def test_small_products_are_left_alone(monkeypatch):
    args = arrays((8, 8), (8, 8))
    before = traced(lambda x, y: x @ y + y @ x, *args)
    monkeypatch.setattr(add_products, "cublas_us", lambda eqn, device: 0.0)
    assert added(before) == before


def test_large_ones_are_added():
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in [(16384, 1024), (1024, 1024)] * 3]

    jaxpr = added(traced(products, *shapes))
    assert count(jaxpr, "product_sum") == 1 and not count(jaxpr, "dot_general")


def test_automatic_partitioning(cheap):
    args = arrays((8, 8), (8, 8))
    before = traced(lambda x, y: x @ y + y @ x, *args)
    assert added(before, dataclasses.replace(CUDA, partitioned=True)) == before


def test_inside_shard_map(cheap):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_ = PartitionSpec("data"), PartitionSpec()
    specs = (rows, all_, rows, all_)
    args = arrays((8, 4), (4, 8), (8, 3), (3, 8))

    def fun(x, a, y, b):
        return x @ a + y @ b

    inside = jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=rows)
    jaxpr = added(traced(inside, *args), dataclasses.replace(CUDA, partitioned=True))
    assert count(jaxpr, "product_sum") == 1
    (ours,) = evaluate(jaxpr, *args, compiled=True)
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), np.asarray(fun(*args), np.float32), rtol=2e-2, atol=2e-2
    )
