"""The usual losses, from optax and written by hand: name -> (function, kinds of arguments, sums).

Arguments are logits or predictions, and what the kind says. Sums are those that are left of the
loss with its gradient, and of the gradient alone: the numbers that the algebra cannot give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROWS, CLASSES = 6, 8


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what has to be left of it.

    Attributes:
      function: of the arrays that ``kinds`` names, differentiated in the first.
      kinds: "x" any numbers, "label" integers, "weights" rows that sum to 1, "flag" zeros and ones.
      sums: ``reduce_sum`` of loss and gradient.
      gradient_sums: … of the gradient alone.
      maxima: ``reduce_max`` in either.
    """

    function: Callable[..., jax.Array]
    kinds: tuple[str, ...]
    sums: int
    gradient_sums: int
    maxima: int = 0

    def arguments(self, dtype: str = "float32") -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [
            _array(kind, rng).astype(dtype if kind != "label" else "int32") for kind in self.kinds
        ]


def _array(kind: str, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=(ROWS, CLASSES))
    if kind == "label":
        return rng.integers(0, CLASSES, ROWS)
    if kind == "weights":
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return (x > 0) * 1.0 if kind == "flag" else x


def _probability_of_label(x, i):
    return -jnp.log(jax.nn.softmax(x)[jnp.arange(ROWS), i]).mean()


def _label_by_one_hot(x, i):
    return -(jax.nn.one_hot(i, CLASSES, dtype=x.dtype) * jax.nn.log_softmax(x)).sum(-1).mean()


def _maximum_differentiated(x, i):
    shift = x.max(-1, keepdims=True)
    log_sum = shift + jnp.log(jnp.exp(x - shift).sum(-1, keepdims=True))
    return -jnp.take_along_axis(x - log_sum, i[:, None], -1).mean()


def _padded(x, i):
    kept = (i != 1).astype(x.dtype)
    loss = optax.softmax_cross_entropy_with_integer_labels(x, i)
    return (loss * kept).sum() / kept.sum()


def _smoothed(x, i):
    labels = optax.smooth_labels(jax.nn.one_hot(i, CLASSES, dtype=x.dtype), 0.1)
    return optax.softmax_cross_entropy(x, labels).mean()


def _smoothed_by_mean(x, i):
    log_p = jax.nn.log_softmax(x)
    taken = jnp.take_along_axis(log_p, i[:, None], -1)[:, 0]
    return -(0.9 * taken + 0.1 * log_p.mean(-1)).mean()


def _z_loss(x, i):
    z = jax.nn.logsumexp(x, -1)
    return (optax.softmax_cross_entropy_with_integer_labels(x, i) + 1e-2 * z**2).mean()


def _z_loss_by_hand(x, i):
    shift = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    z = shift + jnp.log(jnp.exp(x - shift).sum(-1, keepdims=True))
    return (1e-2 * z**2 - jnp.take_along_axis(x - z, i[:, None], -1)).mean()


def _binary(x, y):
    return (jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x)))).mean()


def _binary_of_logarithms(x, y):
    return -(y * jax.nn.log_sigmoid(x) + (1 - y) * jax.nn.log_sigmoid(-x)).mean()


def _huber(x, y):
    d = jnp.abs(x - y)
    return jnp.where(d < 1, 0.5 * d * d, d - 0.5).mean()


def _divergence(x, t):
    log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(t)
    return (jnp.exp(log_q) * (log_q - log_p)).sum(-1).mean()


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _contrastive(x, y):
    scores, i = _unit(x) @ _unit(y).T * 5.0, jnp.arange(ROWS)
    both = (optax.softmax_cross_entropy_with_integer_labels(s, i) for s in (scores, scores.T))
    return sum(both).mean()


def _contrastive_by_diagonal(x, y):
    scores = x @ y.T / 0.7
    rows, columns = (jnp.diagonal(jax.nn.log_softmax(scores, axis)) for axis in (-1, 0))
    return -rows.mean() - columns.mean()


