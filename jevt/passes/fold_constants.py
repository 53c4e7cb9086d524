"""Constant folding: what depends on no input is computed now.

Purpose: scalars become literals, which cost a kernel no operand; arrays whose elements are all
equal become a broadcast of one literal, which costs no memory, and that literal itself where they
meet an operand of the result's shape.

Invariant: the jaxpr gains no constants. Only equations of at most ``MAX_SIZE`` elements are
evaluated, operation by operation, on the CPU, in their own types; never random bits, effects,
collectives or bodies. Equations that have become dead are left to dead-code elimination.

    before  { lambda ; a:f32[8]. let
                b:f32[] = sqrt 2.0:f32[]; c:f32[8] = mul a b d:i32[4] = iota[dimension=0 …];
                e:i32[1] = slice[start_indices=(3,) …] d; f:i32[] = squeeze e g:f32[] =
                convert_element_type f; h:f32[8] = mul c g in (h,) }
    after   { lambda ; a:f32[8]. let
                c:f32[8] = mul a 1.4142135:f32[]; h:f32[8] = mul c 3.0:f32[] in (h,) }
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute

MAX_SIZE = 1024

# fmt: off
FOLDABLE: frozenset[Primitive] = frozenset({
    p.abs_p, p.add_p, p.and_p, p.bitcast_convert_type_p, p.broadcast_in_dim_p, p.ceil_p, p.clamp_p,
    p.concatenate_p, p.convert_element_type_p, p.cos_p, p.div_p, p.eq_p, p.exp_p, p.exp2_p,
    p.expm1_p, p.floor_p, p.ge_p, p.gt_p, p.integer_pow_p, p.iota_p, p.is_finite_p, p.le_p, p.log_p,
    p.log1p_p, p.lt_p, p.max_p, p.min_p, p.mul_p, p.ne_p, p.neg_p, p.not_p, p.or_p, p.pow_p,
    p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p, p.reduce_sum_p, p.rem_p, p.reshape_p, p.rev_p,
    p.round_p, p.rsqrt_p, p.select_n_p, p.shift_left_p, p.shift_right_arithmetic_p,
    p.shift_right_logical_p, p.sign_p, p.sin_p, p.slice_p, p.sqrt_p, p.square_p, p.squeeze_p,
    p.sub_p, p.tanh_p, p.transpose_p, p.xor_p,
})

# Take scalars beside arrays.
BROADCASTING: frozenset[Primitive] = frozenset({
    p.add_p, p.sub_p, p.mul_p, p.div_p, p.rem_p, p.max_p, p.min_p, p.pow_p, p.and_p, p.or_p,
    p.xor_p, p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p,
})
# fmt: on


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Folds the constants of ``jaxpr`` and of its bodies."""
    body = once(lambda inner: _run(inner, body))
    return _run(jaxpr, body)


