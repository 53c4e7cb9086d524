"""What each primitive means to a kernel: one row a primitive.

Rules live in dicts keyed by ``Primitive``; a primitive that is in none of them is "not fusible",
with a reason that goes into the plan. Four kinds of rules exist:

* ``POINTWISE`` maps an equation to the name of an operation of ``jevt_kernels.ops`` and, where
  parameters of the equation matter, to extra constant operands;
* ``VIEWS`` and ``REDUCTIONS`` are only named here: ``lowering.axes`` and ``lowering.builder`` know
  what they do;
* ``SOURCES`` make values out of coordinates;
* ``CONTRACTIONS`` maps an equation to the matrix products that it adds up, one for most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import aval
from jevt.lowering.errors import NotFusible
from jevt.lowering.products import PRODUCTS, Term, terms
from jevt.primitives.attention import attention_backward_p, attention_p
from jevt.primitives.pools import pool_gradient_p, pool_p
from jevt.primitives.row_products import row_products_p
from jevt.primitives.segments import (
    fused_segment_sum_p,
    segment_blocks_p,
    segment_bounds_p,
    segment_order_p,
    segment_sum_p,
)
from jevt_kernels import ops


@dataclasses.dataclass(frozen=True)
class Role:
    """How an equation can take part in a kernel.

    Attributes:
      kind: "pointwise", "view", "reduction", "contraction" (a matrix product), or "source" (reads
        no array).
      axes: for a reduction, the reduced axes of its operand.
    """

    kind: Literal["pointwise", "view", "reduction", "contraction", "source"]
    axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of ``jevt_kernels.ops`` with constants appended to the equation's operands."""

    op: str
    constants: tuple[int, ...] = ()


type PointwiseRule = Callable[[JaxprEqn], Operation]


def _same(op: str) -> PointwiseRule:
    return lambda eqn: Operation(op)


def _integer_pow(eqn: JaxprEqn) -> Operation:
    return Operation("integer_pow", (int(eqn.params["y"]),))


def _round(eqn: JaxprEqn) -> Operation:
    method = int(eqn.params["rounding_method"])
    return Operation("round_even" if method == 1 else "round_away")


def _reduce_precision(eqn: JaxprEqn) -> Operation:
    bits = (eqn.params["exponent_bits"], eqn.params["mantissa_bits"])
    if bits == (8, 7):
        return Operation("round_to_bfloat16")
    raise NotFusible(
        f"reduce_precision to {bits[0]} exponent and {bits[1]} mantissa bits has no kernel form"
    )


def _bitcast(eqn: JaxprEqn) -> Operation:
    source, target = _dtype(aval(eqn.invars[0])), _dtype(aval(eqn.outvars[0]))
    if source.itemsize != target.itemsize or np.dtype(bool) in (source, target):
        raise NotFusible(f"bitcast from {source} to {target} changes the shape")
    return Operation("bitcast")


def _pow(eqn: JaxprEqn) -> Operation:
    if not ops.is_float(_dtype(aval(eqn.invars[0]))):
        raise NotFusible("pow of integers has no kernel form")
    return Operation("pow")


_SAME_NAME = """
    abs acos acosh add and asin asinh atan atan2 atanh cbrt ceil clamp copy cos cosh div eq erf
    erf_inv erfc exp exp2 expm1 floor ge gt is_finite le lgamma log log1p log2 logistic lt max
    min mul ne neg not one_minus_square or rem rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square sub tan tanh threefry2x32 xor
""".split()  # noqa: SIM905


def _primitive(name: str) -> Primitive | None:
    """The primitive that JAX exports as ``<name>_p``, None in a JAX that lacks it."""
    return getattr(p, f"{name}_p", None) or getattr(jax.lax, f"{name}_p", None)


def _table(rows: dict[str, Any]) -> dict[Primitive, Any]:
    return {
        primitive: rule
        for name, rule in rows.items()
        if (primitive := _primitive(name)) is not None
    }


POINTWISE: dict[Primitive, PointwiseRule] = _table(
    {name: _same(name) for name in _SAME_NAME}
    | {
        "add_jaxvals": _same("add"),
        "bitcast_convert_type": _bitcast,
        "convert_element_type": _same("convert"),
        "integer_pow": _integer_pow,
        "nextafter": _same("nextafter"),
        "pow": _pow,
        "reduce_precision": _reduce_precision,
        "round": _round,
        "stop_gradient": _same("copy"),
    }
)

VIEWS: dict[Primitive, str] = _table(
    {name: name for name in ("broadcast_in_dim", "reshape", "rev", "slice", "squeeze", "transpose")}
)

REDUCTIONS: dict[Primitive, str] = _table(
    {
        "reduce_sum": "sum",
        "reduce_max": "max",
        "reduce_min": "min",
        "reduce_prod": "prod",
        "reduce_and": "and",
        "reduce_or": "or",
    }
)

SOURCES: dict[Primitive, str] = {
    **_table({"iota": "iota"}),
    internals.iota_2x32_shape_p: "iota_2x32_shape",
}

CONTRACTIONS: dict[Primitive, Callable[[JaxprEqn], tuple[Term, ...]]] = dict.fromkeys(
    PRODUCTS, terms
)

