"""Softmaxes and cross entropies in many spellings: what the tests of raising share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Jaxpr, check_jaxpr
from jax.lax import stop_gradient

from jevt.passes import cse, dce, raise_cross_entropy, raise_softmax


def raised(jaxpr: Jaxpr, *passes) -> tuple[Jaxpr, list[str]]:
    """The jaxpr with composites, and what the passes (that of softmaxes) note."""
    notes: list[str] = []
    result = jaxpr
    for graph_pass in passes or (raise_softmax,):
        before, result = result, dce.run(graph_pass.run(result, notes.append))
        check_jaxpr(result)
        assert result.out_avals == before.out_avals
        assert graph_pass.run(result) is result, "not idempotent"
    return result, notes


def with_cross_entropies(jaxpr: Jaxpr) -> tuple[Jaxpr, list[str]]:
    """As ``raised``, and what the pass of cross entropies makes of that and notes."""
    return raised(cse.run(raised(jaxpr)[0]), raise_cross_entropy)


def passes_over_rows(jaxpr: Jaxpr) -> int:
    """The longest chain of reductions, each of which needs the one before."""
    depth: dict = {}
    for eqn in jaxpr.eqns:
        known = [depth.get(a, 0) for a in eqn.invars if not hasattr(a, "val")]
        reduces = eqn.primitive.name in ("reduce_sum", "reduce_max")
        depth.update(dict.fromkeys(eqn.outvars, max(known, default=0) + reduces))
    return max(depth.values())


def exponential(x, axis=-1):
    return jnp.exp(x - stop_gradient(x.max(axis, keepdims=True)))


def over_total(x):
    return exponential(x) / exponential(x).sum(-1, keepdims=True)


def times_reciprocal(x):
    e = exponential(x)
    return e * (1 / e.sum(-1, keepdims=True))


def with_gradient_of_maximum(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def without_maximum(x):
    return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)


def masked_by_hand(x):
    mask = jnp.arange(x.shape[-1]) % 3 > 0
    top = stop_gradient(jnp.where(mask, x, -jnp.inf).max(-1, keepdims=True))
    e = jnp.where(mask, jnp.exp(x - top), 0)
    return e / e.sum(-1, keepdims=True)


def flattened(x):
    y = jax.nn.softmax(x.reshape(-1, x.shape[-1]))
    return y.reshape(x.shape)


SOFTMAX: dict[str, Callable] = {
    "jax.nn": jax.nn.softmax,
    "jax.nn, axis 1": lambda x: jax.nn.softmax(x, axis=1),
    "jax.nn, two axes": lambda x: jax.nn.softmax(x, axis=(0, 2)),
    "by hand": over_total,
    "by hand, a reciprocal": times_reciprocal,
    "by hand, the maximum differentiated": with_gradient_of_maximum,
    "by hand, no maximum": without_maximum,
    "exp(log_softmax)": lambda x: jnp.exp(jax.nn.log_softmax(x)),
    "exp(x - logsumexp)": lambda x: jnp.exp(x - jax.nn.logsumexp(x, -1, keepdims=True)),
    "temperature": lambda x: jax.nn.softmax(x / 0.7),
    "masked": lambda x: jax.nn.softmax(x + jnp.where(jnp.arange(x.shape[-1]) < 6, 0, -1e9)),
    "masked by select": lambda x: jax.nn.softmax(jnp.where(x > -0.5, x, -jnp.inf)),
    "where": lambda x: jax.nn.softmax(x, where=x > -0.5),
    "where, of columns": lambda x: jax.nn.softmax(x, 1, where=jnp.arange(5)[:, None] != 2),
    "where, of rows": lambda x: jax.nn.softmax(x, where=jnp.arange(5)[:, None] != 2),
    "where, by hand": masked_by_hand,
    "residual": lambda x: jax.nn.softmax(x) + jnp.sin(x),
    "reshaped": flattened,
}

LOGSUMEXP: dict[str, Callable] = {
    "jax.nn": lambda x: jax.nn.logsumexp(x, -1),
    "jax.nn, keepdims": lambda x: jax.nn.logsumexp(x, 1, keepdims=True),
    "log_softmax": jax.nn.log_softmax,
    "log_softmax, axis 0": lambda x: jax.nn.log_softmax(x, 0),
    "jax.nn, where": lambda x: jax.nn.logsumexp(x, -1, where=x > -0.5),
    "log_softmax, where": lambda x: jnp.where(x > 0, jax.nn.log_softmax(x, where=x > 0), 0),
    "by hand, no maximum": lambda x: jnp.log(jnp.exp(x).sum(-1)),
    "by hand": lambda x: jnp.log(exponential(x).sum(-1)) + stop_gradient(x.max(-1)),
}


def _picked(values, labels):
    return jnp.take_along_axis(values, labels[..., None], -1)[..., 0]


def _z_loss(x, labels):
    z = jax.nn.logsumexp(x, -1)
    return z - _picked(x, labels) + 1e-2 * z**2


def _z_loss_apart(x, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(x, labels)
    return loss + 1e-2 * jax.nn.logsumexp(x, -1) ** 2


def _ignored(x, labels):
    return jnp.where(labels == 3, 0, optax.softmax_cross_entropy_with_integer_labels(x, labels))


def _one_hot(x, labels):
    return jax.nn.one_hot(labels, x.shape[-1])


def _smooth(x, labels):
    return optax.softmax_cross_entropy(x, optax.smooth_labels(_one_hot(x, labels), 0.1))


def _smooth_by_hand(x, labels):
    smooth = 0.9 * _one_hot(x, labels) + 0.1 / x.shape[-1]
    return -(smooth * jax.nn.log_softmax(x)).sum(-1)


def _smooth_by_mean(x, labels):
    log_p = jax.nn.log_softmax(x)
    return -0.9 * _picked(log_p, labels) - 0.1 * log_p.mean(-1)


#: Losses a row of logits and integer labels.
CROSS_ENTROPY: dict[str, Callable] = {
    "optax, integers": optax.softmax_cross_entropy_with_integer_labels,
    "optax, one hot": lambda x, n: optax.softmax_cross_entropy(x, _one_hot(x, n)),
    "optax, smoothed": _smooth,
    "smoothed by hand": _smooth_by_hand,
    "smoothed by the mean": _smooth_by_mean,
    "log_softmax": lambda x, n: -_picked(jax.nn.log_softmax(x), n),
    "log_softmax, one hot": lambda x, n: -(jax.nn.log_softmax(x) * _one_hot(x, n)).sum(-1),
    "logsumexp": lambda x, n: jax.nn.logsumexp(x, -1) - _picked(x, n),
    "z-loss": _z_loss,
    "z-loss apart": _z_loss_apart,
    "ignored labels": _ignored,
    "weights": lambda x, n: jnp.cos(n) * -_picked(jax.nn.log_softmax(x), n),
}


def training(fun: Callable) -> Callable:
    """``(x, g) -> (y, dx)``."""

    def step(x, g):
        y, vjp = jax.vjp(fun, x)
        return y, *vjp(g)

    return step


def step_of(loss: Callable) -> Callable:
    """``(x, labels) -> (mean loss, dx)``."""
    return jax.value_and_grad(lambda x, labels: loss(x, labels).mean())
