"""Kernels on Triton's interpreter, and what happens without it."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_written import kernel, tanh_add, tensor

from jevt_kernels import interpreter

DTYPES = [
    *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, jnp.bfloat16, np.float32, np.float64),
]


def operands(size: int = 300) -> tuple[np.ndarray, np.ndarray]:
    return np.linspace(-2, 2, size, dtype=np.float32), np.full(size, 0.5, np.float32)


@pytest.mark.interpret
def test_run_in_place_and_beside() -> None:
    spec, source = tanh_add()
    x, y = operands()
    updated, sign = interpreter.run(spec, x, y, source=source)
    np.testing.assert_allclose(updated, y + np.tanh(x), atol=1e-6)
    np.testing.assert_array_equal(sign, np.sign(updated))
    np.testing.assert_array_equal(y, 0.5)  # the caller's array is not written


@pytest.mark.interpret
def test_call_inside_jit() -> None:
    spec, source = tanh_add()
    x, y = operands()

    @jax.jit
    def step(x: jax.Array, y: jax.Array) -> jax.Array:
        updated, _ = interpreter.call(spec, x, y, source=source)
        return 2 * updated

    np.testing.assert_allclose(step(x, y), 2 * (y + np.tanh(x)), atol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_is_copied(dtype: type) -> None:
    body = "i = tl.arange(0, 8)\ntl.store(y0 + i, tl.load(x0 + i))"
    spec, source = kernel(body, [tensor((8,), dtype)], [tensor((8,), dtype)])
    x = (np.arange(8) % 2 if dtype is np.bool_ else np.arange(8) * 3).astype(dtype)
    np.testing.assert_array_equal(interpreter.run(spec, x, source=source)[0], x)


@pytest.mark.interpret
def test_comparison_of_a_scalar_among_those_of_a_block() -> None:
    body = (
        "i = tl.arange(0, 8)\n"
        "whole = tl.load(x0) <= 0.5\n"
        "each = tl.load(x1 + i) <= 3\n"
        "tl.store(y0 + i, whole & each)\n"
        "tl.store(y1 + i, tl.where(whole | each, 1.0, 2.0))"
    )
    spec, source = kernel(body, [tensor(()), tensor((8,))], [tensor((8,), np.bool_), tensor((8,))])
    x = np.arange(8, dtype=np.float32)
    for scalar in (0, 1):
        both, either = interpreter.run(spec, np.float32(scalar), x, source=source)
        np.testing.assert_array_equal(both, (scalar == 0) & (x <= 3))
        np.testing.assert_array_equal(either, np.where((scalar == 0) | (x <= 3), 1, 2))


@pytest.mark.interpret
def test_scalars_empty_arrays_and_elements_never_stored() -> None:
    spec, source = kernel("tl.store(y0 + 1, tl.load(x0))", [tensor(())], [tensor((2,))])
    (result,) = interpreter.run(spec, np.float32(3), source=source)
    assert np.isnan(result[0])
    assert result[1] == 3
    spec, source = kernel("tl.store(y0, 1.0)", [tensor((0, 4))], [tensor((0, 4))], grid=0)
    assert interpreter.run(spec, np.empty((0, 4), np.float32), source=source)[0].shape == (0, 4)
    # An empty operand does not mean an empty result.
    spec, source = kernel("tl.store(y0, 0.0)", [tensor((0, 4))], [tensor(())])
    assert interpreter.run(spec, np.empty((0, 4), np.float32), source=source)[0] == 0


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "function", "points"),
    [
        ("acos", math.acos, [-1, -0.3, 0, 0.9]),
        ("acosh", math.acosh, [1, 1.5, 100]),
        ("asin", math.asin, [-1, -0.3, 0, 0.9]),
        ("asinh", math.asinh, [-50, 0, 1e-3, 2]),
        ("atan", math.atan, [-5, 0, 0.1, 40]),
        ("atanh", math.atanh, [-0.9, 0, 1e-3]),
        ("cbrt", math.cbrt, [-8, 0, 0.1, 27]),
        ("cosh", math.cosh, [-3, 0, 1]),
        ("erf", math.erf, [-3, -0.1, 0, 1]),
        ("erfc", math.erfc, [-3, 0, 1, 5]),
        ("expm1", math.expm1, [-3, 1e-6, 2]),
        ("lgamma", math.lgamma, [-1.5, 0.5, 1, 30]),
        ("log1p", math.log1p, [-0.5, 1e-6, 5]),
        ("sinh", math.sinh, [-3, 1e-6, 2]),
        ("tan", math.tan, [-1, 0, 1.5]),
        ("tanh", math.tanh, [-30, -1, 1e-4, 2]),
    ],
)
def test_libdevice(name: str, function: object, points: list[float], dtype: type) -> None:
    x = np.resize(np.array(points, dtype), 8)
    body = f"i = tl.arange(0, 8)\ntl.store(y0 + i, libdevice.{name}(tl.load(x0 + i)))"
    spec, source = kernel(body, [tensor((8,), dtype)], [tensor((8,), dtype)])
    (result,) = interpreter.run(spec, x, source=source)
    expected = np.array([function(float(value)) for value in x])
    rtol = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=1e-300)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["atan2", "pow", "fmod", "hypot"])
def test_libdevice_of_two_operands(name: str, dtype: type) -> None:
    x = np.array([-1.5, -1, 0, 0.5, 1, 2, 3, 4], dtype)
    y = np.array([2, 2, 1, -0.5, 3, 0.5, -2, 5], dtype)
    body = (
        f"i = tl.arange(0, 8)\ntl.store(y0 + i, libdevice.{name}(tl.load(x0 + i), tl.load(x1 + i)))"
    )
    operand = tensor((8,), dtype)
    spec, source = kernel(body, [operand, operand], [operand])
    (result,) = interpreter.run(spec, x, y, source=source)
    expected = [getattr(math, name)(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(result, expected, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_error_function(dtype: type) -> None:
    x = np.array([-1, -0.999999, -0.5, -1e-12, 0, 0.3, 0.75, 2], dtype)
    body = "i = tl.arange(0, 8)\ntl.store(y0 + i, libdevice.erfinv(tl.load(x0 + i)))"
    spec, source = kernel(body, [tensor((8,), dtype)], [tensor((8,), dtype)])
    (result,) = interpreter.run(spec, x, source=source)
    assert result[0] == -np.inf
    assert np.isnan(result[-1])
    back = [math.erf(float(value)) for value in result[:-1]]
    np.testing.assert_allclose(back, x[:-1], rtol=1e-7 if dtype is np.float32 else 1e-14)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("dtype", "name", "points", "expected"),
    [
        (np.int32, "clz", [0, 1, -1, 256], [32, 31, 0, 23]),
        (np.int32, "popc", [0, 1, -1, 255], [0, 1, 32, 8]),
        (np.int64, "clz", [0, 1, -1, 256], [64, 63, 0, 55]),
        (np.int64, "popc", [0, 1, -1, 255], [0, 1, 64, 8]),
        (np.float32, "round", [0.5, 1.5, -2.5, 0.49999997], [1, 2, -3, 0]),
        (np.float32, "rint", [0.5, 1.5, -2.5, 0.49999997], [0, 2, -2, 0]),
        (np.float32, "lgamma", [0, -1, 1, 2], [np.inf, np.inf, 0, 0]),
    ],
)
def test_libdevice_edges(dtype: type, name: str, points: list, expected: list) -> None:
    result_type = np.int32 if name in ("clz", "popc") else dtype
    body = f"i = tl.arange(0, 4)\ntl.store(y0 + i, libdevice.{name}(tl.load(x0 + i)))"
    spec, source = kernel(body, [tensor((4,), dtype)], [tensor((4,), result_type)])
    (result,) = interpreter.run(spec, np.array(points, dtype), source=source)
    np.testing.assert_array_equal(result, np.array(expected, result_type))


@pytest.mark.interpret
def test_unknown_libdevice_function_is_named() -> None:
    body = "i = tl.arange(0, 4)\ntl.store(y0 + i, libdevice.j0(tl.load(x0 + i)))"
    spec, source = kernel(body, [tensor((4,))], [tensor((4,))])
    with pytest.raises(Exception, match="__nv_j0f has no counterpart"):
        interpreter.run(spec, np.zeros(4, np.float32), source=source)


@pytest.mark.interpret
def test_bad_operands() -> None:
    spec, source = tanh_add()
    x, y = operands()
    with pytest.raises(TypeError, match="expected 2 operands, got 1"):
        interpreter.run(spec, x, source=source)
    with pytest.raises(TypeError, match=r"operand 1 of type float32\[300\], got float32\[299\]"):
        interpreter.run(spec, x, y[1:], source=source)
    with pytest.raises(TypeError, match=r"operand 0 of type float32\[300\], got float64\[300\]"):
        interpreter.run(spec, x.astype(np.float64), y, source=source)


@pytest.mark.aot
def test_without_the_variable() -> None:
    spec, source = tanh_add()
    with pytest.raises(RuntimeError, match="interpreter is off. Set TRITON_INTERPRET=1"):
        interpreter.run(spec, *operands(), source=source)


def test_variable_set_too_late() -> None:
    program = (
        "import triton, os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from jevt_kernels import interpreter; interpreter.require()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode
    assert "set after Triton was imported" in result.stderr
