"""A GCN on one large graph, with the aggregation written two ways."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import sparse

from benchmarks.models._graph import Graph, ogbn_mag, power_law_graph
from benchmarks.models._init import from_seed, init_variables
from benchmarks.models._losses import cross_entropy
from benchmarks.options import Options
from benchmarks.shapes import GCN, GcnShape
from benchmarks.workload import Tree, Workload, sgd_step, training_state

Aggregation = Literal["segment_sum", "bcoo"]


def aggregate(h: jax.Array, graph: Graph, spelling: Aggregation) -> jax.Array:
    """A·h for ``h [nodes, features]`` and the weighted adjacency matrix A of the graph."""
    weight = graph.weight.astype(h.dtype)
    if spelling == "segment_sum":
        messages = h[graph.src] * weight[:, None]
        return jax.ops.segment_sum(messages, graph.dst, num_segments=h.shape[0])
    indices = jnp.stack([graph.dst, graph.src], axis=1)
    adjacency = sparse.BCOO((weight, indices), shape=(h.shape[0], h.shape[0]))
    return adjacency @ h


class Gcn(nn.Module):
    """Features ``[nodes, features]`` to logits ``[nodes, classes]``.

    Each convolution is h ← relu(A·(h W + b) + (h W + b)); a dense layer classifies.
    """

    shape: GcnShape
    options: Options
    aggregation: Aggregation

    @nn.compact
    def __call__(self, h: jax.Array, graph: Graph) -> jax.Array:
        dtypes = {"dtype": self.options.dtype, "param_dtype": self.options.param_dtype}
        for i in range(self.shape.convolutions):
            h = nn.Dense(self.shape.hidden, **dtypes, name=f"conv_{i}")(h)
            h = nn.relu(aggregate(h, graph, self.aggregation) + h)
        return nn.Dense(self.shape.classes, **dtypes, name="classes")(h)


def make(options: Options, aggregation: Aggregation = "segment_sum") -> Workload:
    """The training step of the GCN on the full graph; the graph is an argument of the step."""
    s = shape_of(options)
    model = Gcn(s, options, aggregation)

    def init(seed: int) -> Tree:
        features = jax.ShapeDtypeStruct((s.nodes, s.features), jnp.dtype(options.dtype))
        graph = jax.eval_shape(lambda: graph_of(s, options))
        return training_state(init_variables(model.init, seed, features, graph)["params"])

    draw = from_seed(functools.partial(_random_nodes, s, options.dtype))

    def batch(seed: int) -> Tree:
        nodes = draw(seed)
        if options.data:
            data = ogbn_mag(options.data)
            nodes = {"features": data.features.astype(options.dtype), "labels": data.labels}
        return nodes | {"graph": graph_of(s, options)}

    def loss_fn(params: Tree, stats: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        logits = model.apply({"params": params}, batch["features"], batch["graph"])
        return cross_entropy(logits, batch["labels"]), stats

    name = "gcn" if aggregation == "segment_sum" else "gcn-bcoo"
    return Workload(name, sgd_step(loss_fn), init, batch, on_chip=messages_stay_on_chip(s))


def shape_of(options: Options) -> GcnShape:
    """The shape of the run: of the real graph where its files are named."""
    s = GCN[options.size]
    if not options.data:
        return s
    with jax.ensure_compile_time_eval():
        data = ogbn_mag(options.data)
    return dataclasses.replace(s, nodes=data.labels.shape[0], edges=data.graph.src.shape[0])


def graph_of(shape: GcnShape, options: Options) -> Graph:
    """The graph of the run; one concrete copy in a process, also when asked for while tracing."""
    with jax.ensure_compile_time_eval():
        return ogbn_mag(options.data).graph if options.data else power_law_graph(shape, 0)


def _random_nodes(shape: GcnShape, dtype: str, key: jax.Array) -> Tree:
    """Normal features ``[nodes, features]`` and uniform labels ``int32[nodes]``."""
    k1, k2 = jax.random.split(key)
    return {
        "features": jax.random.normal(k1, (shape.nodes, shape.features), dtype),
        "labels": jax.random.randint(k2, (shape.nodes,), 0, shape.classes),
    }


def messages_stay_on_chip(shape: GcnShape):
    """The ``on_chip`` of a GCN: messages ``[edges, features]``."""
    return lambda aval: aval.ndim == 2 and aval.shape[0] == shape.edges
