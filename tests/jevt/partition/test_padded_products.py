"""XLA pads the operands of a product whose ``k`` it divides unevenly; a kernel of ours does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from partitions import context, trace

import jevt
from jevt.partition import partition
from jevt.partition.products import Size


def weight_gradient(x, d):
    return jnp.einsum("km,kn->mn", x, d)


def planned(m, n, k, dtype=jnp.bfloat16):
    x, d = (jax.ShapeDtypeStruct((k, columns), dtype) for columns in (m, n))
    return partition(trace(weight_gradient, x, d)[0], context("auto"))


@pytest.mark.parametrize(
    ("m", "n", "k", "padded"),
    [
        (64, 64, 736389, True),  # the nodes of a graph
        (64, 352, 736389, True),
        (768, 768, 32767, True),
        (128, 2048, 1000, True),
        (64, 64, 736384, True),  # 512 parts
        (64, 64, 737280, False),
        (768, 768, 32768, False),
        (512, 1024, 670208, False),
        (2048, 2048, 16383, False),  # enough tiles without parts
        (1024, 4096, 16383, False),
    ],
)
def test_as_xla_was_seen_to_pad(m, n, k, padded):
    plan = planned(m, n, k)
    (product,) = plan.groups[0].jaxpr.eqns
    assert Size.of(product).is_padded is padded


def test_a_kernel_of_ours_divides_what_xla_would_pad():
    (group,) = planned(64, 64, 736389).groups
    assert (group.kind, group.target) == ("gemm", "triton")
    assert group.config is not None and group.config.splits > 32
    copies = 2 * 2 * 736389 * (64 + 64) / context("auto").device.bytes_per_us
    assert group.predicted_us < group.xla_us - 0.9 * copies
    (even,) = planned(64, 64, 737280).groups
    assert even.target == "xla" and even.xla_us < group.xla_us - 0.9 * copies


def test_its_price_is_that_of_the_problem():
    plan = planned(64, 64, 736389)
    assert plan.solution.objective_us == pytest.approx(plan.groups[0].predicted_us, rel=1e-3)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_kernel_multiplies(dtype):
    rng = np.random.default_rng(0)
    x, d = (jnp.asarray(rng.standard_normal((2001, c)), dtype) for c in (40, 33))
    got = jevt.jit(weight_gradient, backend="interpret")(x, d)
    exact = np.asarray(x, np.float64).T @ np.asarray(d, np.float64)
    error = np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
    assert got.dtype == dtype and error < (4e-3 if dtype == jnp.bfloat16 else 1e-5)
