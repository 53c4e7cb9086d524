"""The report: tables between the markers, and charts."""

import json

import pytest

from benchmarks.report import render
from benchmarks.results import KernelRow, Row

HEADER = {
    "device": "NVIDIA H100 80GB HBM3",
    "versions": {"jax": "0.11.2"},
    "commit": "abc",
    "date": "2026-01-01T00:00:00+00:00",
}
STEPS = [
    Row("bert", "jax", 110.0, 109.0, 111.0, 108.0, 1997, 2**34, 30.0, 5.0, 1e-2),
    Row("bert", "jevt", 55.0, 54.0, 56.0, 54.0, 700, 2**33, 60.0, 5.0, 1e-2),
    Row("bert", "inductor", 82.5, 82.0, 83.0),
    Row("bert", "torch", note="failed: a|b"),
    Row("bert-mlp", "torch", 3.0, 3.0, 3.0),
    Row("bert-mlp", "jevt", 2.0, 2.0, 2.0),
]
KERNELS = [KernelRow("rowwise", "softmax", "jax", 50.0, None, 2500.0, 0.8, 1e-3)]
PROFILE = [
    {"workload": "bert", "variant": "jax", "name": "g", "category": "matmul", "ms": 40, "count": 9},
    {"workload": "bert", "variant": "jevt", "name": "g", "category": "copy", "ms": 4, "count": 9},
]


@pytest.fixture
def folder(tmp_path):
    files = {"h100": STEPS, "h100-kernels": KERNELS, "h100-profile": PROFILE}
    for name, rows in files.items():
        plain = [row if isinstance(row, dict) else row.__dict__ for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps({**HEADER, "rows": plain}))
    text = f"before\n{render.BEGIN}\nstale figures\n{render.END}\nafter\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_render(folder):
    written = render.render(folder, folder / "README.md", folder / "figures")
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n<!-- benchmarks:begin -->\n### Training steps on NVIDIA H100")
    assert text.endswith("<!-- benchmarks:end -->\nafter\n")
    assert "stale" not in text
    assert "| bert | 110.00 | 55.00 | – | 82.50 | 2.00× | 1.50× |" in text
    assert "| bert-mlp | 2.000 | 3.000 |" in text.replace("– | ", "")
    assert "1.50× | 1.19× |" in text
    assert "failed: a\\|b" in text
    assert "(figures/h100-speedup.png)" in text
    assert "(figures/h100-time.png)" in text
    for name in ("h100-speedup.png", "h100-time.png"):
        assert folder / "figures" / name in written
        assert (folder / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_rendering_twice_changes_nothing(folder):
    render.render(folder, folder / "README.md", folder)
    once = (folder / "README.md").read_text()
    render.render(folder, folder / "README.md", folder)
    assert (folder / "README.md").read_text() == once


def test_missing_markers_are_named(folder):
    (folder / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="benchmarks:begin"):
        render.render(folder, folder / "README.md", folder)
