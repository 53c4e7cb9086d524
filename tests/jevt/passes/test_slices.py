"""Parts of arrays are slices: the same values, in the form that kernels read in place."""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewriting import count, evaluate, same

from jevt._jaxpr import extract
from jevt.lowering import spec
from jevt.passes import canonicalize, cse, dce, inline, slices


def traced(fun, *args):
    jaxpr = jax.make_jaxpr(fun)(*args)
    for graph_pass in (inline.run, dce.run, cse.run, canonicalize.run, dce.run):
        jaxpr = graph_pass(jaxpr)
    return jaxpr


def checked(fun, *args):
    """The jaxpr after the pass, which keeps values and is idempotent."""
    before = traced(fun, *args)
    after = slices.run(before)
    jax.extend.core.check_jaxpr(after)
    assert after.out_avals == before.out_avals
    assert slices.run(after) is after
    same(evaluate(after, *args), evaluate(before, *args))
    return dce.run(cse.run(after))


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_split(axis, dtype):
    after = checked(lambda x: lax.split(x, (1, 3, 2), axis), array(6, 6, 6, dtype=dtype))
    assert count(after, "split") == 0 and count(after, "slice") == 3


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_unstack(axis):
    after = checked(lambda x: tuple(jnp.unstack(x, axis=axis)), array(3, 4, 5))
    assert count(after, "unstack") == 0


@pytest.mark.parametrize(
    "take", [lambda y: (y[0], y[1], y[2]), tuple, lambda y: lax.split(y, (1, 4), 3)]
)
def test_transposition_of_a_part(take):
    after = checked(lambda x: take(x.transpose(2, 0, 3, 1, 4)), array(2, 5, 3, 3, 4))
    for eqn in after.eqns:
        if eqn.primitive is lax.slice_p:
            assert eqn.invars[0] in after.invars
        if eqn.primitive is lax.transpose_p:
            assert eqn.outvars[0].aval.size < 2 * 5 * 3 * 3 * 4


def test_parts_of_parts_with_steps():
    after = checked(lambda x: x.T[1:5, ::2].T[:, 1:], array(7, 6))
    assert all(e.outvars[0].aval.size <= 16 for e in after.eqns if e.primitive is lax.slice_p)


def test_a_part_of_a_product_is_read_in_place():
    def gate(x, w):
        a, b = jnp.split(x @ w, 2, -1)
        return jax.nn.silu(a) * b

    x, w = array(64, 32), array(32, 256)
    after = checked(gate, x, w)
    gate_alone = [i for i, e in enumerate(after.eqns) if e.primitive is not lax.dot_general_p]
    kernel = spec.build(extract(after, gate_alone), "gate")
    assert kernel.mainloop == "pointwise" and len(kernel.inputs) == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stack(axis):
    after = checked(lambda *x: jnp.unstack(jnp.sin(jnp.stack(x, axis))), *[array(3, 4)] * 3)
    assert count(after, "stack") == 0 and count(after, "concatenate") == 1


@pytest.mark.parametrize(
    "join",
    [
        lambda *x: lax.stack(x, axis=0).transpose(1, 3, 0, 2),
        lambda *x: jnp.concatenate([y[None] for y in x]).transpose(1, 3, 0, 2),
        lambda *x: jnp.concatenate([y[:, None] for y in x], 2).transpose(2, 0, 1, 3),
    ],
    ids=["stack", "new axis", "old axis"],
)
def test_transposition_of_parts(join):
    after = checked(join, *[array(2, 3, 4, dtype=jnp.bfloat16) + i for i in range(3)])
    assert count(after, "stack") == 0 and count(after, "concatenate") == 1
    for eqn in after.eqns:
        if eqn.primitive is lax.transpose_p:
            assert eqn.outvars[0].aval.size == 2 * 3 * 4


def test_gradient_of_transposed_parts_is_side_by_side():
    def loss(y, weights):
        q, k, v = y.reshape(2, 5, 3, 4, 6).transpose(2, 0, 3, 1, 4)
        return (q * k * v * weights).sum()

    after = checked(jax.grad(loss), array(2, 5, 72), array(2, 4, 5, 6))
    (joined,) = (e for e in after.eqns if e.primitive is lax.concatenate_p)
    assert joined.outvars[0].aval.shape == (2, 5, 3, 4, 6)
    assert count(after, "add_any") + count(after, "pad") == 0


def test_gradients_and_loops():
    def loss(w, xs):
        def layer(x, w):
            a, b = jnp.split(x @ w, 2, -1)
            return x + jnp.tanh(a) * b, ()

        return (lax.scan(layer, xs, w)[0] ** 2).sum()

    after = checked(jax.grad(loss), array(3, 4, 8), array(5, 4))
    assert count(after, "split") == 0 and count(after, "slice") > 0


def test_a_stack_that_is_read_twice_is_not_taken_apart():
    after = checked(lambda x, y: [z := lax.stack([x, y], axis=0), z.T], *[array(3, 4)] * 2)
    assert count(after, "concatenate") == 1


def test_vmapped():
    after = checked(jax.vmap(lambda x: jnp.split(x.T, 2)), array(3, 5, 4))
    assert count(after, "split") == 0


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: (x.T[0], x.T),
        lambda x: (x.T[0], jnp.sin(x.T)),
        lambda x: jnp.unstack(x[0]),
        lambda x: jnp.split(jax.random.split(jax.random.key(0), 4), 2),
        lambda x: jnp.unstack(jnp.tile(x, (slices.MAX_PARTS, 1))),
        lambda x: [y := jnp.concatenate([x, x + 1]), y.T],
    ],
    ids=["returned", "read whole", "scalars", "keys", "many", "returned as well"],
)
def test_left_alone(fun):
    before = traced(fun, array(4, 4))
    assert slices.run(before) is before
