"""The operations of :class:`~jevt_kernels.visitor.Compute`: one row an operation.

A row gives the Triton expression and the reference function. Both work on *compute types*: float16
and bfloat16 are float32 inside a kernel (:func:`compute_dtype`), every other type is itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: Triton's name of each dtype that a kernel can load or store.
TRITON_TYPES: dict[np.dtype, str] = {
    np.dtype(bool): "tl.int1",
    np.dtype("int8"): "tl.int8",
    np.dtype("int16"): "tl.int16",
    np.dtype("int32"): "tl.int32",
    np.dtype("int64"): "tl.int64",
    np.dtype("uint8"): "tl.uint8",
    np.dtype("uint16"): "tl.uint16",
    np.dtype("uint32"): "tl.uint32",
    np.dtype("uint64"): "tl.uint64",
    np.dtype("float16"): "tl.float16",
    BFLOAT16: "tl.bfloat16",
    np.dtype("float32"): "tl.float32",
    np.dtype("float64"): "tl.float64",
}


def is_float(dtype: np.dtype) -> bool:
    """Whether ``dtype`` is a floating-point type, bfloat16 included."""
    return dtype == BFLOAT16 or dtype.kind == "f"


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The type in which values of ``dtype`` are held between load and store."""
    return np.dtype("float32") if is_float(dtype) and dtype.itemsize < 4 else dtype


def triton_type(dtype: np.dtype) -> str:
    """Triton's name of the compute type of ``dtype``."""
    return TRITON_TYPES[compute_dtype(dtype)]


@dataclasses.dataclass(frozen=True)
class Arg:
    """An operand as generated code sees it.

    Attributes:
      text: a Triton expression of the operand's compute type.
      dtype: the operand's own type.
      literal: the value, when the operand is a constant.
    """

    text: str
    dtype: np.dtype
    literal: bool | int | float | None = None


