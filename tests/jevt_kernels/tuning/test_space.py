"""What is measured, and what is known beforehand not to run."""

from __future__ import annotations

import dataclasses

import gemm_kernels
import kernel_contract as contract
import kernel_gallery
import numpy as np
import pytest

from jevt_kernels.mainloops import MAINLOOPS, gemm_configs, pointwise
from jevt_kernels.spec import Config
from jevt_kernels.tuning import describe, offered, search_space

BIG = gemm_kernels.product((1, 4096, 1024, 1024), contract.BFLOAT16)


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_the_same_every_time_in_the_order_of_the_model(capability):
    space = search_space(BIG, capability, most=5)
    again = search_space(dataclasses.replace(BIG, name="other"), capability, most=5)
    assert (space.chosen, space.left) == (again.chosen, again.left)
    every = (*space.chosen, *space.left, *(config for config, _ in space.pruned))
    assert sorted(map(repr, every)) == sorted(map(repr, offered(BIG)))
    order = [c for c in offered(BIG) if c in {*space.chosen, *space.left}]
    assert order == [*space.chosen, *space.left]
    assert len(space.chosen) == 5


def test_descriptors_need_a_gpu_that_has_them():
    assert any(c.descriptors for c in offered(BIG))
    assert any(c.descriptors for c in search_space(BIG, 90, 99).chosen)
    older = search_space(BIG, 80, 99)
    assert not any(c.descriptors for c in older.chosen)
    assert any("tensor descriptors" in reason for _, reason in older.pruned)


def test_shared_memory_of_the_gpu():
    def shared(config):
        m, n, k = (config.block(name) for name in "mnk")
        return (m + n) * k * 2 * config.num_stages

    for capability, limit in ((80, 163), (89, 99), (90, 227)):
        space = search_space(BIG, capability, 99)
        assert all(shared(c) <= limit * 1024 for c in space.chosen)
        reasons = [r for c, r in space.pruned if "shared memory" in r]
        assert bool(reasons) == any(shared(c) > limit * 1024 for c in offered(BIG))


def offer(monkeypatch, module, *configs):
    monkeypatch.setattr(module, "configs", lambda spec: configs)
    offered.cache_clear()


@pytest.fixture(autouse=True)
def fresh():
    offered.cache_clear()
    yield
    offered.cache_clear()


def test_results_that_fit_into_no_registers(monkeypatch):
    blocks = (("m", 256), ("n", 256), ("k", 32))
    offer(monkeypatch, MAINLOOPS["gemm"], Config(blocks, 8, 2), Config(blocks, 16, 2))
    space = search_space(BIG, 90, 99)
    assert [c.num_warps for c in space.chosen] == [16]
    assert space.pruned[0][1].startswith("256 registers a thread")


def test_equal_kernels_are_measured_once(monkeypatch):
    spec = kernel_gallery.spec("pointwise_integers")
    long, longer = Config((("i", 1024),)), Config((("i", 2048),))  # 777 elements
    offer(monkeypatch, pointwise, long, longer, dataclasses.replace(long, num_warps=8))
    space = search_space(spec, 90, 99)
    assert space.chosen == (long, dataclasses.replace(long, num_warps=8))
    assert space.pruned == ((longer, "prints the same kernel as an earlier one"),)


def test_what_cannot_be_launched_or_generated(monkeypatch):
    from jevt_kernels import launch

    spec = kernel_gallery.spec("rowwise_layer_norm")
    first = Config((("row", 1), ("col", 1024)))
    offer(monkeypatch, MAINLOOPS["rowwise"], first, dataclasses.replace(first, num_warps=64))
    monkeypatch.setattr(launch, "MAXIMUM_GRID", 1)
    space = search_space(spec, 90, 99)
    assert space.chosen == ()
    assert all("grid" in reason for _, reason in space.pruned)
    monkeypatch.undo()
    offer(monkeypatch, MAINLOOPS["rowwise"], dataclasses.replace(first, num_warps=64))
    assert "64 warps" in search_space(spec, 90, 99).pruned[0][1]


def test_every_family_has_something_to_measure():
    for name in kernel_gallery.GALLERY:
        spec = kernel_gallery.spec(name)
        chosen = search_space(spec, 90, 3).chosen
        assert 1 <= len(chosen) <= 3, name
        assert chosen[0] == offered(spec)[0]


def test_descriptions():
    config = Config((("m", 128), ("n", 64), ("k", 32)), 8, 3)
    assert describe(config) == "128x64x32 w8 s3"
    special = dataclasses.replace(
        config, programs=132, group=4, splits=2, subtiles=2, descriptors=True
    )
    assert describe(special) == "128x64x32 w8 s3 p132 g4 k2 e2 tma"
    assert np.unique([describe(c) for c in offered(BIG)]).size == len(offered(BIG))
    assert gemm_configs.configs(BIG) == offered(BIG)
