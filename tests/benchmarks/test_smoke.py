"""The whole benchmark on a CPU at smoke size: every row is there and its gradients are right."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import Row

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = {
    *("bert", "vit", "resnet", "xmlcnn", "gcn", "gcn-bcoo", "vit-nnx"),
    *("bert-attention", "bert-mlp", "resnet-bottleneck", "xmlcnn-head", "gcn-uturn"),
}


def run(*arguments: str) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    # Workers get their own warnings filter and no interpreter: this is the product, not a test.
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("smoke") / "out.json"
    run("--smoke", "--json", str(path))
    return json.loads(path.read_text())


def test_smoke_run(content):
    assert set(content) == {"device", "versions", "commit", "date", "rows"}
    assert content["versions"]["jax"]
    rows = {(row["workload"], row["variant"]): row for row in content["rows"]}
    assert set(rows) == {(w, v) for w in WORKLOADS for v in ("jax", "jevt", "floor")}
    for (workload, variant), row in rows.items():
        assert set(row) == set(Row.__dataclass_fields__)
        assert "failed" not in row["note"], row
        assert row["step_ms_q1"] <= row["step_ms"] <= row["step_ms_q3"]
        if variant != "floor":
            # BatchNorm over a handful of pixels amplifies bfloat16's rounding.
            bound = 0.4 if workload == "resnet" else 0.05
            assert row["grad_rel_err"] < bound, row
            reference = rows[workload, "jax"]["grad_rel_err"]
            assert row["grad_rel_err"] < 1.5 * reference + 1e-3, row
    assert all(math.isfinite(row["step_ms"]) for row in rows.values())


def test_kernel_suites(tmp_path):
    path = tmp_path / "kernels.json"
    run("kernels", "--smoke", "--json", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert {row["suite"] for row in rows} >= {"pointwise", "rowwise"}
    for row in rows:
        assert row["us"] > 0
        assert row["tflops"] is None or row["gbps"] is None
        assert row["rel_err"] < (1e-5 if "float32" in row["case"] else 1e-2), row
