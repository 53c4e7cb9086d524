from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

import jevt
from jevt import _config
from jevt.report import text


def step(x):
    return jax.nn.softmax(x) * 2.0


def test_text_has_every_stage_with_its_provenance():
    trace = jevt.jit(step).explain(jnp.ones((4, 8)))
    lines = str(trace).splitlines()
    heads = [line for line in lines if line.startswith("# stage")]
    assert len(heads) == len(trace.stages)
    assert heads[0].startswith("# stage 0 of step: traced by JAX, ")
    assert re.fullmatch(
        r"# stage 1 of step: by 'inline' in \d+\.\d ms, \d+ equations(, unchanged)?", heads[1]
    )
    assert heads[-1].endswith("unchanged"), "on a CPU nothing is lowered to a kernel"
    assert any("reduce_max" in line for line in lines)
    assert any(line.startswith("# plan of step") for line in lines)
    assert "equations traced" in lines[0] and "for cpu, backend 'auto'" in lines[0]


def test_text_shows_sources():
    trace = jevt.jit(step).explain(jnp.ones((4, 8)))
    import dataclasses

    shown = str(
        dataclasses.replace(trace, sources={"g1_rowwise": "import triton\n"}, warnings=("g0: why",))
    )
    assert "# source of g1_rowwise\nimport triton" in shown
    assert "# fell back to XLA: g0: why" in shown


def test_debug_levels(monkeypatch, capsys):
    printed = {}
    for level in "0123":
        monkeypatch.setenv("JEVT_DEBUG", level)
        f = jevt.jit(lambda x: jax.nn.softmax(x) * 2.0)
        f(np.ones((4, 8), np.float32))
        f(np.zeros((4, 8), np.float32))
        captured = capsys.readouterr()
        assert captured.out == ""
        printed[level] = captured.err
    assert printed["0"] == ""
    summary, note = printed["1"].splitlines()
    assert "# jevt: <lambda>" in summary
    assert note == "# raise_softmax: softmax: 1 forward, 0 backward"
    assert "reason" in printed["2"] and "# stage" not in printed["2"]
    assert "# stage 5" in printed["3"] and "# plan" in printed["3"]


def test_dump_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("JEVT_DUMP_DIR", str(tmp_path / "new" / "place"))
    f = jevt.jit(lambda x: jax.nn.softmax(x) * 2.0)
    f(np.ones((4, 8), np.float32))
    f(np.ones((4, 8), np.float32))
    f(np.ones((5, 8), np.float32))
    folders = sorted((tmp_path / "new" / "place").iterdir())
    assert len(folders) == 2, "one folder a compilation"
    names = sorted(p.name for p in folders[0].iterdir())
    assert (
        names[0] == "00_trace.jaxpr" and names[1] == "01_inline.jaxpr" and names[-1] == "plan.txt"
    )
    assert (
        "softmax" not in names[0] and "reduce_max" in (folders[0] / "01_inline.jaxpr").read_text()
    )
    assert "reason" in (folders[0] / "plan.txt").read_text()


def test_two_writers_of_one_directory(tmp_path):
    trace = jevt.jit(step).explain(jnp.ones((4, 8)))
    (tmp_path / f"{next(text._count) + 1:03d}_step").mkdir()
    first, second = text.write(trace, tmp_path), text.write(trace, tmp_path)
    assert first != second and len(list(second.iterdir())) == len(list(first.iterdir())) > 0


def test_sources_are_written(tmp_path):
    import dataclasses

    trace = jevt.jit(step).explain(jnp.ones((4, 8)))
    trace = dataclasses.replace(trace, sources={"3.0/g1 softmax": "text"})
    text.publish(trace, _config.Environment(dump_dir=tmp_path))
    (folder,) = tmp_path.iterdir()
    assert (folder / "3.0_g1_softmax.py").read_text() == "text"
