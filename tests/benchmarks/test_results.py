"""Result files, quartiles, device names, kernel names."""

import json

import pytest

from benchmarks import console, kernel_table, machine, stats
from benchmarks.messages import Ceilings
from benchmarks.results import Header, ResultFile, Row
from benchmarks.step_suite import floor_row

HEADER = Header("NVIDIA H200", {"jax": "1"}, "abc", "2026-01-01T00:00:00+00:00")
KEY = ("workload", "variant")


def read(path):
    return json.loads(path.read_text())


def test_rows_are_replaced_by_key_and_written_at_once(tmp_path):
    path = tmp_path / "folder" / "h200.json"
    file = ResultFile(path, HEADER, KEY, merge=False)
    file.put(Row("bert", "jax"))
    assert read(path)["rows"][0]["step_ms"] is None
    file.put(Row("bert", "jax", step_ms=1.23456789), Row("bert", "jevt"))
    assert [r["variant"] for r in read(path)["rows"]] == ["jax", "jevt"]
    assert read(path)["rows"][0]["step_ms"] == 1.2346
    assert read(path)["device"] == "NVIDIA H200"


@pytest.mark.parametrize(("commit", "kept"), [("abc", 2), ("other", 1)])
def test_merge_keeps_comparable_rows_only(tmp_path, commit, kept):
    path = tmp_path / "h200.json"
    ResultFile(path, HEADER, KEY, merge=False).put(Row("bert", "jax"))
    later = Header("NVIDIA H200", {"jax": "1"}, commit, "2026-01-02T00:00:00+00:00")
    ResultFile(path, later, KEY, merge=True).put(Row("vit", "jax"))
    assert len(read(path)["rows"]) == kept


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        ResultFile(tmp_path / "x.json", HEADER, KEY, merge=False).put(
            Row("bert", "jax", step_ms=float("nan"))
        )


def test_quartiles():
    assert stats.quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 3.0, 4.0)
    assert stats.quartiles([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("cpu", "cpu"),
    ],
)
def test_device_slug(device, slug):
    assert machine.device_slug(device) == slug


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT", "matmul"),
        ("gemm_fusion_dot_12", "matmul"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16", "convolution"),
        ("loop_convert_fusion_3", "pointwise"),
        ("input_reduce_fusion", "reduction"),
        ("wrapped_scatter", "sparse"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("triton_poi_fused_add_gelu_2", "pointwise"),
        ("triton_red_fused_native_layer_norm_1", "reduction"),
        ("MemcpyD2D", "copy"),
    ],
)
def test_kernel_categories(kernel, category):
    assert kernel_table.category(kernel) == category


def test_profile_sums_instances_per_step():
    events = [("loop_add_fusion_1", 3e6), ("loop_add_fusion_22", 1e6), ("gemm.3", 8e6)]
    profile = kernel_table.aggregate(events, steps=2)
    assert [(k.name, k.ms, k.count) for k in profile.kernels] == [
        ("gemm", 4.0, 0.5),
        ("loop_add_fusion", 2.0, 1.0),
    ]
    assert profile.total_ms == 6.0


def test_floor_is_the_longer_time():
    row = floor_row("bert", flops=2e12, bytes_=1e9, ceilings=Ceilings(flops=1e15, bytes=1e12))
    assert row.step_ms == pytest.approx(2.0)


def test_text_table_shows_dashes_for_what_is_missing():
    text = console.text_table([Row("bert", "jax", note="failed: x").__dict__], console.STEP_COLUMNS)
    assert "–" in text
    assert text.splitlines()[1].endswith("failed: x")