type Emit = Callable[[tuple[Arg, ...], np.dtype], str]


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
      emit: prints the Triton expression from the operands and the result's own type.
      reference: the same function on JAX arrays of compute types; ``dtype`` is passed by keyword
        where ``needs_dtype`` says so.
      literals: whether constant operands may be printed as bare numbers, which Triton then gives
        the type of the other operand; "float" where integers are operands of a Triton function.
      results: number of results.
    """

    emit: Emit
    reference: Callable[..., Any]
    literals: bool | Literal["float"] = False
    needs_dtype: bool = False
    results: int = 1


def _is_finite(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    """Whether the value is finite as stored: a float16 that overflows is not."""
    bound = {np.dtype("float16"): "65520.0", BFLOAT16: repr((2 - 2.0**-8) * 2.0**127)}
    return f"tl.abs({args[0].text}) < {bound.get(args[0].dtype, "float('inf')")}"


def _infix(symbol: str) -> Emit:
    return lambda args, dtype: f"{args[0].text} {symbol} {args[1].text}"


def _call(function: str) -> Emit:
    return lambda args, dtype: f"{function}({', '.join(arg.text for arg in args)})"


def _float_call(function: str) -> Emit:
    return _call(f"libdevice.{function}")


def _erfc(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    library = "libdevice" if dtype == np.dtype("float64") else "dm"
    return f"{library}.erfc({args[0].text})"


def _tanh(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    function = "dm.short_tanh" if dtype.itemsize == 2 else "libdevice.tanh"
    return f"{function}({args[0].text})"


def _with_numbers(function: str) -> Emit:
    """A call whose operands but the first are constants."""

    def emit(args: tuple[Arg, ...], dtype: np.dtype) -> str:
        numbers = []
        for arg in args[1:]:
            if arg.literal is None:
                raise ValueError(f"{function}: expected a constant, got {arg.text}")
            numbers.append(repr(float(arg.literal)))
        return f"{function}({', '.join([args[0].text, *numbers])})"

    return emit


def _extremum(function: str) -> Emit:
    def emit(args: tuple[Arg, ...], dtype: np.dtype) -> str:
        x, y = args[0].text, args[1].text
        if is_float(dtype):
            return f"tl.{function}({x}, {y}, propagate_nan=tl.PropagateNan.ALL)"
        if dtype == np.dtype(bool):
            return f"({x} {'|' if function == 'maximum' else '&'} {y})"
        return f"tl.{function}({x}, {y})"

    return emit


def _div(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    if is_float(dtype):
        return f"{args[0].text} / {args[1].text}"
    return f"dm.int_div({args[0].text}, {args[1].text})"


def _rem(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    if is_float(dtype):
        return f"libdevice.fmod({args[0].text}, {args[1].text})"
    return f"dm.int_rem({args[0].text}, {args[1].text})"


def _neg(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    return f"0 - {args[0].text}" if dtype.kind == "u" else f"-{args[0].text}"


def _abs(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    return args[0].text if dtype.kind == "u" else f"tl.abs({args[0].text})"


def _sqrt(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    return f"tl.sqrt_rn({args[0].text})" if dtype.itemsize < 8 else f"tl.sqrt({args[0].text})"


def _select(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    which, *cases = args
    if which.dtype == np.dtype(bool):
        return f"tl.where({which.text}, {cases[1].text}, {cases[0].text})"
    text = cases[-1].text
    for index in reversed(range(len(cases) - 1)):
        text = f"tl.where({which.text} == {index}, {cases[index].text}, {text})"
    return text


def _convert(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    (x,) = args
    source, target = compute_dtype(x.dtype), compute_dtype(dtype)
    if source == target:
        return x.text
    if target == np.dtype(bool):
        return f"{x.text} != 0"
    if is_float(source) and not is_float(target):
        info = np.iinfo(target)
        return f"dm.float_to_int({x.text}, {info.min}, {info.max}, {triton_type(dtype)})"
    return f"{x.text}.to({triton_type(dtype)})"


def _bitcast(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    (x,) = args
    text = x.text
    if compute_dtype(x.dtype) != x.dtype:
        text = f"{text}.to({TRITON_TYPES[x.dtype]})"
    text = f"{text}.to({TRITON_TYPES[dtype]}, bitcast=True)"
    return text if compute_dtype(dtype) == dtype else f"{text}.to({triton_type(dtype)})"


def _integer_pow(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    x, exponent = args[0].text, int(args[1].literal or 0)
    return f"dm.integer_pow({x}, {exponent})"


def _shift_left(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    return f"dm.shift_left({args[0].text}, {args[1].text}, {dtype.itemsize * 8})"


def _shift_right(function: str, kind: Literal["int", "uint"]) -> Emit:
    """The bits decide, not the operand's type: they are read as a number of the given kind."""

    def emit(args: tuple[Arg, ...], dtype: np.dtype) -> str:
        x, amount = args
        bits = dtype.itemsize * 8
        own, needed = triton_type(dtype), f"tl.{kind}{bits}"
        if own == needed:
            return f"dm.{function}({x.text}, {amount.text}, {bits})"
        operand = f"{x.text}.to({needed}, bitcast=True)"
        return f"dm.{function}({operand}, {amount.text}, {bits}).to({own}, bitcast=True)"

    return emit


