"""Running a :class:`~jevt_kernels.spec.KernelSpec` on a CPU through Triton's interpreter.

Every program instance is executed by NumPy, one after another: slow, but it checks addresses, masks
and arithmetic of the very source that a GPU runs. PyTorch is not needed.

The interpreter computes bfloat16 wrongly: arithmetic works on raw bits, and float32 is truncated to
bfloat16, where a GPU rounds to nearest even. Matrix products are mended (``jevt_kernels.compat``),
everything else computes in float32, so what remains is an error of one unit in the last place where
a value is rounded to bfloat16.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jevt_kernels import compat, launch, partials
from jevt_kernels.spec import Config, Descriptor, KernelSpec, Source, TensorType

# Host TMA descriptors need this alignment, and jax-triton's buffers have it.
_ALIGNMENT = 16

# The interpreter keeps the current program instance in a global.
_LOCK = threading.Lock()


class _Dtype(str):
    """A Triton type name that also has the two attributes of a PyTorch dtype that Triton reads.

    Triton caches type names by the dtype's hash, so it must hash by value: a string.
    """

    itemsize: int
    is_floating_point: bool

    @classmethod
    def of(cls, dtype: np.dtype) -> _Dtype:
        result = cls(launch.triton_name(dtype))
        result.itemsize = dtype.itemsize
        result.is_floating_point = result.startswith(("fp", "bf"))
        return result


class _Argument:
    """A NumPy array with the methods of a PyTorch tensor that Triton's interpreter calls.

    The interpreter copies its arguments to the host and back. These are on the host already, so
    copying is the identity and the kernel writes into the array itself.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = _Dtype.of(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def storage_offset(self) -> int:
        return 0

    def untyped_storage(self) -> _Argument:
        return self

    def cpu(self) -> _Argument:
        return self

    def new_empty(self, *_: Any, **__: Any) -> _Argument:
        return _Argument(self.array)

    def set_(self, *_: Any) -> None: ...

    def copy_(self, _: Any) -> None: ...


def _aligned(operand: TensorType) -> np.ndarray:
    """An array whose bits are all set (NaN, -1, True), so that an element never stored is seen."""
    if operand.dtype == np.bool_:
        raw = np.full(operand.nbytes + _ALIGNMENT, 1, np.uint8)
    else:
        raw = np.full(operand.nbytes + _ALIGNMENT, 0xFF, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + operand.nbytes].view(operand.dtype).reshape(operand.shape)


def _descriptor(descriptor: Descriptor, inputs: Sequence[np.ndarray]) -> Any:
    """The argument for a descriptor of one of the inputs."""
    library: Any = importlib.import_module("triton.tools.tensor_descriptor")
    base = _Argument(inputs[descriptor.input])
    lists = (descriptor.shape, descriptor.strides, descriptor.block)
    return library.TensorDescriptor(base, *map(list, lists))


def require() -> None:
    """Raises RuntimeError unless Triton interprets, saying what to do. Imports Triton."""
    advice = (
        "Set TRITON_INTERPRET=1 in the environment before Triton is imported, that is, before "
        "Python starts (TRITON_INTERPRET=1 python ...) or on the program's first line "
        "(os.environ['TRITON_INTERPRET'] = '1')."
    )
    wanted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")
    if not wanted:
        raise RuntimeError(f"Triton's interpreter is off. {advice}")
    compat.triton_version()
    if not compat.interpreting():
        raise RuntimeError(f"TRITON_INTERPRET=1 was set after Triton was imported. {advice}")
    _supply_functions()


def run(
    spec: KernelSpec,
    *operands: jax.Array | np.ndarray,
    config: Config | None = None,
    source: Source | None = None,
) -> tuple[np.ndarray, ...]:
    """Runs the kernel on NumPy arrays.

    Args:
      spec: the kernel.
      operands: arrays of the types ``spec.inputs``. They stay as they are, also where an output
        aliases one.
      config: launch configuration; the default is chosen by the mainloop.
      source: printed kernel to use instead of generating one; it brings its own configuration.

    Returns:
      One array for each of ``spec.outputs``. Elements that the kernel does not store are NaN, or
      have all bits set.

    Raises:
      RuntimeError: unless ``TRITON_INTERPRET=1`` was set before Triton was imported.
      TypeError: if the operands do not match the spec.
      UnsupportedKernel: if the spec cannot be generated or launched.
    """
    launch.check_operands(spec, operands)
    if not any(output.size for output in spec.outputs):
        return tuple(np.empty(output.shape, output.dtype) for output in spec.outputs)
    require()
    if source is None:
        source = launch.source_for(spec, config)
    if source.stages is not None:
        return launch.in_stages(run, source, [np.asarray(o) for o in operands])
    launch.check_grid(spec, source)
    inputs = []
    for operand, operand_type in zip(operands, spec.inputs, strict=True):
        inputs.append(_aligned(operand_type))
        inputs[-1][...] = np.asarray(operand)
    aliased = {output: inputs[position] for position, output in spec.aliases}
    results, own = [], []
    for position, output in enumerate(partials.written(spec, source).outputs):
        if position in aliased:
            results.append(aliased[position])
        else:
            own.append(_aligned(output))
            results.append(own[-1])
    arguments = [
        *map(_Argument, inputs),
        *(_descriptor(descriptor, inputs) for descriptor in source.descriptors),
        *map(_Argument, own),
    ]
    kernel = launch.load(source)
    # A GPU's arithmetic does not warn; masked lanes compute with whatever is there.
    with _LOCK, np.errstate(all="ignore"):
        kernel[(source.grid,)](*arguments)
    return partials.combine(spec, source, results, run)


def call(
    spec: KernelSpec,
    *operands: jax.Array,
    config: Config | None = None,
    source: Source | None = None,
) -> tuple[jax.Array, ...]:
    """:func:`run` as a traceable function, through ``jax.pure_callback``.

    Raises:
      RuntimeError, TypeError, UnsupportedKernel: as :func:`run` does, while tracing where possible.
    """
    launch.check_operands(spec, operands)
    require()
    if source is None:
        source = launch.source_for(spec, config)
    types = tuple(jax.ShapeDtypeStruct(output.shape, output.dtype) for output in spec.outputs)
    host = functools.partial(run, spec, source=source)
    return tuple(jax.pure_callback(host, types, *operands, vmap_method="sequential"))


# libdevice


def _pointwise(function: Callable[..., float], otherwise: float) -> Callable[..., np.ndarray]:
    """``function`` on each element in float64, ``otherwise`` where Python raises an error."""

    def guarded(*arguments: float) -> float:
        try:
            return function(*arguments)
        except (ValueError, OverflowError, ZeroDivisionError):
            return otherwise

    return np.vectorize(guarded, otypes=[np.float64])


def _erfinv(y: float) -> float:
    """Inverse error function: the normal quantile, then one Newton step on the smaller tail."""
    magnitude = abs(y)
    if not magnitude < 1:
        return math.copysign(math.inf, y) if magnitude == 1 else math.nan
    if magnitude < 1e-300:
        return y * math.sqrt(math.pi) / 2
    tail = 1 - magnitude
    x = -statistics.NormalDist().inv_cdf(tail / 2) / math.sqrt(2)
    error = tail - math.erfc(x) if magnitude > 0.5 else math.erf(x) - magnitude
    x -= error / (2 / math.sqrt(math.pi) * math.exp(-x * x))
    return math.copysign(x, y)


def _erfcinv(y: float) -> float:
    if y < 0.5:
        if not y > 0:
            return math.inf if y == 0 else math.nan
        return -statistics.NormalDist().inv_cdf(y / 2) / math.sqrt(2)
    return _erfinv(1 - y)


def _wide(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Computes in float64, so that rounding to float32 happens once."""

    def widened(*arguments: np.ndarray) -> np.ndarray:
        return function(*(np.asarray(argument, np.float64) for argument in arguments))

    return widened


def _round_half_away(x: np.ndarray) -> np.ndarray:
    whole = np.trunc(x)
    return np.where(np.abs(x - whole) >= 0.5, whole + np.copysign(1, x), whole)


# libdevice names of float64 functions; the float32 function has the suffix "f".
_FLOAT_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "copysign": np.copysign,
    "cos": np.cos,
    "cosh": np.cosh,
    "cospi": lambda x: np.cos(np.pi * np.fmod(x, 2)),
    "erf": _pointwise(math.erf, math.nan),
    "erfc": _pointwise(math.erfc, math.nan),
    "erfcinv": _pointwise(_erfcinv, math.nan),
    "erfinv": _pointwise(_erfinv, math.nan),
    "exp": np.exp,
    "exp10": lambda x: np.power(10.0, x),
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fabs": np.abs,
    "fdim": lambda x, y: np.where(x > y, x - y, np.where(np.isnan(x - y), np.nan, 0.0)),
    "floor": np.floor,
    "fma": lambda x, y, z: x * y + z,
    "fmod": np.fmod,
    "hypot": np.hypot,
    # Poles of the gamma function are where Python raises ValueError; beyond its range it overflows.
    "lgamma": _pointwise(math.lgamma, math.inf),
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "nearbyint": np.rint,
    "pow": np.power,
    "rcbrt": lambda x: 1 / np.cbrt(x),
    "remainder": lambda x, y: x - y * np.rint(x / y),
    "rint": np.rint,
    "round": _round_half_away,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "sinh": np.sinh,
    "sinpi": lambda x: np.sin(np.pi * np.fmod(x, 2)),
    "sqrt": np.sqrt,
    "tan": np.tan,
    "tanh": np.tanh,
    "trunc": np.trunc,
}

_FAST_FUNCTIONS = ("cos", "exp", "exp10", "log", "log10", "log2", "pow", "sin", "tan")


def _on_bits(bits: int, function: Callable[[int, int], int]) -> Callable[..., np.ndarray]:
    """``function(x, bits)`` of each integer's bits, read as an unsigned number."""
    mask = (1 << bits) - 1
    return np.vectorize(lambda x: function(int(x) & mask, bits), otypes=[np.int32])


def _functions() -> dict[str, Callable[..., np.ndarray]]:
    """NumPy functions by libdevice symbol."""
    table: dict[str, Callable[..., np.ndarray]] = {}
    for name, function in _FLOAT_FUNCTIONS.items():
        table[f"__nv_{name}"] = table[f"__nv_{name}f"] = _wide(function)
    for name in _FAST_FUNCTIONS:
        table[f"__nv_fast_{name}f"] = _wide(_FLOAT_FUNCTIONS[name])
    table["__nv_fast_fdividef"] = _wide(np.divide)
    # The next float depends on the type, so these are not computed in float64.
    table["__nv_nextafter"] = table["__nv_nextafterf"] = np.nextafter
    for suffixes, test in (
        (("isinff", "isinfd"), np.isinf),
        (("isnanf", "isnand"), np.isnan),
        (("finitef", "isfinited"), np.isfinite),
        (("signbitf", "signbitd"), np.signbit),
    ):
        for suffix in suffixes:
            table[f"__nv_{suffix}"] = test
    for suffix, bits in (("", 32), ("ll", 64)):
        table[f"__nv_clz{suffix}"] = _on_bits(bits, lambda x, bits: bits - x.bit_length())
        table[f"__nv_popc{suffix}"] = _on_bits(bits, lambda x, _: x.bit_count())
    return table


@functools.cache
def _supply_functions() -> None:
    compat.supply_interpreter_functions(_functions())