#: Primitives that a later mainloop will take; the plan names it.
_AWAITED: dict[Primitive, str] = _table(
    {
        "conv_general_dilated": "convolution",
        "scatter_add": "embedding gradient",
        "gather": "gather",
        "argmax": "argument reduction",
        "argmin": "argument reduction",
        "cumsum": "scan",
        "reduce_window_sum": "window",
        "reduce_window_max": "window",
        "select_and_scatter_add": "window",
        "sort": "sort",
        "top_k": "sort",
        "concatenate": "concatenation",
        "pad": "padding",
        "dynamic_slice": "dynamic slice",
        "dynamic_update_slice": "dynamic slice",
        "random_bits": "generator",
        "scan": "control flow",
        "while": "control flow",
        "jit": "call",
        "remat": "call",
        "cond": "control flow",
    }
)

#: Primitives that run as one call each, of a library or of a kernel that no group joins.
_CALLS: dict[Primitive, str] = {
    segment_order_p: "XLA's sort",
    segment_bounds_p: "a kernel of its own",
    segment_blocks_p: "XLA",
    segment_sum_p: "a kernel of its own",
    fused_segment_sum_p: "a kernel of its own",
    row_products_p: "a kernel of its own",
    pool_p: "a fusion of XLA's own",
    pool_gradient_p: "two fusions of XLA's own",
    attention_p: "cuDNN's fused attention",
    attention_backward_p: "cuDNN's fused attention, or a kernel of its own",
    internals.pure_callback_p: "a callback to the host",
    internals.platform_index_p: "known when it is compiled",
}

#: All primitives that JAX itself exports, and those of its programs of many devices: without a rule
#: here they are known, and stay with XLA.
_OF_JAX: frozenset[Primitive] = internals.distribution | frozenset(
    value
    for module in (p, jax.lax)
    for name, value in vars(module).items()
    if name.endswith("_p") and isinstance(value, Primitive)
)

#: JAX's primitives of keys and of sparse arrays, by the beginnings of their names.
_FAMILIES_OF_JAX = ("random_", "bcoo_", "bcsr_")


def _dtype(aval: Any) -> np.dtype:
    dtype = getattr(aval, "dtype", None)
    if not isinstance(dtype, np.dtype):
        raise NotFusible(f"{aval} stays with XLA: no array of numbers")
    return dtype


def classify(eqn: JaxprEqn) -> Role:
    """The part that an equation can play in a kernel.

    Raises:
      NotFusible: no mainloop takes it; the message says why.
    """
    primitive = eqn.primitive
    if eqn.effects:
        raise NotFusible(f"{primitive.name} has effects, which bound groups")
    if primitive in _CALLS:
        raise NotFusible(f"one call: {_CALLS[primitive]}")
    if primitive in _AWAITED:
        raise NotFusible(f"no mainloop: {primitive.name} ({_AWAITED[primitive]})")
    tables = (POINTWISE, VIEWS, REDUCTIONS, SOURCES, CONTRACTIONS)
    if not any(primitive in table for table in tables):
        if primitive in _OF_JAX or primitive.name.startswith(_FAMILIES_OF_JAX):
            raise NotFusible(f"no mainloop: {primitive.name}")
        raise NotFusible(f"unknown primitive {primitive.name!r}")
    for atom in (*eqn.invars, *eqn.outvars):
        check_aval(aval(atom))
    if primitive in VIEWS:
        return Role("view")
    if primitive in SOURCES:
        _check_source(eqn)
        return Role("source")
    if primitive in REDUCTIONS:
        return _classify_reduction(eqn)
    if primitive in CONTRACTIONS:
        CONTRACTIONS[primitive](eqn)
        return Role("contraction")
    operation = POINTWISE[primitive](eqn)
    operands = tuple(_dtype(aval(atom)) for atom in eqn.invars)
    try:
        for index, atom in enumerate(eqn.outvars):
            ops.check(operation.op, operands, _dtype(aval(atom)), index)
    except ValueError as error:
        raise NotFusible(str(error)) from None
    return Role("pointwise")


def check_aval(aval: Any) -> None:
    """Raises :class:`NotFusible` unless kernels take operands of this type."""
    dtype = _dtype(aval)
    if dtype not in ops.TRITON_TYPES:
        raise NotFusible(f"{dtype.name} stays with XLA")
    if not all(isinstance(size, int) for size in aval.shape):
        raise NotFusible(f"shape {aval.shape} is not static")
    memory = getattr(aval, "memory_space", None)
    if memory is not None and getattr(memory, "name", "Device") not in ("Device", "Any"):
        raise NotFusible(f"operand in {memory} memory")


def _check_source(eqn: JaxprEqn) -> None:
    if eqn.invars:
        raise NotFusible(f"{eqn.primitive.name} with a dynamic shape")
    if SOURCES[eqn.primitive] == "iota_2x32_shape" and aval(eqn.outvars[0]).size >= 2**32:
        raise NotFusible("random bits for 2**32 and more elements")


def _classify_reduction(eqn: JaxprEqn) -> Role:
    operand = aval(eqn.invars[0])
    axes = tuple(int(a) for a in eqn.params["axes"])
    op, dtype = REDUCTIONS[eqn.primitive], _dtype(operand)
    if op in ("and", "or") and dtype != np.dtype(bool):
        raise NotFusible(f"bitwise {eqn.primitive.name} of {dtype} has no kernel form")
    return Role("reduction", axes)
