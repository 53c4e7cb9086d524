"""What the tests of lazy outputs share: a small train step, and looking at what it returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

import jevt

W = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
X = jnp.linspace(0.0, 2.0, 20).reshape(5, 4)
Y = jnp.array([0, 2, 1, 1, 0])


def loss_fn(w, x, y):
    logits = jnp.tanh(x @ w)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, {"accuracy": (logits.argmax(-1) == y).mean()}


def make_step(mark=jevt.lazy):
    def step(w, x, y):
        (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(w, x, y)
        return w - 0.1 * gradient, mark({"loss": loss, **metrics})

    return step


def is_lazy(tree):
    return [isinstance(x, jevt.LazyArray) for x in jax.tree.leaves(tree)]


def zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def names(trace, stage="dce"):
    return [e.primitive.name for e in trace.stage(stage).jaxpr.eqns]
