"""Every operation on every type that it accepts, at the edges, against ``jax.jit`` of lax."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives

from jevt_kernels import aot, interpreter, ops
from jevt_kernels.ops import OPS, TRITON_TYPES
from jevt_kernels.reference import reference
from jevt_kernels.spec import Config

BFLOAT16 = contract.BFLOAT16
BOOL = np.dtype(bool)
FLOATS = [d for d in TRITON_TYPES if ops.is_float(d)]
INTEGERS = [d for d in TRITON_TYPES if d.kind in "iu"]


@dataclasses.dataclass(frozen=True)
class Case:
    """How an operation is tested.

    Attributes:
      function: what ``jax.jit`` compiles for comparison.
      arity: number of operands, all of one type.
      domain: replaces the edge values of floats.
      ulps: allowed error of float32 and float64 in units in the last place.
      signed_zero: whether the sign of a zero result must be right.
    """

    function: Callable[..., Any]
    arity: int = 1
    domain: tuple[float, ...] = ()
    ulps: float = 16
    signed_zero: bool = False


def exact(function: Callable[..., Any], arity: int = 1) -> Case:
    return Case(function, arity, ulps=0, signed_zero=True)


def logistic_of(x: jax.Array, m: jax.Array) -> jax.Array:
    lax.logistic(x)  # no integers
    return jnp.where(x >= 0, 1, m) / (1 + m)


_WITHIN_ONE = (-1.0, -0.99, -0.5, -1e-3, -0.0, 0.0, 1e-3, 0.25, 0.9, 1.0, 1.5, -2.0, np.nan)
_MODERATE = (-30.0, -8.0, -2.0, -0.7, -1e-3, -0.0, 0.0, 1e-3, 0.3, 1.0, 2.5, 9.0, 50.0, np.nan)

CASES: dict[str, Case] = {
    "abs": exact(lax.abs),
    "acos": Case(lax.acos, domain=_WITHIN_ONE),
    "acosh": Case(lax.acosh, domain=(1.0, 1.001, 2.0, 1e4, np.inf, 0.5, np.nan), ulps=64),
    "add": exact(lax.add, 2),
    "and": exact(lax.bitwise_and, 2),
    "asin": Case(lax.asin, domain=_WITHIN_ONE),
    "asinh": Case(lax.asinh),
    "atan": Case(lax.atan),
    "atan2": Case(lax.atan2, 2),
    "atanh": Case(lax.atanh, domain=_WITHIN_ONE),
    "cbrt": Case(lax.cbrt),
    "ceil": exact(lax.ceil),
    "clamp": exact(lax.clamp, 3),
    "copy": exact(lambda x: x),
    "cos": Case(lax.cos, domain=(*_MODERATE, np.inf), ulps=64),
    "cosh": Case(lax.cosh, domain=(*_MODERATE, np.inf, -np.inf)),
    "div": Case(lax.div, 2, ulps=2, signed_zero=True),
    "eq": exact(lax.eq, 2),
    "erf": Case(lax.erf),
    "erf_inv": Case(lax.erf_inv, domain=_WITHIN_ONE, ulps=64),
    "erfc": Case(lax.erfc, domain=(*_MODERATE[2:-2], 5.0, np.inf, -np.inf), ulps=128),
    "exp": Case(lax.exp, ulps=128),
    "exp2": Case(lax.exp2, ulps=128),
    "expm1": Case(lax.expm1),
    "floor": exact(lax.floor),
    "ge": exact(lax.ge, 2),
    "gt": exact(lax.gt, 2),
    "is_finite": exact(lax.is_finite),
    "le": exact(lax.le, 2),
    "lgamma": Case(
        lax.lgamma, domain=(0.1, 0.5, 3.0, 30.0, 1e4, -0.5, -1.7, np.inf, np.nan), ulps=256
    ),
    "log": Case(lax.log),
    "log1p": Case(lax.log1p),
    "log1p_of_unit": Case(
        lax.log1p, domain=(0.0, 1e-30, 1e-7, 0.01, 0.3, 0.7, 1.0, np.nan), ulps=8
    ),
    "log2": Case(lambda x: jnp.log2(x) if ops.is_float(np.dtype(x.dtype)) else lax.log(x)),
    "logistic": Case(lax.logistic, ulps=128),
    "logistic_of": Case(
        logistic_of, 2, domain=(-0.5, -0.0, 0.0, 1e-7, 0.01, 0.3, 1.0, np.nan), ulps=4
    ),
    "lt": exact(lax.lt, 2),
    "max": Case(lax.max, 2, ulps=0),
    "min": Case(lax.min, 2, ulps=0),
    "mul": exact(lax.mul, 2),
    "ne": exact(lax.ne, 2),
    "neg": exact(lax.neg),
    "nextafter": exact(lax.nextafter, 2),
    "not": exact(lax.bitwise_not),
    "one_minus_square": Case(lambda x: (1 - x) * (1 + x), ulps=4),
    "of_odds": Case(
        lambda m: lax.logistic(lax.log(m)),  # no integers
        domain=(0.0, 1e-30, 1e-7, 0.01, 0.3, 1.0, 7.0, np.nan),
        ulps=64,
    ),
    "or": exact(lax.bitwise_or, 2),
    "pow": Case(lax.pow, 2, ulps=128),
    "rem": exact(lax.rem, 2),
    "round_away": exact(lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)),
    "round_even": exact(lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)),
    "round_to_bfloat16": exact(lambda x: lax.reduce_precision(x, 8, 7)),
    "rsqrt": Case(lax.rsqrt, ulps=4),
    "shift_left": exact(lax.shift_left, 2),
    "shift_right_arithmetic": exact(lax.shift_right_arithmetic, 2),
    "shift_right_logical": exact(lax.shift_right_logical, 2),
    "sign": exact(lax.sign),
    "sin": Case(lax.sin, domain=(*_MODERATE, np.inf), ulps=64),
    "sinh": Case(lax.sinh, domain=(*_MODERATE, np.inf, -np.inf)),
    "sqrt": Case(lax.sqrt, ulps=1),
    "square": exact(lambda x: x * x),
    "sub": exact(lax.sub, 2),
    "tan": Case(lax.tan, domain=_MODERATE, ulps=256),
    "tanh": Case(lax.tanh, ulps=32),
    "xor": exact(lax.bitwise_xor, 2),
}

#: Tested by functions of their own below: their operands or results have several types.
OTHERS = {
    *("bitcast", "convert", "gaussian", "integer_pow", "scaled_erfc", "select_n", "threefry2x32"),
}


def test_every_operation_is_tested() -> None:
    assert set(CASES) | OTHERS == set(OPS)


def edges(dtype: np.dtype) -> np.ndarray:
    """Values at which definitions differ."""
    if dtype == BOOL:
        return np.array([False, True])
    if ops.is_float(dtype):
        numbers = [0.0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, -2.5, 3, 7, -7, 0.1, 100, -100, 1e-3]
        numbers += [np.inf, -np.inf, np.nan, *np.random.default_rng(0).normal(size=8)]
        if dtype.itemsize > 2:
            numbers += [1e30, -1e30, 1e-30, 16777217.0]
        return np.array(numbers).astype(dtype)
    info, bits = np.iinfo(dtype), dtype.itemsize * 8
    numbers = [0, 1, 2, 3, 7, 100, bits - 1, bits, info.max - 1, info.max, info.min, info.min + 1]
    if dtype.kind == "i":
        numbers += [-1, -2, -3, -7, -100]
    return np.array(numbers, dtype)


#: Where JAX computes and a kernel does not.
REFUSED = {("nextafter", "float16"), ("nextafter", "bfloat16")}

#: Operands of a kernel have one length.
SIZE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Check:
    """A term of a kernel, and how its value is known otherwise."""

    term: contract.Term
    function: Callable[..., Any]
    case: Case


def result_type(function: Callable[..., Any], operands: Sequence[Any]) -> np.dtype | None:
    """The dtype that JAX gives, None where it refuses."""
    try:
        with jax.enable_x64(True):
            return np.dtype(jax.eval_shape(function, *operands).dtype)
    except TypeError:
        return None


@functools.partial(jax.jit, static_argnums=0)
def expect(checks: tuple[Check, ...], operands: list[list[Any]]) -> list[Any]:
    """What JAX computes: float16 and bfloat16 in float32, rounded once, as XLA does in fusions."""
    results = []
    for check, mine in zip(checks, operands, strict=True):
        wide = [x.astype(ops.compute_dtype(np.dtype(x.dtype))) for x in mine]
        results.append(lax.convert_element_type(check.function(*wide), check.term.result))
    return results


def hold(checks: Sequence[Check]) -> None:
    """Runs the terms as one kernel, interpreted and by reference, against ``jax.jit``."""
    spec, arrays = contract.pointwise([check.term for check in checks])
    with jax.enable_x64(True):
        full = [[np.broadcast_to(x, (SIZE,)) for x in check.term.operands] for check in checks]
        expected = expect(tuple(checks), full)
        referred = jax.jit(lambda operands: reference(spec, *operands))(arrays)
    interpreted = interpreter.run(spec, *arrays)
    for results in (interpreted, referred):
        for got, want, check in zip(results, expected, checks, strict=True):
            types = ", ".join(str(operand.dtype) for operand in check.term.operands)
            assert_same(got, want, check.case, f"{check.term.op} of {types}")


def assert_same(got: Any, expected: Any, case: Case, what: str) -> None:
    a, b = np.asarray(got), np.asarray(expected)
    assert (a.dtype, a.shape) == (b.dtype, b.shape), what
    if not ops.is_float(a.dtype):
        np.testing.assert_array_equal(a, b, err_msg=what)
        return
    units = case.ulps if a.dtype.itemsize > 2 else min(case.ulps, 1)
    epsilon = float(jnp.finfo(a.dtype).eps) * units
    x, y = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(x, y, rtol=epsilon, atol=epsilon * 1e-3, err_msg=what)
    if case.signed_zero:
        zero = (x == 0) & (y == 0)
        np.testing.assert_array_equal(np.signbit(x[zero]), np.signbit(y[zero]), err_msg=what)


def combinations(case: Case, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """All combinations of edge values, one array an operand."""
    values = edges(dtype)
    if case.domain and ops.is_float(dtype):
        values = np.array(case.domain).astype(dtype)
    if case.arity == 3:
        values = values[:: max(1, len(values) // 8)]
    columns = zip(*itertools.product(values, repeat=case.arity), strict=True)
    return tuple(np.resize(np.array(column, dtype), SIZE) for column in columns)


def checks_of(op: str) -> list[Check]:
    """The operation on every type that JAX takes."""
    case = CASES[op]
    checks = []
    for dtype in TRITON_TYPES:
        operands = combinations(case, dtype)
        result = result_type(case.function, operands)
        if result is None:
            continue
        types = (dtype,) * case.arity
        if (op, dtype.name) in REFUSED:
            with pytest.raises(ValueError, match="has no Triton form"):
                ops.check(op, types, result)
            continue
        ops.check(op, types, result)
        checks.append(Check(contract.Term(op, operands, result), case.function, case))
    return checks


@pytest.mark.interpret
@pytest.mark.parametrize("op", CASES)
def test_operation(op: str) -> None:
    hold(checks_of(op))


@pytest.mark.aot
@pytest.mark.parametrize("op", CASES)
def test_operation_compiles(op: str) -> None:
    """The interpreter takes some expressions that the compiler does not."""
    spec, _ = contract.pointwise([check.term for check in checks_of(op)])
    aot.compile(spec, 80, config=Config((("i", 128),)))


@pytest.mark.aot
@pytest.mark.parametrize("source", TRITON_TYPES, ids=lambda d: d.name)
def test_conversions_compile(source: np.dtype) -> None:
    x = np.resize(edges(source), SIZE)
    terms = [contract.Term("convert", (x,), target) for target in TRITON_TYPES]
    if source != BOOL:
        terms += [
            contract.Term("bitcast", (x,), target)
            for target in TRITON_TYPES
            if target.itemsize == source.itemsize and target != BOOL
        ]
        terms += [contract.Term("integer_pow", (x, np.int32(3)), source)]
    terms += [contract.Term("select_n", (np.resize([True, False], SIZE), x, x), source)]
    aot.compile(contract.pointwise(terms)[0], 80, config=Config((("i", 128),)))


@pytest.mark.aot
@pytest.mark.parametrize("op", ["sum", "prod", "max", "min", "and", "or"])
@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=lambda d: d.name)
def test_reductions_compile(op: str, dtype: np.dtype) -> None:
    logical = op in ("and", "or")
    if (dtype == BOOL and op in ("sum", "prod")) or (dtype != BOOL and logical):
        pytest.skip("JAX has no such reduction")
    spec = contract.reduction(op, dtype, 64, 100)
    aot.compile(spec, 80, config=Config((("row", 4), ("col", 32))))


@pytest.mark.interpret
@pytest.mark.parametrize("source", TRITON_TYPES, ids=lambda d: d.name)
def test_convert(source: np.dtype) -> None:
    x = edges(source)
    if ops.is_float(source):
        limits = [float(b) for d in INTEGERS for b in (np.iinfo(d).min, np.iinfo(d).max)]
        near = [v + s for v in limits for s in (-1.0, -0.5, 0.0, 0.5, 1.0)]
        with np.errstate(over="ignore"):
            x = np.concatenate([x, np.array(near).astype(source)])
    x = np.resize(x, SIZE)
    hold(
        [
            Check(
                contract.Term("convert", (x,), target),
                lambda v, target=target: lax.convert_element_type(v, target),
                exact(lax.convert_element_type),
            )
            for target in TRITON_TYPES
        ]
    )


@pytest.mark.interpret
@pytest.mark.parametrize("source", [*FLOATS, *INTEGERS], ids=lambda d: d.name)
def test_bitcast(source: np.dtype) -> None:
    bits = np.dtype(f"uint{source.itemsize * 8}")
    x = contract.random((SIZE,), bits).view(source)
    targets = [d for d in TRITON_TYPES if d.itemsize == source.itemsize and d not in (source, BOOL)]
    for dtype in (source, *targets):  # NaN's payload and tiny numbers are nobody's promise
        if ops.is_float(dtype):
            with np.errstate(invalid="ignore"):
                magnitude = np.abs(x.view(dtype).astype(np.float64))
            x = x[magnitude >= float(jnp.finfo(dtype).tiny)]
    x = np.resize(x, SIZE)
    spec, arrays = contract.pointwise([contract.Term("bitcast", (x,), d) for d in targets])
    with jax.enable_x64(True):
        referred = reference(spec, *arrays)
    for got in (*interpreter.run(spec, *arrays), *referred):
        np.testing.assert_array_equal(np.asarray(got).view(bits), x.view(bits))


@pytest.mark.interpret
@pytest.mark.parametrize("exponent", [-3, -1, 0, 1, 2, 3, 7, 10])
def test_integer_pow(exponent: int) -> None:
    case = Case(lambda x: lax.integer_pow(x, exponent), ulps=4)
    types = FLOATS if exponent < 0 else [*FLOATS, *INTEGERS]
    operands = [(np.resize(edges(d), SIZE), np.int32(exponent)) for d in types]
    terms = [contract.Term("integer_pow", o, d) for o, d in zip(operands, types, strict=True)]
    hold([Check(term, lambda x, _: case.function(x), case) for term in terms])


@pytest.mark.interpret
def test_erfc_is_accurate_everywhere() -> None:
    x = np.concatenate([np.linspace(-6, 9, 4001), [0.0, -0.0, 30.0, -30.0]]).astype(np.float32)
    spec = contract.build(lax.erfc, x)
    exact = np.array([math.erfc(value) for value in x.tolist()])
    (got,) = interpreter.run(spec, x)
    near = x < 3
    np.testing.assert_allclose(got[near], exact[near], rtol=2e-6)
    np.testing.assert_allclose(got[~near], exact[~near], rtol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("scale", [-0.70703125, 1.0, 3.5])
def test_what_bfloat16_needs(scale: float) -> None:
    """exp(-(c·x)²) and b·erfc(c·x), far better than bfloat16's own rounding of a 256th."""
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0, np.inf, -np.inf, np.nan, 1e30]])
    x = x.astype(BFLOAT16)
    wide = scale * x.astype(np.float64)
    numbers = np.float32(scale), np.float32(-0.75)
    float32 = np.dtype("float32")
    spec, arrays = contract.pointwise(
        [
            contract.Term("gaussian", (x, numbers[0]), float32),
            contract.Term("scaled_erfc", (x, *numbers), float32),
        ]
    )
    exact = [np.exp(-wide * wide), -0.75 * np.array([math.erfc(value) for value in wide.tolist()])]
    for results in (interpreter.run(spec, *arrays), reference(spec, *arrays)):
        for got, want in zip(results, exact, strict=True):
            np.testing.assert_allclose(got, want, rtol=3e-4, atol=1e-36)