def _not(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    if dtype == np.dtype(bool):
        return f"{args[0].text} == 0"
    if dtype.kind == "u":  # Triton's interpreter has no complement of unsigned numbers
        return f"{args[0].text} ^ {np.iinfo(dtype).max}"
    return f"~{args[0].text}"


def _sign(args: tuple[Arg, ...], dtype: np.dtype) -> str:
    return (
        f"dm.sign({args[0].text})"
        if dtype.kind != "u"
        else f"({args[0].text} != 0).to({triton_type(dtype)})"
    )


def _round_to_bfloat16_reference(x: jax.Array) -> jax.Array:
    return lax.reduce_precision(x, 8, 7)


def _convert_reference(x: jax.Array, *, dtype: np.dtype) -> jax.Array:
    return lax.convert_element_type(x, compute_dtype(dtype))


def _bitcast_reference(x: jax.Array, *, dtype: np.dtype) -> jax.Array:
    raise NotImplementedError(
        "evaluated by jevt_kernels.reference, which knows the operand's own type"
    )


def _threefry_reference(k0: Any, k1: Any, x0: Any, x1: Any) -> Any:
    shape = jnp.broadcast_shapes(*(jnp.shape(v) for v in (k0, k1, x0, x1)))
    from jax.extend.core import primitives

    return primitives.threefry2x32_p.bind(*(jnp.broadcast_to(v, shape) for v in (k0, k1, x0, x1)))


def _broadcasting(function: Callable[..., Any]) -> Callable[..., Any]:
    """lax functions want equal shapes; kernels broadcast."""
    return lambda *args: function(*jnp.broadcast_arrays(*args))


def _row(emit: Emit, reference: Callable[..., Any], **flags: Any) -> Op:
    return Op(emit, _broadcasting(reference), **flags)


OPS: dict[str, Op] = {
    "abs": _row(_abs, jnp.abs),
    "acos": _row(_float_call("acos"), lax.acos),
    "acosh": _row(_float_call("acosh"), lax.acosh),
    "add": _row(_infix("+"), lax.add, literals=True),
    "and": _row(_infix("&"), lax.bitwise_and),
    "asin": _row(_float_call("asin"), lax.asin),
    "asinh": _row(_float_call("asinh"), lax.asinh),
    "atan": _row(_float_call("atan"), lax.atan),
    "atan2": _row(_float_call("atan2"), lax.atan2),
    "atanh": _row(_float_call("atanh"), lax.atanh),
    "bitcast": Op(_bitcast, _bitcast_reference, needs_dtype=True),
    "cbrt": _row(_float_call("cbrt"), lax.cbrt),
    "ceil": _row(_call("tl.ceil"), lax.ceil),
    "clamp": _row(
        lambda args, dtype: _extremum("minimum")(
            (Arg(_extremum("maximum")((args[1], args[0]), dtype), dtype), args[2]), dtype
        ),
        lambda low, x, high: lax.min(lax.max(x, low), high),
    ),
    "convert": Op(_convert, _convert_reference, needs_dtype=True),
    "copy": _row(lambda args, dtype: args[0].text, lambda x: x),
    "cos": _row(_call("tl.cos"), lax.cos),
    "cosh": _row(_float_call("cosh"), lax.cosh),
    "div": _row(_div, lax.div, literals="float"),
    "eq": _row(_infix("=="), lax.eq, literals=True),
    "erf": _row(_call("tl.erf"), lax.erf),
    "erf_inv": _row(_float_call("erfinv"), lax.erf_inv),
    "erfc": _row(_erfc, lax.erfc),
    "exp": _row(_call("dm.exp"), lax.exp),
    "exp2": _row(_call("tl.exp2"), lax.exp2),
    "expm1": _row(_float_call("expm1"), lax.expm1),
    "floor": _row(_call("tl.floor"), lax.floor),
    # exp(-(scale x)²) of x and scale.
    "gaussian": _row(
        _with_numbers("dm.gaussian"), lambda x, scale: jnp.exp(-jnp.square(scale * x))
    ),
    "ge": _row(_infix(">="), lax.ge, literals=True),
    "gt": _row(_infix(">"), lax.gt, literals=True),
    "integer_pow": _row(_integer_pow, lambda x, y: lax.integer_pow(x, int(y.flat[0]))),
    "is_finite": _row(_is_finite, lax.is_finite),
    "le": _row(_infix("<="), lax.le, literals=True),
    "lgamma": _row(_float_call("lgamma"), lax.lgamma),
    "log": _row(_call("tl.log"), lax.log),
    "log1p": _row(_float_call("log1p"), lax.log1p),
    # log(1 + x) of 0 <= x <= 1.
    "log1p_of_unit": _row(_call("dm.log1p_of_unit"), lax.log1p),
    "log2": _row(_call("tl.log2"), jnp.log2),
    "logistic": _row(_call("dm.logistic"), lax.logistic),
    # The sigmoid of x, and what there is of it already: exp(-|x|).
    "logistic_of": _row(_call("dm.logistic_of"), lambda x, m: jnp.where(x >= 0, 1, m) / (1 + m)),
    "lt": _row(_infix("<"), lax.lt, literals=True),
    "max": _row(_extremum("maximum"), lax.max),
    "min": _row(_extremum("minimum"), lax.min),
    "mul": _row(_infix("*"), lax.mul, literals=True),
    "ne": _row(_infix("!="), lax.ne, literals=True),
    "neg": _row(_neg, lax.neg),
    "nextafter": _row(_float_call("nextafter"), lax.nextafter),
    "not": _row(_not, lax.bitwise_not),
    "one_minus_square": _row(
        lambda args, dtype: f"(1 - {args[0].text}) * (1 + {args[0].text})",
        lambda x: (1 - x) * (1 + x),
    ),
    # The probability m / (1 + m) of odds m.
    "of_odds": _row(_call("dm.of_odds"), lambda m: m / (1 + m)),
    "or": _row(_infix("|"), lax.bitwise_or),
    "pow": _row(
        lambda args, dtype: (
            f"libdevice.pow({args[0].text}, {args[1].text}.to({triton_type(dtype)}))"
        ),
        lambda x, y: lax.pow(x, y.astype(x.dtype)),
    ),
    "rem": _row(_rem, lax.rem),
    "round_away": _row(
        _float_call("round"), lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)
    ),
    "round_even": _row(
        _float_call("rint"), lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    ),
    "round_to_bfloat16": _row(
        lambda args, dtype: f"{args[0].text}.to(tl.bfloat16).to({triton_type(dtype)})",
        _round_to_bfloat16_reference,
    ),
    "rsqrt": _row(lambda args, dtype: f"tl.rsqrt({args[0].text})", lax.rsqrt),
    # factor erfc(scale x) of x, scale and factor, as bfloat16 needs it.
    "scaled_erfc": _row(
        _with_numbers("dm.scaled_erfc"), lambda x, scale, factor: factor * lax.erfc(scale * x)
    ),
    "select_n": _row(_select, lax.select_n),
    "shift_left": _row(_shift_left, lax.shift_left),
    "shift_right_arithmetic": _row(
        _shift_right("shift_right_arithmetic", "int"), lax.shift_right_arithmetic
    ),
    "shift_right_logical": _row(_shift_right("shift_right", "uint"), lax.shift_right_logical),
    "sign": _row(_sign, lax.sign),
    "sin": _row(_call("tl.sin"), lax.sin),
    "sinh": _row(_float_call("sinh"), lax.sinh),
    "sqrt": _row(_sqrt, lax.sqrt),
    "square": _row(lambda args, dtype: f"{args[0].text} * {args[0].text}", lambda x: x * x),
    "sub": _row(_infix("-"), lax.sub, literals=True),
    "tan": _row(_float_call("tan"), lax.tan),
    "tanh": _row(_tanh, lax.tanh),
    "threefry2x32": Op(_call("dm.threefry2x32"), _threefry_reference, results=2),
    "xor": _row(_infix("^"), lax.bitwise_xor),
}

