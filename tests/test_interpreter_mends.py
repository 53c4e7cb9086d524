"""Each mend of Triton's interpreter is needed, and works."""

from __future__ import annotations

import importlib.metadata

import jax.numpy as jnp
import numpy as np
import pytest

from jevt_kernels import compat, interpreter
from jevt_kernels.index_map import Space, TileAxis
from jevt_kernels.spec import Config, KernelSpec, Source, TensorType

pytestmark = pytest.mark.interpret

BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT32 = np.dtype(np.float32)
HEADER = (
    "import triton\nimport triton.language as tl\nfrom jevt_kernels import device_math as dm\n\n"
    "@triton.jit\n"
)


def run(body: str, inputs: list[np.ndarray], output: TensorType) -> np.ndarray:
    names = [f"x{i}" for i in range(len(inputs))]
    text = f"{HEADER}def kernel({', '.join([*names, 'o'])}):\n"
    text += "".join(f"    {line}\n" for line in body.splitlines())
    spec = KernelSpec(
        name="kernel",
        mainloop="pointwise",
        space=Space((1,), (TileAxis("i", (0,)),)),
        tree=(),
        inputs=tuple(TensorType(x.shape, x.dtype) for x in inputs),
        outputs=(output,),
    )
    source = Source(text, "kernel", 1, Config((("i", 1),)))
    return interpreter.run(spec, *inputs, source=source)[0]


def test_dot_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """``jevt_kernels.compat`` mends it: kernels multiply bfloat16 as it is."""
    from triton.runtime.interpreter import InterpreterBuilder

    x = np.random.default_rng(0).normal(size=(16, 16)).astype(BFLOAT16)
    body = (
        "at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]\n"
        "tl.store(o + at, tl.dot(tl.load(x0 + at), tl.load(x0 + at)))"
    )
    expected = x.astype(np.float32) @ x.astype(np.float32)
    np.testing.assert_allclose(run(body, [x], TensorType((16, 16), FLOAT32)), expected, rtol=1e-5)
    original = InterpreterBuilder.create_dot.original  # type: ignore[attr-defined]
    monkeypatch.setattr(InterpreterBuilder, "create_dot", original)
    wrong = run(body, [x], TensorType((16, 16), FLOAT32))
    assert not np.allclose(wrong, expected, atol=1)


CAST = "at = tl.arange(0, 8)\ntl.store(o + at, tl.load(x0 + at).to({}))"


def test_float32_to_bfloat16_rounds_to_nearest_even() -> None:
    import interpreter_mends

    ulp = 2.0**-7
    x = np.array([1, 1 + ulp / 4, 1 + ulp / 2, 1 + 0.75 * ulp, 1 + 1.5 * ulp, -1.999, 3e38, np.inf])
    x = x.astype(np.float32)
    body = CAST.format("tl.bfloat16")
    with interpreter_mends.suspended("cast_impl", "create_fp_to_fp"):
        truncated = run(body, [x], TensorType((8,), BFLOAT16))
    assert truncated[3] == 1 != x.astype(BFLOAT16)[3]
    np.testing.assert_array_equal(run(body, [x], TensorType((8,), BFLOAT16)), x.astype(BFLOAT16))


@pytest.mark.parametrize(
    ("source", "target", "name"),
    [(np.int32, BFLOAT16, "tl.bfloat16"), (np.float64, BFLOAT16, "tl.bfloat16")],
)
def test_other_types_to_bfloat16(source: type, target: np.dtype, name: str) -> None:
    import interpreter_mends

    x = np.arange(-4, 4).astype(source)
    body = CAST.format(name)
    with interpreter_mends.suspended("cast_impl", "create_fp_to_fp"):
        wrong = run(body, [x], TensorType((8,), target))
    assert not np.array_equal(wrong, x.astype(target))
    np.testing.assert_array_equal(run(body, [x], TensorType((8,), target)), x.astype(target))


def test_range_over_a_loaded_value() -> None:
    import interpreter_mends

    x = np.array([3], np.int32)
    body = (
        "total = tl.load(x0) * 0\n"
        "for step in range(tl.load(x0)):\n"
        "    total += step\n"
        "tl.store(o, total)"
    )
    output = TensorType((1,), np.dtype(np.int32))
    numpy = compat.parse_version(importlib.metadata.version("numpy"))
    if compat.triton_version() < (3, 7) and numpy >= (2, 5):
        with (
            interpreter_mends.suspended("_patch_lang_tensor"),
            pytest.raises(Exception, match="0-dim"),
        ):
            run(body, [x], output)
    np.testing.assert_array_equal(run(body, [x], output), [3])


@pytest.mark.parametrize("function", ["nan_max", "nan_min"])
def test_reductions_that_propagate_nan(function: str) -> None:
    """The same values as element by element."""
    import interpreter_mends

    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    x[0, 3], x[1, 2], x[2, 5], x[3] = np.nan, np.inf, -np.inf, -np.inf
    body = (
        "at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]\n"
        f"most = tl.reduce(tl.load(x0 + at), 1, dm.{function}, keep_dims=True)\n"
        "tl.store(o + tl.arange(0, 4)[:, None], most)"
    )
    output = TensorType((4,), FLOAT32)
    with interpreter_mends.suspended("apply_impl"):
        slow = run(body, [x], output)
    np.testing.assert_array_equal(run(body, [x], output), slow)
    assert np.isnan(slow[0])
    assert not np.isnan(slow[1:]).any()
