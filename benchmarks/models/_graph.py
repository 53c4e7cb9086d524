"""The graph of the GCN workload: ogbn-mag's paper-cites-paper where its files are present, else
a power-law graph of that size with random node numbering."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import GcnShape


class Graph(NamedTuple):
    """Edges ``src[i] -> dst[i]``, in no particular order.

    Attributes:
      src, dst: ``int32[edges]``.
      weight: ``float32[edges]``, one over the in-degree of ``dst``.
    """

    src: jax.Array
    dst: jax.Array
    weight: jax.Array


class RealData(NamedTuple):
    """The files of ogbn-mag: the graph, ``float32[nodes, 128]``, ``int32[nodes]``."""

    graph: Graph
    features: jax.Array
    labels: jax.Array


@functools.cache
def power_law_graph(shape: GcnShape, seed: int) -> Graph:
    """A graph whose in- and out-degrees both follow a power law, drawn on the device.

    An edge's end is the node of rank ``floor(nodes * u ** skew)`` for uniform u, under a random
    numbering of its own for each end.
    """
    return _draw(jax.random.PRNGKey(seed), shape)


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: jax.Array, shape: GcnShape) -> Graph:
    def ends(key: jax.Array) -> jax.Array:
        k1, k2 = jax.random.split(key)
        u = jax.random.uniform(k1, (shape.edges,))
        rank = jnp.minimum((shape.nodes * u**shape.skew).astype(jnp.int32), shape.nodes - 1)
        return jax.random.permutation(k2, shape.nodes).astype(jnp.int32)[rank]

    src, dst = (ends(k) for k in jax.random.split(key))
    return Graph(src, dst, _inverse_degree(dst, shape.nodes))


def _inverse_degree(dst: jax.Array, nodes: int) -> jax.Array:
    degree = jnp.zeros((nodes,), jnp.float32).at[dst].add(1.0)
    return 1.0 / degree[dst]


FILES = {
    "edge_index": ("raw/relations/paper___cites___paper/edge.csv.gz", np.int32),
    "node_feat": ("raw/node-feat/paper/node-feat.csv.gz", np.float32),
    "node_label": ("raw/node-label/paper/node-label.csv.gz", np.int32),
}


@functools.cache
def ogbn_mag(folder: str) -> RealData:
    """Reads ogbn-mag from OGB's own folder layout.

    Args:
      folder: OGB's ``ogbn_mag`` folder, with ``raw/`` inside; or one with the same arrays as
        ``edge_index.npy`` (``[edges, 2]``), ``node_feat.npy`` and ``node_label.npy``.

    Raises:
      FileNotFoundError: if a file is in neither form.
    """
    arrays = {name: _read(Path(folder), name) for name in FILES}
    edges = arrays["edge_index"]
    nodes = arrays["node_feat"].shape[0]
    src, dst = jnp.asarray(edges[:, 0]), jnp.asarray(edges[:, 1])
    graph = Graph(src, dst, _inverse_degree(dst, nodes))
    labels = arrays["node_label"].reshape(-1)
    return RealData(graph, jnp.asarray(arrays["node_feat"]), jnp.asarray(labels))


def _read(folder: Path, name: str) -> np.ndarray:
    path, dtype = FILES[name]
    if (folder / f"{name}.npy").exists():
        return np.load(folder / f"{name}.npy").astype(dtype)
    if (folder / path).exists():
        return np.loadtxt(folder / path, delimiter=",", dtype=dtype, ndmin=2)
    raise FileNotFoundError(f"ogbn-mag: expected {folder}/{name}.npy or {folder}/{path}, got none")