def _contrastive_by_eye(x, y):
    scores = x @ y.T / 0.7
    return -(jnp.eye(ROWS, dtype=x.dtype) * jax.nn.log_softmax(scores)).sum(-1).mean()


def _optax(function, *options, sum_rows=False):
    def loss(*args):
        values = function(*args, *options)
        return (values.sum(-1) if sum_rows else values).mean()

    return loss


def _of_softmax(function, t_too=False):
    return lambda x, t: function(
        jax.nn.log_softmax(x), jax.nn.log_softmax(t) if t_too else t
    ).mean()


# Left of a softmax cross entropy with its gradient are the sum of exponentials, the label's logit
# and the mean over rows; of the gradient alone the sum of exponentials. Labels that are not known
# to sum to 1 have to be summed.
LOSSES = {
    "labels": Loss(
        _optax(optax.softmax_cross_entropy_with_integer_labels), ("x", "label"), 3, 1, 1
    ),
    "labels_padded": Loss(_padded, ("x", "label"), 4, 2, 1),
    "labels_by_one_hot": Loss(_label_by_one_hot, ("x", "label"), 3, 1, 1),
    "labels_by_probability": Loss(_probability_of_label, ("x", "label"), 3, 2, 1),
    "labels_maximum_differentiated": Loss(_maximum_differentiated, ("x", "label"), 3, 1, 1),
    "soft_labels": Loss(_optax(optax.softmax_cross_entropy), ("x", "weights"), 4, 2, 1),
    "soft_labels_of_a_softmax": Loss(
        lambda x, t: optax.softmax_cross_entropy(x, jax.nn.softmax(t)).mean(), ("x", "x"), 4, 2, 2
    ),
    "smoothed": Loss(_smoothed, ("x", "label"), 3, 1, 1),
    "smoothed_by_mean": Loss(_smoothed_by_mean, ("x", "label"), 4, 1, 1),
    "z_loss": Loss(_z_loss, ("x", "label"), 3, 1, 1),
    "z_loss_by_hand": Loss(_z_loss_by_hand, ("x", "label"), 3, 1, 1),
    "binary": Loss(_optax(optax.sigmoid_binary_cross_entropy), ("x", "flag"), 1, 0),
    "binary_by_hand": Loss(_binary, ("x", "flag"), 1, 0),
    "binary_of_logarithms": Loss(_binary_of_logarithms, ("x", "flag"), 1, 0),
    "squares": Loss(_optax(optax.squared_error), ("x", "x"), 1, 0),
    "squares_by_hand": Loss(lambda x, y: ((x - y) ** 2).mean(), ("x", "x"), 1, 0),
    "squares_of_rows": Loss(_optax(optax.l2_loss, sum_rows=True), ("x", "x"), 2, 0),
    "huber": Loss(_optax(optax.huber_loss), ("x", "x"), 1, 0),
    "huber_by_hand": Loss(_huber, ("x", "x"), 1, 0),
    "divergence": Loss(_of_softmax(optax.losses.kl_divergence), ("x", "weights"), 4, 2, 1),
    "divergence_of_logarithms": Loss(
        _of_softmax(optax.losses.kl_divergence_with_log_targets, True), ("x", "x"), 4, 2, 2
    ),
    "divergence_by_hand": Loss(_divergence, ("x", "x"), 4, 2, 2),
    # Two norms, two softmaxes, and the gradient of a norm.
    "contrastive": Loss(_contrastive, ("x", "x"), 8, 5, 2),
    "contrastive_by_diagonal": Loss(_contrastive_by_diagonal, ("x", "x"), 6, 2, 2),
    "contrastive_by_eye": Loss(_contrastive_by_eye, ("x", "x"), 3, 1, 1),
    "cosine": Loss(_optax(optax.losses.cosine_distance), ("x", "x"), 4, 3),
}
