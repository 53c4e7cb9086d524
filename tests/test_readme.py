"""The kernel that the README shows is the one that is generated."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

import jevt

README = Path(__file__).parent.parent / "README.md"


def test_the_layer_norm_of_the_readme():
    def layer_norm(x, scale, bias):
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale + bias

    x, row = jax.ShapeDtypeStruct((16384, 1024), "float32"), jnp.ones(1024)
    trace = jevt.jit(layer_norm, backend="triton").explain(x, row, row)
    (source,) = trace.sources.values()
    kernel = source[source.index("@triton.jit") :].rstrip()
    assert kernel in README.read_text(), f"expected in the README:\n{kernel}"
