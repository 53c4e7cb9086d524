"""Which tiles a product with an epilogue gets."""

from __future__ import annotations

import gemm_kernels as gemm
import pytest

from jevt_kernels import limits
from jevt_kernels.mainloops import gemm_configs
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


def test_short_epilogues_of_large_tiles_or_of_small_ones_where_memory_is_busy() -> None:
    config = default(gemm.bias_residual((1, 16384, 1024, 4096)))
    assert tile(config) == (128, 256)
    assert (config.specialized, config.num_warps, config.num_stages) == ("cooperative", 4, 4)
    config = default(gemm.bias_residual((1, 32768, 768, 768)))
    assert tile(config) == (128, 128)
    assert (config.specialized, config.num_warps, config.num_stages) == ("pingpong", 4, 5)


@pytest.mark.parametrize(
    "spec",
    [
        gemm.product((1, 16384, 4096, 1024), gemm.BFLOAT16, out_dtype=gemm.BFLOAT16),
        gemm.rounded_residual((1, 16384, 1024, 4096)),
        gemm.rounded_residual((1, 32768, 768, 768)),
    ],
    ids=["plain", "residual", "busy memory"],
)
def test_short_epilogues_of_rounded_products_are_overlapped(spec: KernelSpec) -> None:
    config = default(spec)
    assert tile(config) == (128, 256)
    assert (config.specialized, config.num_stages, config.subtiles) == ("overlapped", 4, 4)


def test_what_no_next_tile_could_hide_is_not_overlapped() -> None:
    one_each = default(gemm.product((1, 1024, 1024, 512), gemm.BFLOAT16, out_dtype=gemm.BFLOAT16))
    assert one_each.specialized != "overlapped"
    assert default(gemm.dgrad_gelu((1, 16384, 4096, 1024))).specialized == "pingpong"


@pytest.mark.parametrize("sizes", [(64, 64), (128, 64), (64, 352), (300, 300)])
def test_a_small_product_of_long_operands_fills_the_gpu(sizes: tuple[int, int]) -> None:
    config = default(gemm.product((1, *sizes, 736389), gemm.BFLOAT16, "bkm", "bkn"))
    m, n = tile(config)
    tiles = -(-sizes[0] // m) * -(-sizes[1] // n)
    assert 120 <= tiles * config.splits <= 264


@pytest.mark.parametrize("sizes", [(1, 0, 64, 64), (0, 64, 64, 64), (1, 64, 64, 0)])
def test_products_of_no_elements_have_configurations(sizes: tuple[int, int, int, int]) -> None:
    assert gemm_configs.configs(gemm.product(sizes, gemm.BFLOAT16))[0].splits == 1


def test_a_product_alone_is_split_as_fills_the_gpu() -> None:
    config = default(gemm.product((1, 16384, 4096, 1024), gemm.BFLOAT16))
    assert tile(config) == (128, 256)
    assert (config.specialized, config.splits) == ("cooperative", 1)
    config = default(gemm.product((1, 768, 768, 32768), gemm.BFLOAT16))
    assert tile(config) == (128, 256)
    assert (config.specialized, config.splits) == ("cooperative", 7)  # 126 of 132 have a part


def test_a_loss_over_many_labels_keeps_the_rows() -> None:
    config = default(gemm.bias_gelu((1, 1024, 670208, 512)))
    assert tile(config) == (128, 64)
    assert (config.specialized, config.programs, config.num_stages) == ("pingpong", 128, 8)
    assert default(gemm.bias_gelu((1, 1024, 670208, 1024))).programs == 132  # too long to be kept
