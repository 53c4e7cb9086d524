"""Kernels compiled side by side."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt.lowering import compiling
from jevt_kernels import launch


def kernels(count, dtype=np.float32):
    x = np.zeros((16, 64), dtype)
    with jax.enable_x64(dtype == np.float64):
        return [
            (contract.build(lambda x, i=i: jnp.sin(x) * i, x, name=f"kernel_{i}"), None)
            for i in range(1, count + 1)
        ]


def test_each_kernel_once_and_together(monkeypatch):
    """All wait for each other, as they only can where each has a thread."""
    together = threading.Barrier(2, timeout=60)
    compiled = []

    def compile_kernel(spec, capability, config):
        together.wait()
        compiled.append((spec.name, capability))

    monkeypatch.setattr(compiling.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(launch, "precompile", compile_kernel)
    assert compiling.compile_all(kernels(2) * 3, 90) == {}
    assert sorted(compiled) == [("kernel_1", 90), ("kernel_2", 90)]


def test_errors_belong_to_their_kernels(monkeypatch):
    first, second, third = kernels(3)

    def compile_kernel(spec, capability, config):
        if spec.name != "kernel_2":
            raise RuntimeError(f"no registers left in {spec.name}")

    monkeypatch.setattr(launch, "precompile", compile_kernel)
    errors = compiling.compile_all([first, second, third], 90)
    assert {kernel: str(error) for kernel, error in errors.items()} == {
        first: "no registers left in kernel_1",
        third: "no registers left in kernel_3",
    }


@pytest.mark.cuda_lowering
@pytest.mark.filterwarnings("error")
def test_the_callers_types():
    """Threads have JAX's settings of their own: 64-bit types are the caller's."""
    many = kernels(4, np.float64)
    with jax.enable_x64(True):
        assert compiling.compile_all(many, 90) == {}
