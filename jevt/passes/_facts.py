"""What can be said about values without knowing them: sign, zeros and NaN.

Each fact follows from the equation that computes a value and from the same facts of its operands,
so that asking costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Primitive, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom

type Asked = Callable[[Atom], bool]

# NaN or at least +0.0 whatever the operand is: for real types.
_ALWAYS_NONNEGATIVE: frozenset[Primitive] = frozenset(
    {p.exp_p, p.exp2_p, p.abs_p, p.square_p, p.logistic_p, p.erfc_p}
)

# … if all operands are.
_KEEPS_NONNEGATIVE: frozenset[Primitive] = frozenset(
    {
        *(p.add_p, p.add_jaxvals_p, p.mul_p, p.div_p, p.max_p, p.min_p, p.sqrt_p, p.rsqrt_p),
        *(p.integer_pow_p, p.log1p_p, p.expm1_p, p.tanh_p, p.cbrt_p),
        *(p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p, p.cumsum_p),
        *(p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.transpose_p, p.rev_p, p.slice_p),
        *(p.concatenate_p, p.copy_p, p.stop_gradient_p, p.convert_element_type_p),
    }
)

_MAY_MAKE_NONNEGATIVE = _ALWAYS_NONNEGATIVE | _KEEPS_NONNEGATIVE | {p.select_n_p}

# Zero or NaN if one operand is: 0·∞ and 0/0 are NaN.
_KEEPS_NULL: frozenset[Primitive] = frozenset({p.mul_p, p.div_p})

# … if all operands are.
_ADDS_NULL: frozenset[Primitive] = frozenset(
    {
        *(p.neg_p, p.abs_p, p.add_p, p.add_jaxvals_p, p.sub_p, p.reduce_sum_p, p.copy_p),
        *(p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.transpose_p, p.convert_element_type_p),
    }
)

_MAY_MAKE_NULL = _KEEPS_NULL | _ADDS_NULL | {p.select_n_p}

# NaN wherever one operand is NaN.
_NAN_STRICT: frozenset[Primitive] = frozenset(
    {
        *(p.add_p, p.add_jaxvals_p, p.sub_p, p.mul_p, p.div_p, p.max_p, p.min_p, p.neg_p, p.abs_p),
        *(p.exp_p, p.exp2_p, p.expm1_p, p.log_p, p.log1p_p, p.tanh_p, p.logistic_p, p.sqrt_p),
        *(p.rsqrt_p, p.square_p, p.sin_p, p.cos_p, p.erf_p, p.erfc_p, p.sign_p, p.copy_p),
    }
)


@functools.cache
def _kind(dtype: Any) -> str:
    """The kind of a dtype; "" for what is no number (keys, float0)."""
    if not isinstance(dtype, np.dtype) or dtype == jax.dtypes.float0:
        return ""
    kinds = ((np.floating, "f"), (np.integer, "i"), (np.bool_, "b"), (np.complexfloating, "c"))
    return next((kind for base, kind in kinds if jax.dtypes.issubdtype(dtype, base)), "")


def kind(aval: Any) -> str:
    """Kind of array: "f" (floating point), "i" (integer), "b" (boolean), "c" (complex), else ""."""
    return _kind(getattr(aval, "dtype", None))


def shape_of(atom: Atom) -> tuple[int, ...]:
    aval: Any = atom.aval
    return tuple(aval.shape)


def is_float(aval: Any) -> bool:
    """Whether this is an array of real floating-point numbers, 8-bit and bfloat16 included."""
    return kind(aval) == "f"


def is_nonnegative_number(value: Any) -> bool:
    if _kind(value.dtype) != "f":
        return False
    return bool(np.isnan(value)) or (bool(value >= 0) and not bool(np.signbit(value)))


def makes_nonnegative(eqn: JaxprEqn, asked: Asked) -> bool:
    """Whether the result's elements are NaN or at least +0.0, not -0.0.

    Integers do not count: their arithmetic wraps, and the absolute value of the smallest is
    negative.
    """
    primitive = eqn.primitive
    if primitive not in _MAY_MAKE_NONNEGATIVE or not is_float(eqn.outvars[0].aval):
        return False
    if primitive in _ALWAYS_NONNEGATIVE:
        return kind(eqn.invars[0].aval) != "c"  # the absolute value of a complex number is real
    if primitive is p.convert_element_type_p:
        source = eqn.invars[0]
        return kind(source.aval) == "b" or (is_float(source.aval) and asked(source))
    if primitive is p.select_n_p:
        return all(map(asked, eqn.invars[1:]))
    return all(map(asked, eqn.invars))


def is_null_number(value: Any) -> bool:
    return _kind(value.dtype) == "f" and bool(np.isnan(value) or value == 0)


def makes_null(eqn: JaxprEqn, asked: Asked) -> bool:
    """Whether the result's elements are NaN, 0.0 or -0.0."""
    primitive = eqn.primitive
    if primitive not in _MAY_MAKE_NULL or not is_float(eqn.outvars[0].aval):
        return False
    if primitive is p.mul_p:
        return any(map(asked, eqn.invars))
    if primitive is p.div_p:
        return asked(eqn.invars[0])
    cases = eqn.invars[1:] if primitive is p.select_n_p else eqn.invars
    return all(is_float(a.aval) and asked(a) for a in cases)


def follows_nan(
    atom: Atom, source: Atom, definition: Callable[[Atom], JaxprEqn | None], depth: int = 8
) -> bool:
    """Whether an element of ``atom`` is NaN wherever that of ``source`` is; for equal shapes."""
    if atom is source:
        return True
    eqn = definition(atom)
    if eqn is None or depth == 0 or not is_float(atom.aval):
        return False
    if eqn.primitive is p.select_n_p:
        return all(follows_nan(a, source, definition, depth - 1) for a in eqn.invars[1:])
    if eqn.primitive not in _NAN_STRICT:
        return False
    return any(
        isinstance(a, Var)
        and shape_of(a) == shape_of(atom)
        and follows_nan(a, source, definition, depth - 1)
        for a in eqn.invars
    )