@pytest.mark.interpret
@pytest.mark.parametrize("count", [2, 4])
def test_select(count: int) -> None:
    which = (np.arange(SIZE) % count).astype(bool if count == 2 else np.int32)
    checks = []
    for dtype in TRITON_TYPES:
        values = np.resize(edges(dtype), SIZE)
        cases = [np.roll(values, shift) for shift in range(count)]
        term = contract.Term("select_n", (which, *cases), dtype)
        checks.append(Check(term, lax.select_n, exact(lax.select_n)))
    hold(checks)


@pytest.mark.interpret
def test_threefry_bit_for_bit() -> None:
    words = tuple(contract.random((SIZE,), np.uint32, seed) for seed in range(4))
    term = contract.Term("threefry2x32", words, np.dtype("uint32"))
    spec, arrays = contract.pointwise([term])
    expected = jax.jit(primitives.threefry2x32_p.bind)(*words)
    for results in (interpreter.run(spec, *arrays), reference(spec, *arrays)):
        for got, want in zip(results, expected, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.interpret
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "lt", "eq", "max", "rem", "and"])
def test_constant_on_either_side(op: str) -> None:
    """Constants may be printed as bare numbers: they must not change the other operand's type."""
    # XLA takes x + 0 for x, whatever the zeros' signs.
    case = dataclasses.replace(CASES[op], signed_zero=False)
    checks = []
    for dtype in TRITON_TYPES:
        x = np.resize(edges(dtype), SIZE)
        result = result_type(case.function, [x, x])
        if result is None:
            continue
        for scalar in edges(dtype)[::-7][:2]:
            checks += [
                Check(contract.Term(op, operands, result), case.function, case)
                for operands in ((x, scalar), (scalar, x))
            ]
    hold(checks)


def test_check_names_what_is_wrong() -> None:
    float32, complex64 = np.dtype("float32"), np.dtype("complex64")
    with pytest.raises(ValueError, match="expected an operation of .*, got 'fft'"):
        ops.check("fft", (float32,), float32)
    with pytest.raises(ValueError, match="tanh of int32 has no Triton form"):
        ops.check("tanh", (np.dtype("int32"),), np.dtype("int32"))
    with pytest.raises(ValueError, match="add of complex64 has no Triton form"):
        ops.check("add", (complex64, complex64), complex64)
    with pytest.raises(ValueError, match="has 2 results, asked for result 2"):
        ops.check("threefry2x32", (np.dtype("uint32"),) * 4, np.dtype("uint32"), 2)


def test_compute_types() -> None:
    assert ops.compute_dtype(BFLOAT16) == ops.compute_dtype(np.dtype("float16")) == np.float32
    for dtype in TRITON_TYPES:
        if dtype.itemsize > 2 or not ops.is_float(dtype):
            assert ops.compute_dtype(dtype) == dtype
