"""XML-CNN: 1-D convolutions over a document, then a sigmoid for every one of 670 208 labels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models._init import from_seed, init_variables
from benchmarks.models._losses import binary_cross_entropy
from benchmarks.options import Options
from benchmarks.shapes import XMLCNN, XmlcnnShape
from benchmarks.workload import Tree, Workload, sgd_step, training_state


class Xmlcnn(nn.Module):
    """Documents ``[batch, sequence, embedding]`` to logits ``[batch, labels]``."""

    shape: XmlcnnShape
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.shape
        dtypes = {"dtype": self.options.dtype, "param_dtype": self.options.param_dtype}
        pooled = []
        for width in s.widths:
            y = nn.Conv(s.filters, (width,), strides=(2,), **dtypes, name=f"conv_{width}")(x)
            window = y.shape[1] // s.pooled
            y = nn.max_pool(nn.relu(y), (window,), strides=(window,))
            pooled.append(y.reshape(y.shape[0], -1))
        x = nn.relu(nn.Dense(s.hidden, **dtypes, name="hidden")(jnp.concatenate(pooled, axis=1)))
        return nn.Dense(s.labels, **dtypes, name="labels")(x)


def multi_hot(key: jax.Array, batch: int, labels: int, positives: int) -> jax.Array:
    """``float32[batch, labels]`` with ``positives`` ones a row, made on the device by a scatter."""
    columns = jax.random.randint(key, (batch, positives), 0, labels)
    rows = jnp.arange(batch)[:, None]
    return jnp.zeros((batch, labels), jnp.float32).at[rows, columns].set(1.0)


def make(options: Options) -> Workload:
    """The training step of XML-CNN on random documents."""
    s = XMLCNN[options.size]
    model = Xmlcnn(s, options)
    size = (s.batch, s.sequence, s.embedding)

    def init(seed: int) -> Tree:
        documents = jax.ShapeDtypeStruct(size, jnp.dtype(options.dtype))
        return training_state(init_variables(model.init, seed, documents)["params"])

    def draw(key: jax.Array) -> Tree:
        k1, k2 = jax.random.split(key)
        return {
            "documents": jax.random.normal(k1, size, options.dtype),
            "labels": multi_hot(k2, s.batch, s.labels, s.positives),
        }

    def loss_fn(params: Tree, stats: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        logits = model.apply({"params": params}, batch["documents"])
        return binary_cross_entropy(logits, batch["labels"]), stats

    return Workload(
        "xmlcnn",
        sgd_step(loss_fn),
        init,
        batch=from_seed(draw),
        # An ideal kernel turns the logits into their gradient without storing them.
        on_chip=lambda aval: aval.shape == (s.batch, s.labels),
    )