#: Operations whose Triton form exists for floating-point operands only.
_FLOAT_ONLY = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh cbrt ceil cos cosh erf erf_inv erfc exp exp2 expm1
    floor gaussian is_finite lgamma log log1p log1p_of_unit log2 logistic logistic_of nextafter
    of_odds pow round_away round_even round_to_bfloat16 rsqrt scaled_erfc sin sinh sqrt tan tanh
    """.split()  # noqa: SIM905
)


def check(op: str, operands: tuple[np.dtype, ...], result: np.dtype, index: int = 0) -> None:
    """Raises ``ValueError`` when ``op`` has no Triton form for these types."""
    row = OPS.get(op)
    if row is None:
        raise ValueError(f"expected an operation of {sorted(OPS)}, got {op!r}")
    if index >= row.results:
        raise ValueError(f"{op} has {row.results} results, asked for result {index}")
    if op in _FLOAT_ONLY and not is_float(operands[0]):
        raise ValueError(f"{op} of {operands[0]} has no Triton form")
    if op == "nextafter" and operands[0].itemsize < 4:
        raise ValueError(f"{op} of {operands[0]} has no Triton form: it is computed in float32")
    unknown = [d for d in (*operands, result) if d not in TRITON_TYPES]
    if unknown:
        raise ValueError(f"{op} of {unknown[0]} has no Triton form")
