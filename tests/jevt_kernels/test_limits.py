"""What a GPU can run, and what it runs if nothing was measured."""

from __future__ import annotations

import dataclasses

import gemm_kernels
import jax
import kernel_contract as contract
import kernel_gallery
import numpy as np
import pytest

from jevt_kernels import aot, codegen, compat, launch, limits
from jevt_kernels.mainloops import MAINLOOPS
from jevt_kernels.spec import Config, UnsupportedKernel

FLOAT = np.dtype("float32")
BIG = gemm_kernels.product((1, 16384, 4096, 1024), contract.BFLOAT16, out_dtype=contract.BFLOAT16)
TF32 = gemm_kernels.changed(
    gemm_kernels.product((1, 4096, 4096, 1024), FLOAT, "mk", "nk", "mn"), 2, precision="tf32"
)
CAPABILITIES = [80, 89, 90, 100]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("spec", [BIG, TF32], ids=["bfloat16", "tf32"])
def test_the_most_preferred_that_can_run(spec, capability):
    chosen = limits.default_config(spec, capability)
    assert chosen.descriptors == (capability >= 90)
    every = MAINLOOPS["gemm"].configs(spec)
    for better in every[: every.index(chosen)]:
        source = launch.source_for(spec, better)
        assert limits.obstacle(spec, source, better, capability)


def test_without_a_gpu_nothing_that_only_some_have():
    assert MAINLOOPS["gemm"].configs(BIG)[0].descriptors
    assert not codegen.default_config(BIG).descriptors
    assert not codegen.generate(BIG).descriptors


def test_descriptors_come_first_on_tensor_cores_only():
    plain = gemm_kernels.product((1, 4096, 4096, 1024), FLOAT, "mk", "nk", "mn")
    assert not MAINLOOPS["gemm"].configs(plain)[0].descriptors
    assert any(config.descriptors for config in MAINLOOPS["gemm"].configs(plain))


def test_other_mainloops_keep_their_first():
    spec = kernel_gallery.spec("rowwise_softmax")
    assert limits.default_config(spec, 80) == MAINLOOPS["rowwise"].configs(spec)[0]


@pytest.mark.aot
@pytest.mark.parametrize(("capability", "under_way"), [(80, 2), (89, 1), (90, 2)])
def test_rows_under_way_fit_into_shared_memory(capability, under_way):
    rows = jax.ShapeDtypeStruct((4096, 30528), contract.BFLOAT16)
    spec = contract.build(lambda x: jax.nn.logsumexp(x, axis=-1), rows)
    config = limits.default_config(spec, capability)
    assert config.num_stages == 1 + under_way
    assert aot.compile(spec, capability).shared_bytes <= compat.shared_memory_limit(capability)


def test_unknown_mainloop():
    spec = dataclasses.replace(BIG, mainloop="magic")
    assert limits.default_config(spec, 90) is None
    with pytest.raises(UnsupportedKernel, match="expected a mainloop of"):
        aot.compile(spec, 90)


@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("spec", [BIG, TF32], ids=["bfloat16", "tf32"])
def test_what_compiles_is_no_larger_than_foretold(spec, capability):
    binary = aot.compile(spec, capability)
    assert binary.shared_bytes <= compat.shared_memory_limit(capability)


@pytest.mark.aot
def test_a_kernel_that_wants_more_is_refused_when_it_is_compiled():
    config = Config((("m", 128), ("n", 128), ("k", 64)), num_warps=8, num_stages=5)
    operands = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in BIG.inputs]

    def lowered(capability):
        def function(*args):
            return launch.call(BIG, *args, config=config, compute_capability=capability)

        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))

    lowered(80)
    with pytest.raises(UnsupportedKernel, match=r"at most 101376 bytes .* got 131072"):
        lowered(89)