def _run(jaxpr: Jaxpr, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    values: dict[Var, np.ndarray[Any, Any]] = {}
    literals: dict[Var, Atom] = {}
    uniform: dict[Var, Literal] = {}  # arrays -> what each of their elements is
    eqns: list[JaxprEqn] = []
    with contextlib.ExitStack() as stack:
        entered = False
        for old in jaxpr.eqns:
            eqn = _with_scalars(map_bodies(substitute(literals, old), body), uniform)
            if _is_foldable(eqn, values):
                if not entered:
                    stack.enter_context(_on_cpu())
                    entered = True
                value = _evaluate(eqn, values)
                if value is not None:
                    out = eqn.outvars[0]
                    values[out] = value
                    if (literal := _literal(value, out.aval)) is not None:
                        literals[out] = literal
                    else:
                        eqn = _as_broadcast(eqn, value)
            if eqn.primitive is p.broadcast_in_dim_p and isinstance(eqn.invars[0], Literal):
                uniform[eqn.outvars[0]] = eqn.invars[0]
            eqns.append(eqn)
    return rebuild(jaxpr, eqns, literals)


def element(eqn: JaxprEqn, scalars: Sequence[Literal]) -> Literal | None:
    """An element of what an elementwise equation makes of uniform arrays.

    Args:
      eqn: the equation.
      scalars: what the elements of its operands are.

    Returns:
      None if it is not to be computed now.
    """
    aval: Any = eqn.outvars[0].aval
    if not _is_local(aval):
        return None
    alone = eqn.replace(invars=list(scalars), outvars=[Var(aval.update(shape=()))])
    if not _is_foldable(alone, {}):
        return None
    with _on_cpu():
        value = _evaluate(alone, {})
    return None if value is None else _literal(value, alone.outvars[0].aval)


def _with_scalars(eqn: JaxprEqn, uniform: dict[Var, Literal]) -> JaxprEqn:
    """Scalars for uniform operands, as long as one operand has the result's shape."""
    if eqn.primitive not in BROADCASTING:
        return eqn
    shape = _shape(eqn.outvars[0])
    scalars = [uniform.get(a) if isinstance(a, Var) else None for a in eqn.invars]
    rest = [a for a, scalar in zip(eqn.invars, scalars, strict=True) if scalar is None]
    if len(rest) == len(scalars) or all(_shape(a) != shape for a in rest):
        return eqn
    # A scalar has no axis names, which a result's type may need inside `shard_map`.
    if not all(_is_local(a.aval) for a in eqn.invars):
        return eqn
    return eqn.replace(
        invars=[a if s is None else s for a, s in zip(eqn.invars, scalars, strict=True)]
    )


def _shape(atom: Atom) -> tuple[int, ...]:
    aval: Any = atom.aval
    shape: tuple[int, ...] = aval.shape
    return shape


def _is_local(aval: Any) -> bool:
    """Whether the type says nothing of devices: a literal cannot."""
    return aval.sharding.mesh.empty and not internals.manual_axes_of(aval)


def _is_foldable(eqn: JaxprEqn, values: dict[Var, np.ndarray[Any, Any]]) -> bool:
    if eqn.primitive not in FOLDABLE or eqn.effects:
        return False
    if not all(_is_scalar(a) if isinstance(a, Literal) else a in values for a in eqn.invars):
        return False
    aval: Any = eqn.outvars[0].aval
    return (
        math.prod(aval.shape) <= MAX_SIZE
        and isinstance(aval.dtype, np.dtype)
        and _is_local(aval)
        and eqn.params.get("sharding") is None
    )


def _is_scalar(literal: Literal) -> bool:
    return not getattr(literal.aval, "shape", (0,))


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Eager evaluation on the CPU, whatever the surrounding program has set or is tracing."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # a process that was told not to use the CPU
        device = jax.local_devices()[0]
    with (
        jax.ensure_compile_time_eval(),
        jax.default_device(device),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
    ):
        yield


def _evaluate(
    eqn: JaxprEqn, values: dict[Var, np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any] | None:
    aval: Any = eqn.outvars[0].aval
    if math.prod(aval.shape) == 0:
        return None
    operands = [
        np.asarray(a.val, a.aval.dtype) if isinstance(a, Literal) else values[a]  # type: ignore[attr-defined]
        for a in eqn.invars
    ]
    value = np.asarray(eqn.primitive.bind(*operands, **eqn.params))
    # Under other settings than when it was traced (64-bit types), JAX would compute another type.
    return value if value.dtype == aval.dtype and value.shape == aval.shape else None


def _literal(value: np.ndarray[Any, Any], aval: Any) -> Literal | None:
    """The scalar as a literal of type ``aval``, None if there is none."""
    if value.shape:
        return None
    if not aval.weak_type:
        return Literal(value[()], aval)
    # A Python number is what has a weak type, and only that of its default width.
    number = value.item()
    is_default = jax.dtypes.canonicalize_dtype(type(number)) == aval.dtype
    return Literal(number, aval) if is_default else None


def _as_broadcast(eqn: JaxprEqn, value: np.ndarray[Any, Any]) -> JaxprEqn:
    """A broadcast of one literal in place of an equation whose elements are all equal."""
    if eqn.primitive is p.broadcast_in_dim_p and isinstance(eqn.invars[0], Literal):
        return eqn
    flat = np.ascontiguousarray(value).reshape(-1)
    if flat.tobytes() != flat[:1].tobytes() * flat.size:  # bytes: 0.0 and -0.0 are not equal
        return eqn
    out: Any = eqn.outvars[0].aval
    literal = _literal(flat[:1].reshape(()), out.update(shape=()))
    if literal is None:
        return eqn
    params = {"shape": value.shape, "broadcast_dimensions": (), "sharding": None}
    return eqn.replace(primitive=p.broadcast_in_dim_p, invars=[literal], params=params)
