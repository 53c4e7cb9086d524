"""What matrix products ask for: which axes, in which types, how exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from jevt._jaxpr import Atom, aval
from jevt.lowering.errors import NotFusible
from jevt.primitives.product_sum import product_sum_p
from jevt_kernels.ops import is_float


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product in the kernels' terms.

    Attributes:
      contracted, batch: pairs of axes, of the left and the right operand. The result has the batch
        axes first, then what is left of the left operand, then of the right.
      dtype: the products are added up in it.
      precision: a key of ``visitor.PRECISIONS``.
    """

    contracted: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]
    dtype: np.dtype
    precision: str


#: ``jax.lax.Precision`` of float32 operands. XLA takes the tensor cores' type for what is not the
#: highest; three products of parts are the nearest to "high" that is no less precise.
_PRECISIONS = {"DEFAULT": "tf32", "HIGH": "tf32x3", "HIGHEST": "ieee"}

#: ``jax.lax.DotAlgorithmPreset``, by operand type. What adds up in a narrower type than float32
#: gets float32.
_ALGORITHMS = {
    "float32": {"TF32_TF32_F32": "tf32", "TF32_TF32_F32_X3": "tf32x3", "F32_F32_F32": "ieee"},
    "bfloat16": {"BF16_BF16_F32": "ieee", "BF16_BF16_BF16": "ieee"},
    "float16": {"F16_F16_F32": "ieee", "F16_F16_F16": "ieee"},
    "float64": {"F64_F64_F64": "ieee"},
}


@dataclasses.dataclass(frozen=True)
class Term:
    """One of the products that an equation adds up; of a ``dot_general`` the only one."""

    lhs: Atom
    rhs: Atom
    product: Product


#: The equations that multiply matrices.
PRODUCTS = frozenset({lax.dot_general_p, product_sum_p})


def terms(eqn: JaxprEqn) -> tuple[Term, ...]:
    """The products that an equation of ``PRODUCTS`` stands for, all of one type and precision.

    Raises:
      NotFusible: no kernel multiplies these types in this way.
    """
    dimensions = eqn.params["dimension_numbers"]
    if eqn.primitive is lax.dot_general_p:
        dimensions = (dimensions,)
    result = np.dtype(aval(eqn.outvars[0]).dtype)
    precision = eqn.params["precision"]
    return tuple(
        Term(lhs, rhs, _product(lhs, rhs, numbers, precision, result))
        for lhs, rhs, numbers in zip(eqn.invars[::2], eqn.invars[1::2], dimensions, strict=True)
    )


def _product(lhs: Atom, rhs: Atom, dimensions: Any, precision: Any, result: np.dtype) -> Product:
    left, right = (np.dtype(aval(atom).dtype) for atom in (lhs, rhs))
    if left != right:
        raise NotFusible(f"no mainloop: dot_general of {left} and {right}")
    contracted, batch = dimensions
    return Product(
        _pairs(contracted), _pairs(batch), _sum_dtype(left, result), _precision(precision, left)
    )


def _pairs(axes: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(left), int(right)) for left, right in zip(*axes, strict=True))


def _sum_dtype(operand: np.dtype, result: np.dtype) -> np.dtype:
    if is_float(operand) and is_float(result):
        return operand if operand.itemsize == 8 else np.dtype("float32")
    if operand == np.dtype("int8") and result == np.dtype("int32"):
        return result
    raise NotFusible(f"no mainloop: dot_general of {operand} to {result}")


def _precision(precision: Any, dtype: np.dtype) -> str:
    if isinstance(precision, (lax.DotAlgorithm, lax.DotAlgorithmPreset)):
        name = getattr(precision, "name", "")
        if name == "DEFAULT":
            precision = None
        elif name in _ALGORITHMS.get(dtype.name, {}):
            return _ALGORITHMS[dtype.name][name]
        else:
            raise NotFusible(f"no mainloop: dot_general of {dtype} by algorithm {precision}")
    if dtype != np.dtype("float32"):
        return "ieee"
    both = precision if isinstance(precision, tuple) else (precision, precision)
    names = [getattr(each, "name", "DEFAULT") for each in both]
    return _PRECISIONS[max(names, key=list(_PRECISIONS).index)]
