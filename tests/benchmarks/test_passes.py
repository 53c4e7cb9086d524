"""The table of what the graph passes do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from benchmarks import passes
from jevt.pipeline import GRAPH_PASSES


def test_a_table_for_each_workload(tmp_path, capsys):
    path = tmp_path / "passes.md"
    assert passes.run(["--workloads", "vit,gcn", "--size", "smoke", "--output", str(path)]) == 0
    text = path.read_text()
    assert text.count("\n## ") == 2
    for name, _ in GRAPH_PASSES:
        assert text.count(f"\n| {name} |") >= 2
    assert capsys.readouterr().out.count("All passes:") == 2


def test_what_is_counted():
    jaxpr = jax.make_jaxpr(lambda x: (jnp.sin(x).sum(), jax.lax.cos(x)))(jnp.ones((4, 8)))
    traced, *rest = passes.measure(jaxpr)
    assert traced.name == "traced"
    assert traced.equations == 3
    assert traced.reductions == 1
    # sin and cos read and write 128 bytes each, the sum reads 128 and writes 4.
    assert traced.nbytes == 2 * 256 + 132
    assert [line.name for line in rest][: len(GRAPH_PASSES)] == [name for name, _ in GRAPH_PASSES]


def test_an_unknown_workload():
    with pytest.raises(SystemExit):
        passes.run(["--workloads", "nothing"])
