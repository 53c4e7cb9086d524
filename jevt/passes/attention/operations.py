"""What the equations inside an attention may be, and what they compute, in NumPy.

Types are left out: a region is evaluated in float64, to see whether it is attention in exact
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals

type Array = np.ndarray[Any, Any]


class NoMatch(Exception):
    """This is not an attention, or not one that can be replaced; the message says why."""


def _one_minus_square(x: Array) -> Array:
    return 1 - np.square(x)


def _select(predicate: Array, *cases: Array) -> Array:
    return np.choose(predicate.astype(int), cases)


#: Element by element.
POINTWISE: Mapping[Primitive, Callable[..., Array]] = {
    p.abs_p: np.abs,
    p.add_p: np.add,
    p.add_jaxvals_p: np.add,
    p.and_p: np.logical_and,
    p.copy_p: lambda x: x,
    p.div_p: np.divide,
    p.eq_p: np.equal,
    p.exp_p: np.exp,
    p.exp2_p: np.exp2,
    p.expm1_p: np.expm1,
    p.ge_p: np.greater_equal,
    p.gt_p: np.greater,
    p.is_finite_p: np.isfinite,
    p.le_p: np.less_equal,
    p.log_p: np.log,
    p.log1p_p: np.log1p,
    p.logistic_p: lambda x: 1 / (1 + np.exp(-x)),
    p.lt_p: np.less,
    p.max_p: np.maximum,
    p.min_p: np.minimum,
    p.mul_p: np.multiply,
    p.ne_p: np.not_equal,
    p.neg_p: np.negative,
    p.not_p: np.logical_not,
    p.or_p: np.logical_or,
    internals.pvary_p: lambda x: x,
    p.pow_p: np.power,
    p.reduce_precision_p: lambda x: x,
    p.select_n_p: _select,
    p.sign_p: np.sign,
    p.sqrt_p: np.sqrt,
    p.rsqrt_p: lambda x: 1 / np.sqrt(x),
    p.square_p: np.square,
    p.stop_gradient_p: lambda x: x,
    p.sub_p: np.subtract,
    p.tanh_p: np.tanh,
    p.one_minus_square_p: _one_minus_square,
}

REDUCTIONS: Mapping[Primitive, Callable[..., Array]] = {
    p.reduce_max_p: np.max,
    p.reduce_min_p: np.min,
    p.reduce_sum_p: np.sum,
}

#: Renamings and repetitions of positions.
VIEWS: frozenset[Primitive] = frozenset(
    {p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.transpose_p}
)


def is_known(eqn: JaxprEqn) -> bool:
    """Whether the equation may be inside an attention, a product aside."""
    primitive = eqn.primitive
    if eqn.effects or len(eqn.outvars) != 1:
        return False
    if primitive is p.reshape_p:
        return eqn.params["dimensions"] is None
    if primitive is p.broadcast_in_dim_p:
        return len(eqn.invars) == 1  # with static sizes
    if primitive is p.integer_pow_p or primitive is p.convert_element_type_p:
        return True
    return primitive in POINTWISE or primitive in REDUCTIONS or primitive in VIEWS


def pointwise(eqn: JaxprEqn) -> Callable[..., Array]:
    """The function that a pointwise equation applies to its operands."""
    if eqn.primitive is p.integer_pow_p:
        exponent = eqn.params["y"]
        return lambda x: np.asarray(x, np.float64) ** exponent
    if eqn.primitive is p.convert_element_type_p:
        return _conversion(np.dtype(eqn.params["new_dtype"]))
    return POINTWISE[eqn.primitive]


def _conversion(dtype: np.dtype[Any]) -> Callable[..., Array]:
    if dtype == np.dtype(bool):
        return lambda x: x != 0
    if np.issubdtype(dtype, np.integer):
        return np.trunc
    return lambda x: np.asarray(x, np.float64)  # of any precision: no rounding here
