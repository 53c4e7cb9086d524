"""``jevt.LazyArray``: an output of a step that is computed when it is read."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray

from jevt import _jax_internals as internals


class DonatedInputError(RuntimeError):
    """A lazy output was read for the first time after inputs that it needs had been deleted."""


class Deferred:
    """The lazy outputs of one call of a step, which are computed together.

    Args:
      program: computes them, of ``operands``.
      operands: arrays and scalars of the call; dropped as soon as the outputs are computed.
      describe: an error for the positions of operands that have been deleted.
    """

    def __init__(
        self,
        program: Callable[..., Sequence[jax.Array]],
        operands: Sequence[Any],
        describe: Callable[[Sequence[int]], str],
    ) -> None:
        self._program = program
        self._operands: Sequence[Any] | None = operands
        self._describe = describe
        self._results: Sequence[jax.Array] | None = None
        self._lock = threading.Lock()

    @property
    def is_computed(self) -> bool:
        return self._results is not None

    def results(self) -> Sequence[jax.Array]:
        """The outputs, computed at the first call.

        Raises:
          DonatedInputError: an operand has been deleted.
        """
        with self._lock:
            if self._results is None:
                assert self._operands is not None
                deleted = [
                    i
                    for i, x in enumerate(self._operands)
                    if isinstance(x, jax.Array) and x.is_deleted()
                ]
                if deleted:
                    raise DonatedInputError(self._describe(deleted))
                # Even where something else is being traced.
                with jax.ensure_compile_time_eval():
                    self._results = self._program(*self._operands)
                self._operands = None
            return self._results


class LazyArray:
    """An output that a step did not compute, because ``jevt.lazy`` marked it.

    It reads as the array that it stands for: through ``float``, ``int``, ``bool``, formatting,
    ``np.asarray``, ``jax.device_get``, operators, comparisons, indexing, methods and attributes of
    ``jax.Array``, as an argument of ``jnp`` functions and of jitted functions, and through
    ``block_until_ready``. The first read compiles (once for each signature of the step) and runs
    a second program, which computes all lazy outputs of that call of the step; later reads have
    the values. ``repr``, ``shape``, ``dtype``, ``ndim`` and ``size`` read nothing. It is a leaf of
    pytrees.

    Until it is read, it keeps those inputs of the call alive that it needs, and so does any other
    lazy output of the same call: read it, or drop it.

    Reading raises ``DonatedInputError`` if one of these inputs has been deleted.
    """

    __slots__ = ("__weakref__", "_deferred", "_name", "_position", "aval")

    aval: ShapedArray
    __hash__ = None  # type: ignore[assignment]  # as jax.Array, which compares by element
    __array_priority__ = 100  # of two operands, NumPy's is not in charge

    def __init__(self, deferred: Deferred, position: int, aval: ShapedArray, name: str) -> None:
        self._deferred = deferred
        self._position = position
        self._name = name
        self.aval = aval

    @property
    def value(self) -> jax.Array:
        """The array, computed if it has not been yet."""
        return self._deferred.results()[self._position]

    @property
    def is_computed(self) -> bool:
        """Whether reading is free, as it, or another lazy output of the call, has been read."""
        return self._deferred.is_computed

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype

    @property
    def weak_type(self) -> bool:
        return bool(self.aval.weak_type)

    @property
    def ndim(self) -> int:
        return len(self.aval.shape)

    @property
    def size(self) -> int:
        return math.prod(self.aval.shape)

    def block_until_ready(self) -> jax.Array:
        """Computes it, and waits for it."""
        return self.value.block_until_ready()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.value, dtype=dtype, copy=copy)

    def __jax_array__(self) -> jax.Array:
        return self.value

    def __getattr__(self, name: str) -> Any:
        # Only what arrays have, so that asking for anything else does not run a program.
        if name.startswith("__") or not hasattr(internals.ArrayImpl, name):
            raise AttributeError(f"'LazyArray' object has no attribute {name!r}")
        return getattr(self.value, name)

    def __repr__(self) -> str:
        if self.is_computed:
            return f"LazyArray({self.value!r})"
        return f"LazyArray({self.aval.str_short()}, not computed yet: {self._name})"

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, specification: str) -> str:
        return format(self.value, specification)

    def __reduce__(self) -> tuple[Any, ...]:
        return jnp.asarray, (np.asarray(self),)  # a copy or a pickle is an array


def _forward(name: str) -> Callable[..., Any]:
    def method(self: LazyArray, *args: Any, **kwargs: Any) -> Any:
        args = tuple(x.value if isinstance(x, LazyArray) else x for x in args)
        return getattr(self.value, name)(*args, **kwargs)

    method.__name__ = name
    return method


# Python looks these up on the class, so that `__getattr__` does not serve them.
for _name in (
    *("bool", "complex", "float", "index", "int", "round"),
    *("contains", "getitem", "iter", "len"),
    *("abs", "invert", "neg", "pos"),
    *("eq", "ge", "gt", "le", "lt", "ne"),
    *("add", "and", "divmod", "floordiv", "lshift", "matmul", "mod", "mul", "or"),
    *("pow", "rshift", "sub", "truediv", "xor"),
    *("radd", "rand", "rdivmod", "rfloordiv", "rlshift", "rmatmul", "rmod", "rmul", "ror"),
    *("rpow", "rrshift", "rsub", "rtruediv", "rxor"),
    *("dlpack", "dlpack_device"),
):
    setattr(LazyArray, f"__{_name}__", _forward(f"__{_name}__"))

internals.register_array_like(LazyArray, lambda x: x.value)
