"""Mends of Triton's interpreter, so that tests see what a GPU computes.

They are not in the product: kernels do not need them to run, only to be compared exactly.
``test_interpreter_mends.py`` shows for each that it is needed.

- ``cast_impl``, ``create_fp_to_fp``: float32 is truncated to bfloat16 instead of rounded to nearest
  even; other types are converted to and from the raw bits.
- ``_patch_lang_tensor``: Triton 3.6 makes an integer of an array with one element, which NumPy 2.5
  refuses, for ``range`` over a loaded value.
- ``apply_impl``: reductions by a function are made element by element, 10 000 a second. The maximum
  and the minimum that propagate NaN are NumPy's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from jevt_kernels import device_math

_BUILDER = interpreter.InterpreterBuilder

_originals: dict[str, Any] = {
    "cast_impl": _BUILDER.cast_impl,
    "create_fp_to_fp": _BUILDER.create_fp_to_fp,
    "_patch_lang_tensor": interpreter._patch_lang_tensor,
    "apply_impl": interpreter.ReduceOps.apply_impl,
}

_owners: dict[str, Any] = {
    "cast_impl": _BUILDER,
    "create_fp_to_fp": _BUILDER,
    "_patch_lang_tensor": interpreter,
    "apply_impl": interpreter.ReduceOps,
}


def _is_bfloat16(dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16


def _values(handle: Any) -> np.ndarray:
    """The numbers of a handle; the interpreter keeps bfloat16 as its bits in uint16."""
    if _is_bfloat16(handle.dtype):
        return np.ascontiguousarray(handle.data).view(ml_dtypes.bfloat16).astype(np.float32)
    return handle.data


def _convert(source: Any, target: Any) -> Any:
    """A conversion from or to bfloat16, rounding to nearest even."""
    values = _values(source)
    if _is_bfloat16(target):
        data = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    else:
        data = values.astype(interpreter._get_np_dtype(target))
    return interpreter.TensorHandle(data, target.scalar)


def _cast_impl(self: Any, source: Any, target: Any) -> Any:
    if _is_bfloat16(source.dtype) != _is_bfloat16(target):
        return _convert(source, target)
    return _originals["cast_impl"](self, source, target)


def _create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if _is_bfloat16(source.dtype) != _is_bfloat16(target):
        return _convert(source, target)
    return _originals["create_fp_to_fp"](self, source, target, rounding)


def _patch_lang_tensor(tensor: Any, *scope: Any) -> None:
    _originals["_patch_lang_tensor"](tensor, *scope)
    # The scope of the original call already restores this attribute.
    tensor.__index__ = lambda self: int(self.handle.data.item())


def _apply_impl(self: Any, operands: Any) -> Any:
    for function, same in ((device_math.nan_max, np.max), (device_math.nan_min, np.min)):
        if self.combine_fn is function:
            return [self.min_max(operands[0], val_reduce_op=same)]
    return _originals["apply_impl"](self, operands)


_mends: dict[str, Any] = {
    "cast_impl": _cast_impl,
    "create_fp_to_fp": _create_fp_to_fp,
    "_patch_lang_tensor": _patch_lang_tensor,
    "apply_impl": _apply_impl,
}


def _install(functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        setattr(_owners[name], name, function)


def apply() -> None:
    """Installs every mend."""
    _install(_mends)


@contextlib.contextmanager
def suspended(*names: str) -> Iterator[None]:
    """Without the named mends."""
    _install({name: _originals[name] for name in names})
    try:
        yield
    finally:
        _install({name: _mends[name] for name in names})
