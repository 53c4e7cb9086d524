"""What cuDNN's fused attention is asked to do, and what not."""

from __future__ import annotations

import dataclasses

import pytest

from jevt import _jax_internals as internals
from jevt.primitives import cudnn_attention
from jevt.primitives.attention import Shape
from jevt.primitives.cudnn_attention import Case

BERT = Case(Shape(32, 512, 512, 16, 16, 64, 64), "bfloat16", biased=False, trained=True)


def case(**changes):
    own = {f.name for f in dataclasses.fields(Case)}
    shape = dataclasses.replace(BERT.shape, **{k: v for k, v in changes.items() if k not in own})
    rest = {k: v for k, v in changes.items() if k in own}
    return dataclasses.replace(BERT, shape=shape, **rest)


@pytest.fixture(autouse=True)
def _cudnn(monkeypatch):
    monkeypatch.setattr(internals, "cudnn_version", lambda: 91000)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"width": 128, "value_width": 128},
        {"width": 256, "value_width": 256},
        {"key_heads": 4},
        {"queries": 511},
        {"queries": 511, "biased": True, "trained": False},
        {"biased": True},
    ],
)
def test_can(changes):
    assert cudnn_attention.obstacle(case(**changes), 90) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "this is float32"),
        ({"width": 264, "value_width": 264}, "heads of 264"),
        ({"width": 60, "value_width": 60}, "heads of 60"),
        ({"value_width": 128}, "differ"),
        ({"queries": 511, "biased": True}, "odd with a bias"),
    ],
)
def test_cannot(changes, reason):
    assert reason in cudnn_attention.obstacle(case(**changes), 90)


def test_older_devices():
    wide = case(width=256, value_width=256)
    assert "heads of 256" in cudnn_attention.obstacle(wide, 80)
    assert cudnn_attention.obstacle(BERT, 80) == ""
    assert "this is 7.5" in cudnn_attention.obstacle(BERT, 75)


@pytest.mark.parametrize(("version", "reason"), [(None, "not installed"), (80907, "80907")])
def test_other_versions(monkeypatch, version, reason):
    monkeypatch.setattr(internals, "cudnn_version", lambda: version)
    assert reason in cudnn_attention.obstacle(BERT, 90)
