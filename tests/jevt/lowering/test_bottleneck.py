"""ResNet's bottleneck: 1×1 convolutions in kernels, with BatchNorm's sums as their epilogues."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kernel_contract as contract
import ml_dtypes
import numpy as np
import pytest
from resnet_block import conv, statistics, step

import jevt
from jevt import pipeline
from jevt.lowering import spec as lowering
from jevt.passes import convolutions
from jevt_kernels import aot, visitor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def forward(x, w):
    return statistics(conv(x, w))


def strided(x, w):
    return statistics(conv(x, w, 2))


def backward(dy, w, y, mean, residual, shortcut):
    """The input's gradient of a 1×1 convolution, of a strided one beside it, and BatchNorm's sums.

    ``shortcut`` is the gradient of the strided one where it is not zero.
    """
    dx = jnp.einsum("nhwf,xycf->nhwc", dy, w) + residual
    n, height, width, features = shortcut.shape
    corner = (jnp.arange(2) == 0)[:, None, None] & (jnp.arange(2) == 0)[:, None]
    spread = jnp.where(corner[None, None, :, None], shortcut[:, :, None, :, None], 0)
    dx = dx + spread.reshape(n, 2 * height, 2 * width, features)
    dx = jnp.where(y > 0, dx, 0)
    wide = dx.astype(jnp.float32)
    sums = wide.sum((0, 1, 2)), ((y.astype(jnp.float32) - mean) * wide).sum((0, 1, 2))
    return dx, *sums


def recomputed(dy, w, residual, *branches):
    """The same behind the sum of two normalised branches, whose sign is computed again.

    Each branch is what the layer gave, and the mean, the scale and the shift of its features.
    """
    left, right = branches[:4], branches[4:]

    def normal(y, mean, scale, shift):
        return ((y.astype(jnp.float32) - mean) * scale + shift).astype(y.dtype)

    dx = jnp.einsum("nhwf,xycf->nhwc", dy, w) + residual
    dx = jnp.where(normal(*left) + normal(*right) > 0, dx, 0)
    wide = dx.astype(jnp.float32)
    sums = [((y.astype(jnp.float32) - mean) * wide).sum((0, 1, 2)) for y, mean, *_ in (left, right)]
    return dx, wide.sum((0, 1, 2)), *sums


def recomputed_shapes(batch, height, width, features, summed):
    rows = (batch, height, width)
    branch = ((*rows, features), (features,), (features,), (features,))
    return (*rows, summed), (1, 1, features, summed), (*rows, features), *branch, *branch


def arrays(dtype, *shapes):
    return [contract.random(shape, dtype, seed) for seed, shape in enumerate(shapes)]


def check_group(function, args, dtype):
    """The group is one product's kernel after the pass, with the values of XLA's convolution."""
    jaxpr = convolutions.run(contract.group(function, *args))
    names = [e.primitive.name for e in jaxpr.eqns]
    assert names.count("dot_general") == 1 and "conv_general_dilated" not in names

    def product(*args):
        return jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)

    spec = contract.build(product, *args)
    assert spec.mainloop == "gemm"
    sums = [n.over for n in spec.tree if isinstance(n, visitor.Reduce)]
    assert len(sums) == len(spec.outputs) - 1
    assert set(sums) == ({"n"} if args[1].shape[-1] == 1 else {"m"})
    expected = jax.jit(function)(*args)
    tolerance = 1e-5 if dtype == np.float32 else 2e-2
    contract.same(contract.referred(spec, *args), expected, tolerance)
    return product, tolerance


GROUPS = {
    "forward": (forward, ((3, 5, 7, 12), (1, 1, 12, 20))),
    "one feature": (forward, ((1, 1, 5, 3), (1, 1, 3, 1))),
    "strided": (strided, ((2, 5, 6, 17), (1, 1, 17, 33))),
    "backward": (
        backward,
        ((2, 4, 6, 10), (1, 1, 9, 10), (2, 4, 6, 9), (9,), (2, 4, 6, 9), (2, 2, 3, 9)),
    ),
    "recomputed": (recomputed, recomputed_shapes(2, 3, 5, 130, 10)),
}


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GROUPS)
def test_groups(name, dtype):
    function, shapes = GROUPS[name]
    check_group(function, arrays(dtype, *shapes), np.dtype(dtype))


# Shapes of ResNet-50's second stage.
LARGE = {
    "forward": (forward, ((128, 56, 56, 64), (1, 1, 64, 256))),
    "strided": (strided, ((128, 56, 56, 256), (1, 1, 256, 512))),
    "backward": (
        backward,
        (
            *((128, 56, 56, 128), (1, 1, 256, 128), (128, 56, 56, 256)),
            *((256,), (128, 56, 56, 256), (128, 28, 28, 256)),
        ),
    ),
    "recomputed": (recomputed, recomputed_shapes(128, 56, 56, 256, 64)),
}


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", LARGE)
def test_large_groups_compile_without_spills(name, arch):
    function, shapes = LARGE[name]
    args = [jax.ShapeDtypeStruct(shape, BFLOAT16) for shape in shapes]
    jaxpr = convolutions.run(contract.group(function, *args))
    binary = aot.compile(lowering.build(jaxpr, "kernel"), arch)
    assert binary.spill_bytes == 0
    assert binary.shared_bytes <= {80: 163, 90: 227}[arch] * 1024


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GROUPS)
def test_kernels_of_groups(name, dtype):
    function, shapes = GROUPS[name]
    args = arrays(dtype, *shapes)
    product, tolerance = check_group(function, args, np.dtype(dtype))
    contract.check(product, *args, tolerance=tolerance)


def step_arguments(dtype):
    shapes = ((1, 1, 6, 4), (3, 3, 4, 4), (1, 1, 4, 9), (1, 1, 6, 9))
    params = [
        (
            contract.random(shape, dtype, seed) * dtype.type(0.3),
            np.ones(shape[-1], np.float32),
            contract.random(shape[-1:], np.float32, seed + 10),
        )
        for seed, shape in enumerate(shapes)
    ]
    return params, contract.random((2, 6, 10, 6), dtype, 7), contract.random((2, 3, 5, 9), seed=8)


def errors(got, want):
    """Distance of each array from the reference, in the norm and by it."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ]
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=["float32", "bfloat16"])
def test_a_step_in_the_interpreter(dtype, monkeypatch):
    """As near to a reference in float64 as ``jax.jit`` is, and 3 of 4 convolutions in kernels."""
    passes = pipeline.GRAPH_PASSES + pipeline.PRODUCT_PASSES + pipeline.GPU_PASSES
    monkeypatch.setattr(pipeline, "GRAPH_PASSES", passes)
    args = step_arguments(dtype)
    compiled = jevt.jit(step, backend="interpret")
    got = compiled(*args)
    plan = jevt.last_trace(compiled).plan
    left = [e for g in plan.groups for e in g.jaxpr.eqns if "conv_general" in e.primitive.name]
    assert len(left) == 3  # that of 3×3 and its gradients
    taken = [g for g in plan.groups if g.kind == "gemm" and g.target == "triton"]
    assert len(taken) == 9
    summing = [g for g in taken if any(isinstance(n, visitor.Reduce) for n in g.spec.tree)]
    assert len(summing) >= 3
    want = jax.jit(step)(*args)
    with jax.enable_x64(True):
        exact = jax.jit(step)(*jax.tree.map(lambda a: np.asarray(a, np.float64), args))
    limit = 2 * errors(want, exact) + (1e-5 if dtype == np.float32 else 1e-2)
    assert (errors(got, exact) <= limit).all(), (errors(got, exact), limit)
