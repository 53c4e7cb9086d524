"""What every generated kernel must satisfy, and short ways to make kernels for tests.

:func:`check` is the contract: for each configuration, Triton's interpreter and the reference give
what ``jax.jit`` gives, NaN for NaN and infinity for infinity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.extend.core import Jaxpr

from jevt.lowering import spec as lowering
from jevt.passes import dce, expose_random_bits, inline
from jevt_kernels import interpreter, ops, visitor
from jevt_kernels.index_map import IndexMap, Space, TileAxis, row_major
from jevt_kernels.reference import reference
from jevt_kernels.spec import Config, KernelSpec, TensorType

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: Largest relative error in the 2-norm.
TOLERANCE = {"float16": 2e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 1e-12}


def group(function: Callable[..., Any], *arguments: Any) -> Jaxpr:
    """The equations of a function as the partitioner would hand them to ``lowering.spec.build``."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    for stage in (inline.run, expose_random_bits.run, dce.run):
        jaxpr = stage(jaxpr)
    assert not jaxpr.consts, "close over nothing but scalars"
    return jaxpr


def build(function: Callable[..., Any], *arguments: Any, name: str = "kernel") -> KernelSpec:
    """The kernel that computes ``function``; raises NotFusible where there is none."""
    return lowering.build(group(function, *arguments), name)


@contextmanager
def types_of(*arrays: Any) -> Iterator[None]:
    """64-bit types for JAX where an array has one, and the default otherwise."""
    wide = any(np.dtype(a.dtype).itemsize == 8 for a in arrays)
    with jax.enable_x64(wide):
        yield


def referred(spec: KernelSpec, *arrays: Any) -> tuple[jax.Array, ...]:
    """What the reference of a kernel gives, as one program: each operation compiled by itself would
    take most of a test's time.

    Values of 16 bits are rounded wherever the kernel rounds them, also where XLA would rather not.
    """
    exactly = {"xla_allow_excess_precision": False}
    return jax.jit(functools.partial(reference, spec), compiler_options=exactly)(*arrays)


def check(
    function: Callable[..., Any],
    *arrays: np.ndarray,
    configs: Iterable[Config | None] = (None,),
    tolerance: float | None = None,
) -> KernelSpec:
    """Builds the kernel of ``function`` and holds it against ``jax.jit``.

    Returns:
      The kernel, for further assertions on it.
    """
    with types_of(*arrays):
        spec = build(function, *arrays)
        expected = jax.tree.leaves(jax.jit(function)(*arrays))
        same(referred(spec, *arrays), expected, tolerance)
    for config in configs:
        same(interpreter.run(spec, *arrays, config=config), expected, tolerance)
    return spec


def same(got: Sequence[Any], expected: Sequence[Any], tolerance: float | None = None) -> None:
    """Asserts equality: exact for integers, in the 2-norm for floats; NaN and infinities exact."""
    assert len(got) == len(expected)
    for position, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        a, b = np.asarray(mine), np.asarray(theirs)
        what = f"output {position}"
        assert (a.dtype, a.shape) == (b.dtype, b.shape), what
        if not ops.is_float(a.dtype):
            np.testing.assert_array_equal(a, b, err_msg=what)
            continue
        limit = TOLERANCE[a.dtype.name] if tolerance is None else tolerance
        x, y = a.astype(np.float64), b.astype(np.float64)
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y), err_msg=f"NaN in {what}")
        odd = ~np.isfinite(y) | ~np.isfinite(x)
        np.testing.assert_array_equal(x[odd], y[odd], err_msg=f"infinities in {what}")
        error = np.linalg.norm(x[~odd] - y[~odd])
        assert error <= limit * np.linalg.norm(y[~odd]) + 1e-30, f"{what}: error {error}"


def random(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Normal numbers, integers from the whole range, or booleans."""
    dtype, generator = np.dtype(dtype), np.random.default_rng(seed)
    if ops.is_float(dtype):
        return generator.standard_normal(shape).astype(dtype)
    if dtype == np.dtype(bool):
        return generator.random(shape) < 0.5
    return np.frombuffer(generator.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(
        shape
    )


# Kernels without a jaxpr


@dataclasses.dataclass(frozen=True)
class Term:
    """An operation on vectors and constants.

    Attributes:
      op: a key of ``ops.OPS``.
      operands: arrays, all of one length, or NumPy scalars for constants.
      result: dtype of its results.
    """

    op: str
    operands: tuple[Any, ...]
    result: np.dtype


def pointwise(terms: Sequence[Term]) -> tuple[KernelSpec, list[np.ndarray]]:
    """A kernel of unrelated terms, one output for each of their results; and its operands."""
    (size,) = {o.size for term in terms for o in term.operands if o.ndim}
    index = IndexMap((1,))
    nodes: list[visitor.Node] = []
    arrays: list[np.ndarray] = []
    outputs: list[TensorType] = []
    for term in terms:
        positions = []
        for operand in term.operands:
            positions.append(len(nodes))
            if operand.ndim:
                nodes.append(visitor.Load(len(arrays), index))
                arrays.append(operand)
            else:
                nodes.append(visitor.Constant(as_python(operand), np.dtype(operand.dtype)))
        for result in range(ops.OPS[term.op].results):
            nodes.append(visitor.Compute(term.op, tuple(positions), term.result, result))
            nodes.append(visitor.Store(len(outputs), len(nodes) - 1, index))
            outputs.append(TensorType((size,), term.result))
    spec = KernelSpec(
        name=f"pointwise_{terms[0].op}",
        mainloop="pointwise",
        space=Space((size,), (TileAxis("i", (0,)),)),
        tree=tuple(nodes),
        inputs=tuple(TensorType((size,), np.dtype(a.dtype)) for a in arrays),
        outputs=tuple(outputs),
    )
    return spec, arrays


def as_python(scalar: Any) -> bool | int | float:
    return float(scalar) if ops.is_float(np.dtype(scalar.dtype)) else scalar.item()


def reduction(op: str, dtype: np.dtype, rows: int, columns: int) -> KernelSpec:
    """One reduction of a matrix's rows."""
    return KernelSpec(
        name=f"rowwise_{op}",
        mainloop="rowwise",
        space=Space((rows, columns), (TileAxis("row", (0,)), TileAxis("col", (1,)))),
        tree=(
            visitor.Load(0, IndexMap(row_major((rows, columns)))),
            visitor.Reduce(op, 0, "col", dtype),
            visitor.Store(0, 1, IndexMap((1, 0))),
        ),
        inputs=(TensorType((rows, columns), dtype),),
        outputs=(TensorType((rows,), dtype),),
    )
