"""Few long rows: which kernels they become, what these read and write, and in what order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels import aot, codegen, interpreter, launch
from jevt_kernels.mainloops import long_rows, rowwise
from jevt_kernels.spec import Config, KernelSpec, Stages, UnsupportedKernel

LONG = jax.ShapeDtypeStruct((8, 1000000), contract.BFLOAT16)
HALF = 2 * 8 * 1000000  # bytes
SPLIT = Config((("row", 2), ("col", 8)), splits=3)


def steps(spec: KernelSpec) -> tuple[Any, ...]:
    stages = codegen.generate(spec).stages
    assert stages is not None
    return stages.steps


def layer_norm(x: Any) -> Any:
    return jax.nn.standardize(x, axis=1, variance=x.var(1, keepdims=True))


def trust(w: Any, m: Any, g: Any) -> Any:
    """LAMB's update of one tensor: the moment, and the weights by the ratio of two norms."""
    m = 0.9 * m + 0.1 * g
    ratio = jnp.sqrt(jnp.square(w).sum()) / jnp.sqrt(jnp.square(m).sum())
    return w - 1e-3 * ratio * m, m


@pytest.mark.parametrize(
    ("function", "mainloops"),
    [
        (lambda x: x.sum(1), "parts rowwise"),
        (lambda x: jax.nn.logsumexp(x, axis=1), "parts rowwise"),
        (lambda x: (x + 1, x.max(1), x.max(1) - x.min(1)), "parts rowwise"),
        (jax.nn.softmax, "parts rowwise pointwise"),
        (layer_norm, "parts rowwise parts rowwise pointwise"),
    ],
    ids=["sum", "logsumexp", "beside a full result", "softmax", "layer norm"],
)
def test_kernels(function: Callable[..., Any], mainloops: str) -> None:
    spec = contract.build(function, LONG)
    assert [step.spec.mainloop for step in steps(spec)] == mainloops.split()
    large = [
        t for step in steps(spec) for t in (*step.spec.inputs, *step.spec.outputs) if t.nbytes > 1e6
    ]
    passes = mainloops.count("parts") + mainloops.count("pointwise")
    full = sum(output.nbytes >= HALF for output in spec.outputs)
    assert [t.nbytes for t in large] == [HALF] * (passes + full)


@pytest.mark.parametrize(
    ("rows", "columns", "parts"),
    [
        (1, 32769, 9),  # blocks of 4096
        (1, 10**9, 1053),  # 232 blocks each
        (8, 1000000, 123),  # two blocks each, but for the last
        (127, 131072, 8),  # four
        (128, 131072, None),  # rows enough
        (1, 32768, None),  # on chip
    ],
)
def test_number_of_parts(rows: int, columns: int, parts: int | None) -> None:
    spec = contract.reduction("sum", np.dtype("float32"), rows, columns)
    stages = codegen.generate(spec).stages
    if parts is None:
        assert stages is None
    else:
        assert stages is not None
        first = stages.steps[0].spec
        assert first.outputs[0].shape == (rows, parts)
        assert codegen.generate(first).grid == rows * parts
        assert rows * parts <= 1056


def test_the_whole_tensor_to_a_number_with_what_follows() -> None:
    """A norm's square root belongs to the small kernel."""
    first, second = steps(contract.build(lambda x: jnp.sqrt(jnp.square(x).sum()), LONG))
    assert "tl.sqrt" in codegen.generate(second.spec).text
    assert "tl.sqrt" not in codegen.generate(first.spec).text
    assert second.spec.outputs[0].shape == ()


def test_no_atomic_additions() -> None:
    for step in steps(contract.build(jax.nn.softmax, LONG)):
        assert "atomic" not in codegen.generate(step.spec).text


def donating(spec: KernelSpec, *pairs: tuple[int, int]) -> Stages:
    return long_rows.stages(dataclasses.replace(spec, aliases=pairs), 3)


