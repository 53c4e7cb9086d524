"""Two spellings of a model are one model."""

import jax
import numpy as np
import pytest

from benchmarks import accuracy, registry
from benchmarks.options import Options

OPTIONS = Options(size="smoke", dtype="float32", param_dtype="float32")


def gradients(name, options=OPTIONS):
    workload = registry.make(name, options)
    before = workload.init(0)
    after, _ = jax.jit(workload.step)(workload.probe(before), workload.batch(0))
    return list(workload.gradients(before, after))


@pytest.mark.parametrize(
    ("one", "other"), [("bert", "bert-dpa"), ("vit", "vit-dpa"), ("gcn", "gcn-bcoo")]
)
def test_spellings_agree(one, other):
    reference = [gradient for _, gradient in gradients(other)]
    assert accuracy.compare(gradients(one), reference).total < 1e-4


def test_probe_yields_the_gradients_that_jax_grad_yields():
    """A step with a huge learning rate, read back, against a subgraph's own gradients."""
    head, model = (registry.make(name, OPTIONS) for name in ("xmlcnn-head", "xmlcnn"))
    params = head.init(0)
    gradients, _ = head.step(params, head.batch(0))
    state = model.probe({"params": params})

    after = jax.tree.map(lambda p, g: p - state["lr"] * g, params, gradients["params"])
    read = [g for _, g in model.gradients(state, {"params": after})]
    named = [(str(i), np.asarray(g)) for i, g in enumerate(jax.tree.leaves(gradients["params"]))]
    assert accuracy.compare(named, read).total < 1e-6


def test_dropout_drops():
    calm = gradients("bert")
    dropped = gradients("bert", OPTIONS.replace(dropout=0.1))
    assert accuracy.compare(dropped, [g for _, g in calm]).total > 1e-2


@pytest.mark.parametrize("name", registry.WORKLOADS)
def test_seeds_give_different_batches(name):
    workload = registry.make(name, OPTIONS)
    one, other = (jax.tree.leaves(workload.batch(seed)) for seed in (0, 1))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_graph_has_hubs():
    graph = registry.make("gcn", OPTIONS).batch(0)["graph"]
    degrees = np.bincount(np.asarray(graph.dst))
    assert degrees.max() > 10 * degrees.mean()


def test_real_graph_is_read_where_present(tmp_path):
    np.save(tmp_path / "edge_index.npy", np.array([[0, 1], [1, 2], [2, 0], [0, 2]]))
    np.save(tmp_path / "node_feat.npy", np.ones((3, 16), np.float32))
    np.save(tmp_path / "node_label.npy", np.array([[0], [1], [2]]))
    workload = registry.make("gcn", OPTIONS.replace(data=str(tmp_path)))
    batch = workload.batch(0)
    assert batch["features"].shape == (3, 16)
    assert batch["graph"].weight.tolist() == [1.0, 0.5, 1.0, 0.5]


def test_missing_files_of_the_real_graph_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="edge_index.npy"):
        registry.make("gcn", OPTIONS.replace(data=str(tmp_path))).init(0)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="expected some of bert, vit"):
        registry.expand(["bart"])
    with pytest.raises(ValueError, match="size: expected one of full, smoke"):
        Options(size="tiny")
