"""The backward pass of attention: its protocol emulated, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import functools
import importlib

import gluon_emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevt_kernels import aot, attention_backward, compat, gluon_kernels
from jevt_kernels.attention_backward import QUERIES, Sizes
from jevt_kernels.spec import UnsupportedKernel

BFLOAT16, FLOAT16 = np.dtype(jnp.bfloat16), np.dtype("float16")


def kernel_of(sizes, dtype=BFLOAT16, scale=0.125, layout="BTNH"):
    return attention_backward.attention_backward(sizes, dtype, scale=scale, layout=layout)


def heads_first(x, layout):
    """``[B, N, T, 64]`` in float64."""
    return x.astype(np.float64).transpose(0, 2, 1, 3) if layout == "BTNH" else x.astype(np.float64)


def draw(kernel, scale, layout, size=1.0, shift=0.0):
    """q, k, v, o, lse ``[B, N, T]``, dO, and the gradients in float64 with heads first.

    q is ``size`` times as large as normal numbers; all scores are larger by ``shift``.
    """
    rng = np.random.default_rng(0)
    q, k, v, _, d_out, _ = (rng.standard_normal(o.type.shape) for o in kernel.inputs)
    dtype = kernel.inputs[0].type.dtype
    q *= size
    if shift:
        q[..., 0], k[..., 0] = shift / scale, 1
    q, k, v, d_out = (x.astype(dtype) for x in (q, k, v, d_out))
    wide_q, wide_k, wide_v, wide_d_out = (heads_first(x, layout) for x in (q, k, v, d_out))
    scores = scale * wide_q @ wide_k.swapaxes(2, 3)
    highest = scores.max(-1)
    lse = highest + np.log(np.exp(scores - highest[..., None]).sum(-1))
    p = np.exp(scores - lse[..., None])
    out = p @ wide_v
    d_scores = p * (wide_d_out @ wide_v.swapaxes(2, 3) - (wide_d_out * out).sum(-1, keepdims=True))
    gradients = (
        scale * d_scores @ wide_k,
        scale * d_scores.swapaxes(2, 3) @ wide_q,
        p.swapaxes(2, 3) @ wide_d_out,
    )
    out = (out.transpose(0, 2, 1, 3) if layout == "BTNH" else out).astype(dtype)
    return (q, k, v, out, lse.astype(np.float32), d_out), gradients


def check(got, want, layout, tolerance):
    for x, y in zip(got, want, strict=True):
        error = np.linalg.norm(heads_first(np.asarray(x), layout) - y) / np.linalg.norm(y)
        assert error < tolerance, error


SIZES = {
    "one full tile": Sizes(2, 3, 256, 256),
    "two full tiles": Sizes(1, 3, 512, 512),
    "ragged": Sizes(2, 3, 197, 197),
    "two ragged tiles": Sizes(1, 3, 129, 300),
    "more queries than keys": Sizes(2, 2, 300, 70),
    "one block": Sizes(1, 5, 20, 257),
    "two blocks": Sizes(5, 1, 50, 33),
    "one query": Sizes(1, 3, 1, 40),
}
CASES = [
    *((name, "BTNH", BFLOAT16, {}) for name in SIZES),
    ("ragged", "BNTH", BFLOAT16, {}),
    ("two ragged tiles", "BNTH", FLOAT16, {}),
    # Where logarithms are far below 0, a key that is not there would have infinite weights.
    ("ragged", "BTNH", FLOAT16, {"shift": 100.0}),
    ("two ragged tiles", "BTNH", FLOAT16, {"shift": -120.0}),
    ("two ragged tiles", "BTNH", FLOAT16, {"size": 30.0}),
]


def tolerance_of(dtype):
    """Twice the errors of cuDNN, whose gradients are rounded likewise."""
    return 5e-3 if dtype == BFLOAT16 else 2.5e-3


@pytest.mark.parametrize(("name", "layout", "dtype", "values"), CASES)
@pytest.mark.parametrize("programs", [1, 2])
def test_emulated(monkeypatch, name, layout, dtype, values, programs):
    monkeypatch.setattr(attention_backward, "PROGRAMS", programs)
    sizes = SIZES[name]
    kernel = kernel_of(sizes, dtype, layout=layout)
    assert kernel.programs == programs
    (q, k, v, out, lse, d_out), want = draw(kernel, 0.125, layout, **values)
    beyond = sizes.blocks * QUERIES - sizes.queries
    padded = np.pad(lse, ((0, 0), (0, 0), (0, beyond)), constant_values=np.inf).reshape(-1)
    *got, _ = gluon_emulator.run(kernel, q, k, v, out, d_out, padded)
    check(got, want, layout, tolerance_of(dtype))


@pytest.mark.aot
@pytest.mark.parametrize("name", ["one full tile", "two full tiles", "ragged", "two ragged tiles"])
def test_compiles(name):
    binary = aot.compile_gluon(kernel_of(SIZES[name]), 90)
    # Spilled once a tile: the products' addresses and what is known of the next tile.
    assert binary.spill_bytes <= 400
    assert binary.registers <= 168
    assert binary.scratch_bytes == 0
    # Two groups of four, and four of which one loads and one adds up.
    assert binary.num_warps == 12
    assert binary.shared_bytes <= compat.shared_memory_limit(90)
    assert "wgmma.mma_async" in binary.ptx and "setmaxnreg" in binary.ptx


def operand_types(kernel, sizes):
    """Those of :func:`attention_backward.call`."""
    q, k, v, out, d_out, _ = (
        jax.ShapeDtypeStruct(o.type.shape, o.type.dtype) for o in kernel.inputs
    )
    lse = jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.queries), jnp.float32)
    return q, k, v, out, lse, d_out


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("layout", ["BTNH", "BNTH"])
def test_jax_compiles_the_same(layout, monkeypatch):
    compat.import_jax_triton()
    library = importlib.import_module("jax_triton.triton_lib")
    compiled = []
    compile_ptx = library.compile_ttir_to_ptx_inplace

    def record(*arguments):
        result = compile_ptx(*arguments)
        compiled.append(result.binary)
        return result

    monkeypatch.setattr(library, "compile_ttir_to_ptx_inplace", record)
    sizes = Sizes(3, 7, 230, 222)  # that nothing has compiled before
    kernel = kernel_of(sizes, layout=layout)
    call = functools.partial(attention_backward.call, kernel, compute_capability=90)
    types = operand_types(kernel, sizes)
    text = jax.jit(call).trace(*types).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1 and "dot_general" not in text

    def code(ptx):
        # What follows tells of the source file, which may be that of another checkout in the cache.
        ptx, _, _ = ptx.partition(".section")
        lines = (line.split("//")[0].strip() for line in ptx.splitlines())
        return [line for line in lines if line and not line.startswith((".loc", ".file"))]

    assert [code(ptx) for ptx in compiled] == [code(aot.compile_gluon(kernel, 90).ptx)]


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("layout", ["BTNH", "BNTH"])
def test_descriptors(layout, monkeypatch):
    """jaxlib makes them of operands and then results, in order; the workspace comes last."""
    compat.import_jax_triton()
    bindings = importlib.import_module("jax_triton.triton_lib").triton_kernel_call_lib
    described = []

    def recording(make):
        def record(*arguments, **named):
            described.append((named.get("shape"), named.get("block_shape")))
            return make(*arguments, **named)

        return record

    for name in ("create_tma_descriptor_parameter", "create_array_parameter"):
        monkeypatch.setattr(bindings, name, recording(getattr(bindings, name)))
    sizes = Sizes(3, 4, 200, 300)
    kernel = kernel_of(sizes, layout=layout)
    types = [jax.ShapeDtypeStruct(o.type.shape, o.type.dtype) for o in kernel.inputs]
    program = jax.jit(functools.partial(gluon_kernels.call, kernel, compute_capability=90))
    results = jax.eval_shape(program, *types)
    assert [r.shape for r in results[:3]] == [types[0].shape, types[1].shape, types[1].shape]
    program.trace(*types).lower(lowering_platforms=("cuda",))
    ends = (3, 4 * 64) if layout == "BTNH" else (12, 64)
    q, k = ((ends[0], n, ends[1]) for n in (200, 300))
    assert described == [
        (q, [1, 32, 64]),
        (k, [1, 256, 64]),
        (k, [1, 256, 64]),
        (q, [1, 32, 64]),
        (q, [1, 32, 64]),
        ((12 * 224,), [32]),
        (q, [1, 32, 64]),
        (k, [1, 128, 64]),
        (k, [1, 128, 64]),
        (None, None),
    ]


def test_full_blocks_are_read_in_place():
    for queries, pads in ((256, False), (255, True)):
        sizes = Sizes(2, 2, queries, 256)
        kernel = kernel_of(sizes)
        call = functools.partial(attention_backward.call, kernel, compute_capability=90)
        jaxpr = jax.make_jaxpr(call)(*operand_types(kernel, sizes))
        assert ("name=_pad" in str(jaxpr)) == pads


def test_workspace_for_two_tiles_only():
    for keys, size in ((256, 1), (257, 132 * 160 * 64)):
        assert kernel_of(Sizes(64, 8, 150, keys)).outputs[-1].type.shape == (size,)
    assert kernel_of(Sizes(2, 3, 150, 257)).outputs[-1].type.shape == (6 * 160 * 64,)


@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        (Sizes(2, 3, 256, 256), np.dtype("float32"), "bfloat16 or float16, got float32"),
        (Sizes(2, 3, 513, 256), BFLOAT16, "1 to 512 queries and keys"),
        (Sizes(2, 3, 256, 0), BFLOAT16, "1 to 512 queries and keys"),
        (Sizes(0, 3, 256, 256), BFLOAT16, "1 to 512 queries and keys"),
    ],
)
def test_what_it_does_not_take(sizes, dtype, message):
    with pytest.raises(UnsupportedKernel, match=message):
        kernel_of(sizes, dtype)


def test_other_devices_and_operands():
    sizes = SIZES["one full tile"]
    kernel = kernel_of(sizes)
    for capability in (80, 100):
        with pytest.raises(UnsupportedKernel, match=f"9.0, got {capability / 10}"):
            gluon_kernels.precompile(kernel, capability)
        with pytest.raises(UnsupportedKernel, match=f"9.0, got {capability / 10}"):
            aot.compile_gluon(kernel, capability)
    q, *rest = operand_types(kernel, sizes)
    wrong = jax.ShapeDtypeStruct(q.shape, jnp.float16)
    call = functools.partial(attention_backward.call, kernel, compute_capability=90)
    with pytest.raises(TypeError, match=r"got float16\[2,256,3,64\]"):
        jax.eval_shape(call, wrong, *rest)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "layout", "dtype", "values"), CASES)
def test_on_a_gpu(name, layout, dtype, values):
    if compat.local_compute_capability() != 90:
        pytest.skip("needs a GPU of compute capability 9.0")
    kernel = kernel_of(SIZES[name], dtype, layout=layout)
    operands, want = draw(kernel, 0.125, layout, **values)
    run = jax.jit(functools.partial(attention_backward.call, kernel, compute_capability=90))
    got = run(*operands)
    check(got, want, layout, tolerance_of(dtype))
    for again in (run(*operands) for _ in range(3)):
        for x, y in zip(got, again, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["full", "ragged", "two full tiles", "two ragged tiles"])
def test_many_heads_on_a_gpu(name):
    """More (batch, head) than programs, so that each takes several."""
    if compat.local_compute_capability() != 90:
        pytest.skip("needs a GPU of compute capability 9.0")
    sizes = {
        "full": Sizes(40, 12, 256, 256),
        "ragged": Sizes(40, 12, 197, 197),
        "two full tiles": Sizes(20, 16, 512, 512),
        "two ragged tiles": Sizes(20, 16, 401, 499),
    }[name]
    kernel = kernel_of(sizes)
    operands, want = draw(kernel, 0.125, "BTNH")
    run = jax.jit(functools.partial(attention_backward.call, kernel, compute_capability=90))
    check(run(*operands), want, "BTNH", tolerance_of(BFLOAT16))