def test_buffers_are_reused_by_the_last_kernel_that_reads_them() -> None:
    """The moment needs no norm, but the weights are made of the old one once more."""
    tensor = contract.random((300, 400))
    spec = contract.build(trust, tensor, tensor, tensor)
    stages = donating(spec, (0, 0), (1, 1))
    *others, last = stages.steps
    assert all(not step.spec.aliases for step in others)
    assert last.spec.mainloop == "pointwise"
    for output, source in ((0, 0), (1, 1)):
        place = stages.results[output] - (stages.results[0] - 0)
        assert (last.reads.index(source), place) in last.spec.aliases


def test_a_full_result_is_stored_in_the_last_pass() -> None:
    """Two passes read x; the second may overwrite it."""
    x = contract.random((2, 50000))
    spec = contract.build(lambda x: (x * 2, x.var(1)), x)
    stages = donating(spec, (0, 0))
    aliases = [step.spec.aliases for step in stages.steps]
    assert [step.spec.mainloop for step in stages.steps] == ["parts", "rowwise"] * 2
    assert aliases[2] and not (aliases[0] or aliases[1] or aliases[3])


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (trust, [(30, 50)] * 3),
        (lambda x: (x * 2, x.var(1)), [(3, 70)]),
        (lambda x, c: (x * c[:, None], (x * c[:, None]).sum(1) + c), [(3, 70), (3,)]),
        (lambda x: (x > 0).any(1) & (x < 2).all(1), [(3, 70)]),
        (lambda x: (jnp.isfinite(x).all(), x.max(), x.sum()), [(3, 7, 11)]),
        (lambda x, c: jax.nn.softmax(jnp.where(c > 0, x, -jnp.inf)), [(3, 70), (70,)]),
        (lambda x: x / jnp.linalg.norm(x.reshape(4, -1), axis=1)[:, None, None], [(4, 5, 6)]),
        (lambda x: x.transpose(1, 0, 2).sum((1, 2)) * 2, [(5, 4, 6)]),
    ],
    ids=["LAMB", "variance", "rows' values", "logical", "number", "mask", "images", "apart"],
)
def test_values(function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> None:
    arrays = [contract.random(shape, seed=seed) for seed, shape in enumerate(shapes)]
    spec = contract.check(function, *arrays, configs=(SPLIT, Config(SPLIT.blocks, splits=2)))
    assert codegen.generate(spec, SPLIT).stages is not None


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float16], ids=str)
def test_types(dtype: Any) -> None:
    x = contract.random((3, 70), dtype)
    contract.check(
        lambda x: (x.max(1), x.min(1), x.sum(1, dtype=x.dtype), x + 1), x, configs=(SPLIT,)
    )


@pytest.mark.interpret
def test_buffers_that_are_reused_hold_what_is_still_read() -> None:
    arrays = [contract.random((30, 50), seed=seed) for seed in range(3)]
    spec = contract.build(trust, *arrays)
    in_place = dataclasses.replace(spec, aliases=((0, 0), (1, 1)))
    expected = interpreter.run(spec, *arrays, config=SPLIT)
    for got, want in zip(interpreter.run(in_place, *arrays, config=SPLIT), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_reductions_of_several_passes_are_no_part() -> None:
    spec = contract.build(layer_norm, LONG)
    wrong = dataclasses.replace(spec, mainloop="parts")
    with pytest.raises(UnsupportedKernel, match="expected reductions of one pass over a row, got"):
        codegen.generate(wrong)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled(arch: int) -> None:
    for function in (jax.nn.softmax, layer_norm):
        for step in steps(contract.build(function, LONG)):
            binary = aot.compile(step.spec, arch)
            assert binary.spill_bytes == 0
            assert binary.registers <= 64
    spec = contract.build(jax.nn.softmax, LONG)
    for config in rowwise.configs(spec):
        assert aot.compile(spec, arch, config=config).spill_bytes == 0


@pytest.mark.cuda_lowering
def test_lowered_for_cuda() -> None:
    spec = contract.build(jax.nn.softmax, LONG)
    call = functools.partial(launch.call, spec, compute_capability=90)
    text = jax.jit(call).trace(LONG).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call_ffi") == 3
    assert "stablehlo.reduce" not in text
