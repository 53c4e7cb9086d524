"""What a region reads of earlier ones, and that what is computed again has the same bits."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.extend.core import Literal

from jevt import pipeline
from jevt._context import Context
from jevt.lowering import rules
from jevt.partition import graph as graphs
from jevt.partition.cost import DEVICES
from jevt.partition.recompute import recompute

H200 = DEVICES["H200"]
ROWS = 400


def prepared(function, *arguments):
    """The function's jaxpr after the passes, and the same after recomputation."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    context = Context("cuda", "auto", False, (False,) * len(jaxpr.invars), H200)
    for _, run in pipeline.graph_passes(context):
        jaxpr = run(jaxpr)
    return jaxpr, recompute(graphs.from_jaxpr(jaxpr, rules.classify), H200)


def crossing(jaxpr, size):
    """dtypes of values of at least ``size`` elements that are read across a matrix product.

    An equation that only later ones read counts as standing beside them.
    """
    heavy = [eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns]
    maker = {v: p for p, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    read = [[v for v in eqn.invars if v in maker] for eqn in map(variables, jaxpr.eqns)]
    depth = []
    for position in range(len(jaxpr.eqns)):
        depth.append(max((depth[maker[v]] for v in read[position]), default=0) + heavy[position])
    place = [len(jaxpr.eqns)] * len(jaxpr.eqns)
    for position in reversed(range(len(jaxpr.eqns))):
        escapes = any(v in jaxpr.outvars for v in jaxpr.eqns[position].outvars)
        if heavy[position] or escapes:
            place[position] = depth[position]
        for v in read[position]:
            before = place[position] - heavy[position]
            place[maker[v]] = min(place[maker[v]], before)
    found = {
        v: str(v.aval.dtype)
        for position, variables_read in enumerate(read)
        for v in variables_read
        if not heavy[position] and place[maker[v]] < place[position] and v.aval.size >= size
    }
    return sorted(found.values())


def variables(eqn):
    return eqn.replace(invars=[v for v in eqn.invars if not isinstance(v, Literal)])


def same_bits(before, after, *arguments):
    flat = jax.tree.leaves(arguments)
    for got, want in zip(
        jax.core.eval_jaxpr(after, after.consts, *flat),
        jax.core.eval_jaxpr(before, before.consts, *flat),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def layer_norm(x, scale):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + 1e-6) * scale).astype(x.dtype)


def through(activation):
    """The gradients of ``w`` and what ``activation`` takes, around two matrix products."""

    def step(arguments, v, w):
        def loss(arguments, v, w):
            first, *rest = arguments
            return jnp.square((activation(first @ v, *rest) @ w).astype(jnp.float32)).sum()

        return jax.grad(loss, (0, 1, 2))(arguments, v, w)

    return step


def random(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_layer_norm_keeps_its_input_and_its_statistics():
    arguments = ((random(ROWS, 96), random(96, dtype="float32")), random(96, 96), random(96, 32))
    before, after = prepared(through(layer_norm), *arguments)
    assert "float32" in crossing(before, ROWS * 96)
    assert crossing(after, ROWS * 96) == ["bfloat16"]
    same_bits(before, after, *arguments)


def test_gelu_keeps_its_input():
    arguments = ((random(ROWS, 96),), random(96, 96), random(96, 32))
    step = through(lambda x: jax.nn.gelu(x, approximate=False))
    before, after = prepared(step, *arguments)
    assert len(crossing(before, ROWS * 96)) > 1
    assert len(crossing(after, ROWS * 96)) == 1
    same_bits(before, after, *arguments)


def test_softmax_keeps_its_input_and_its_statistics():
    def softmax(x):
        return jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype)

    arguments = ((random(ROWS, 96),), random(96, 96), random(96, 32))
    before, after = prepared(through(softmax), *arguments)
    assert "float32" in crossing(before, ROWS * 96)
    assert crossing(after, ROWS * 96) == ["bfloat16"]
    same_bits(before, after, *arguments)


def test_random_bits_are_kept_rather_than_made_again():
    """A mask is a byte an element; its bits take a hundred operations."""

    def dropout(x, key):
        keep = jax.random.bernoulli(key, 0.9, x.shape)
        return jnp.where(keep, x * 1.1, 0).astype(x.dtype)

    def step(x, key, v, w):
        return jax.grad(lambda x: jnp.square(dropout(jnp.tanh(x @ v), key) @ w).sum())(x)

    arguments = random(ROWS, 96), jax.random.PRNGKey(0), random(96, 96), random(96, 32)
    before, after = prepared(step, *arguments)
    assert "bool" in crossing(after, ROWS * 96)
    same_bits(before, after, *arguments)


def test_what_would_read_more_is_kept():
    """A sum of four tensors is one; the four are four."""

    def step(a, b, c, d, w):
        total = jnp.tanh(a) + jnp.tanh(b) + jnp.tanh(c) + jnp.tanh(d)
        return jnp.exp(total @ w) * total

    tensors = [random(ROWS, ROWS, seed=s, dtype="float32") for s in range(5)]
    before, after = prepared(step, *tensors)
    assert after is before


def test_nothing_crosses_so_nothing_changes():
    before, after = prepared(lambda x: jnp.tanh(x).sum(-1), random(8, 8))
    assert after is before


def test_neither_reductions_nor_what_no_kernel_holds_are_repeated():
    arguments = ((random(ROWS, 96), random(96, dtype="float32")), random(96, 96), random(96, 32))
    before, after = prepared(through(layer_norm), *arguments)

    def counted(jaxpr):
        names = collections.Counter(e.primitive.name for e in jaxpr.eqns)
        return {n: c for n, c in names.items() if n.startswith("reduce_") or n == "dot_general"}

    assert len(after.eqns) > len(before.eqns)
    assert counted(after) == counted(before)


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_every_construct_keeps_its_values(name):
    function, arguments = programs.PROGRAMS[name]
    before, after = prepared(function, *arguments)
    flat = jax.tree.leaves(arguments)
    for got, want in zip(
        jax.core.eval_jaxpr(after, after.consts, *flat),
        jax.core.eval_jaxpr(before, before.consts, *flat),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
