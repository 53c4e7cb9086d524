"""Which tiles a product with an epilogue gets."""

from __future__ import annotations

import gemm_kernels as gemm
import pytest

from jevt_kernels import limits
from jevt_kernels.spec import Config, KernelSpec


def tile(config: Config | None) -> tuple[int, int]:
    assert config is not None
    return config.block("m"), config.block("n")


def default(spec: KernelSpec, capability: int = 90) -> Config:
    config = limits.default_config(spec, capability)
    assert config is not None
    return config


def test_what_waits_for_memory_has_small_tiles_loaded_ahead() -> None:
    config = default(gemm.bias_residual((1, 401408, 256, 64)))
    assert tile(config) == (64, 64)
    assert config.ahead and config.descriptors and config.num_stages == 1
    assert not default(gemm.bias_residual((1, 16384, 1024, 4096))).ahead


@pytest.mark.parametrize(
    "spec", [gemm.bias_gelu((1, 16384, 4096, 1024)), gemm.dgrad_gelu((1, 16384, 4096, 1024))]
)
def test_long_epilogues_run_beside_products(spec: KernelSpec) -> None:
    config = default(spec)
    assert tile(config) == (128, 128)
    assert config.specialized == "pingpong" and config.num_warps == 8
    other = default(spec, 100)
    assert tile(other) == (128, 128)
    assert other.subtiles == 2 and other.programs == 264 and not other.specialized


@pytest.mark.parametrize(
    "spec",
    [
        gemm.bias_residual((1, 512, 512, 512)),  # few tiles
        gemm.bias_residual((1, 16384, 1024, 1024), "float32"),
        gemm.prologue((1, 16384, 1024, 1024)),
    ],
    ids=["few tiles", "float32", "prologue"],
)
def test_what_was_not_measured_is_left_to_the_model(spec: KernelSpec) -> None:
    config = default(spec)
    assert not config.ahead
    assert config.programs != 264


def test_without_descriptors_the_model_decides() -> None:
    config = default(gemm.bias_residual((1, 401408, 256, 64)), 80)
    assert not config.descriptors and not config.ahead
