"""For every rule of the algebraic passes, programs in which it applies: of any shape and axis.

A case is a function of a floating-point array of at least two axes and of one of its axes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

type Case = Callable[[jax.Array, int], object]


def _number(x, value):
    return x.dtype.type(value)


def _uniform(x, value):
    return jnp.full_like(x, value)


def _row(x, axis):
    """A number for each row along the axis."""
    return lax.reduce_max(x, (axis,))


def _repeated(row, x, axis):
    kept = [i for i in range(x.ndim) if i != axis]
    return lax.broadcast_in_dim(row, x.shape, kept)


def _chosen(x, axis, value):
    """A number in some rows along the axis."""
    return lax.select(_repeated(_row(x, axis) > 1, x, axis), x, _uniform(x, value))


def _expanded(row, axis):
    return lax.expand_dims(row, (axis,))


def _position(x, axis):
    return lax.broadcasted_iota(jnp.int32, x.shape, axis)


def _label(x, axis):
    """A position along the axis for each row; some are outside."""
    shape = tuple(n for i, n in enumerate(x.shape) if i != axis)
    return lax.broadcasted_iota(jnp.int32, shape, 0) * 2 - 1


def _one_hot(x, axis, label):
    return lax.eq(_position(x, axis), _repeated(label, x, axis))


def _sum(x, axis):
    return lax.reduce_sum(x, (axis,))


def _softmax(x, axis):
    e = lax.exp(x - x.max(axis, keepdims=True))  # differentiated, the maximum too
    return e / e.sum(axis, keepdims=True)


def _last(x, axis):
    """The array with the axis last."""
    return jnp.moveaxis(x, axis, -1)


def _turned(x):
    return (*range(1, x.ndim), 0)


def _matrix(x):
    return lax.reshape(x, (x.shape[0], x.size // x.shape[0]))


def _second(x, axis):
    """One position for all rows, by a gather."""
    offsets = tuple(range(x.ndim - 1))
    numbers = lax.GatherDimensionNumbers(offsets, (axis,), (axis,), (), ())
    sizes = tuple(1 if i == axis else n for i, n in enumerate(x.shape))
    position = jnp.full((1,), min(1, x.shape[axis] - 1))
    return lax.gather(x, position, numbers, sizes, mode="promise_in_bounds")


def _padded(x, axis, low, high):
    config = [(low, high, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return lax.pad(x, _number(x, 0), config)


def _picked(x, axis):
    """exp x at a label, which is inside, and a gradient through it."""
    label, e = _label(x, axis), lax.exp(x)
    total = _sum(e, axis)
    inside = lax.clamp(np.int32(0), label, np.int32(x.shape[axis] - 1))
    taken = _sum(lax.select_n(_one_hot(x, axis, inside), _uniform(x, 0), e), axis)
    spread = lax.select_n(_one_hot(x, axis, label), _uniform(x, 0), _repeated(1 / taken, x, axis))
    return total, taken, _sum(spread * e, axis)


def _scaled_pick(x, axis):
    inside = lax.clamp(np.int32(0), _label(x, axis), np.int32(x.shape[axis] - 1))
    quotients = x / _repeated(2 + lax.abs(_row(x, axis)), x, axis)
    return _sum(lax.select_n(_one_hot(x, axis, inside), _uniform(x, 0), quotients), axis)


def _twice(x, axis):
    """Two sums of products, one of a multiple of the other."""
    y, c = lax.sin(x), _repeated(_row(x, axis), x, axis)
    scaled = x * c
    return _sum(x * y, axis), _sum(scaled * y, axis), scaled


def _spread_product(x, axis):
    y = lax.sin(x)
    difference = x - _expanded(_row(x, axis), axis)
    return _sum(y, axis), _sum(x * y, axis), _sum(difference * y, axis), difference


# Rule, by module and name -> cases. Here, those that keep every bit.
EXACT: dict[str, dict[str, Case]] = {
    "arithmetic._add_any": {"": lambda x, _: jax.vjp(lambda v: (v * 2, v * 3), x)[1]((x, x))},
    "arithmetic._add_zero": {
        "0.0": lambda x, _: lax.add(lax.exp(x), _number(x, 0)),
        "-0.0": lambda x, _: lax.add(x, _number(x, -0.0)),
    },
    "arithmetic._add_negation": {
        "": lambda x, _: lax.add(x, lax.neg(lax.sin(x))),
        "row": lambda x, a: lax.add(x, _repeated(lax.neg(_row(x, a)), x, a)),
    },
    "arithmetic._add_self": {"": lambda x, _: lax.add(x, x)},
    "arithmetic._sub": {
        "0.0": lambda x, _: lax.sub(x, _number(x, 0)),
        "negation": lambda x, _: lax.sub(x, lax.neg(lax.sin(x))),
    },
    "arithmetic._neg": {
        "negation": lambda x, _: lax.neg(lax.neg(x)),
        "scaled": lambda x, _: lax.neg(lax.mul(x, _number(x, 3))),
    },
    "arithmetic._mul_one": {
        "1": lambda x, _: lax.mul(x, _uniform(x, 1)),
        "-1": lambda x, _: lax.mul(x, _number(x, -1)),
    },
    "arithmetic._product_of_negations": {
        "mul": lambda x, _: lax.mul(lax.neg(x), lax.neg(lax.sin(x))),
        "div": lambda x, _: lax.div(lax.neg(x), _number(x, 3)),
    },
    "arithmetic._mul_self": {"": lambda x, _: lax.mul(x, x)},
    "arithmetic._scale_of_scale": {
        "": lambda x, _: lax.mul(lax.mul(x, _number(x, 0.25)), _number(x, 3))
    },
    "arithmetic._div_by_constant": {"": lambda x, _: lax.div(x, _uniform(x, 8))},
    "arithmetic._integer_pow": {
        f"{n}": lambda x, _, n=n: lax.integer_pow(x, n) for n in (1, 2, 3, -1)
    },
    "arithmetic._square": {"": lambda x, _: lax.square(lax.neg(x))},
    "arithmetic._abs": {"": lambda x, _: lax.abs(lax.exp(x))},
    "arithmetic._max_of_lowest": {
        "max": lambda x, _: lax.max(x, _number(x, -np.inf)),
        "min": lambda x, _: lax.min(_number(x, np.inf), x),
    },
    "casts._chain": {"": lambda x, _: lax.convert_element_type((x > 0).astype(jnp.int32), x.dtype)},
    "selects._select_constant": {
        "": lambda x, _: lax.select_n(jnp.full(x.shape, True), x, lax.sin(x))
    },
    "selects._select_not": {
        "": lambda x, _: lax.select_n(lax.bitwise_not(x > 0), x, lax.sin(x)),
    },
    "selects._select_of_select": {
        "": lambda x, _: lax.select_n(x > 0, lax.select_n(x > 0, lax.sin(x), x), lax.exp(x))
    },
    "selects._logic": {
        "and": lambda x, _: lax.bitwise_and(x > 0, jnp.full(x.shape, True)),
        "or": lambda x, _: lax.bitwise_or(x > 0, x > 0),
    },
    "selects._not": {"": lambda x, _: lax.bitwise_not(lax.bitwise_not(x > 0))},
    "selects._compare_self": {
        name: lambda x, a, f=f: f(_position(x, a), _position(x, a))
        for name, f in {"eq": lax.eq, "ne": lax.ne, "lt": lax.lt, "ge": lax.ge}.items()
    },
    "selects._is_nan_of_negation": {"": lambda x, _: lax.ne(lax.neg(x), lax.neg(x))},
    "positions._convert": {"": lambda x, a: _position(x, a).astype(jnp.int16)},
    "positions._clamp": {
        "": lambda x, a: lax.clamp(np.int32(0), _position(x, a), np.int32(x.shape[a] - 1))
    },
    "positions._compare": {
        "lt": lambda x, a: lax.lt(_position(x, a), np.int32(0)),
        "le": lambda x, a: lax.le(np.int32(0), _position(x, a)),
        "gt": lambda x, a: lax.gt(_position(x, a), np.int32(x.shape[a])),
        "ne": lambda x, a: lax.ne(_position(x, a), np.int32(-3)),
    },
    "reversals._rev": {
        "twice": lambda x, a: lax.rev(lax.rev(x, (0, x.ndim - 1)), (a,)),
        "nothing": lambda x, a: lax.rev(lax.expand_dims(x, (a,)), (a,)),
        "repeated": lambda x, a: lax.rev(_repeated(_row(x, a), x, a), (a,)),
    },
    "views._reshape": {
        "": lambda x, _: lax.reshape(lax.reshape(x, (x.size,)), x.shape[::-1]),
        "broadcast": lambda x, a: lax.reshape(_repeated(_row(x, a), x, a), (1, *x.shape)),
    },
    "views._squeeze": {"": lambda x, a: lax.squeeze(lax.expand_dims(x, (a,)), (a,))},
    "views._transpose": {
        "": lambda x, _: lax.transpose(lax.transpose(x, _turned(x)), _turned(x)),
        "broadcast": lambda x, a: jnp.moveaxis(_repeated(_row(x, a), x, a), a, 0),
    },
    "views._broadcast": {
        "": lambda x, a: jnp.broadcast_to(_repeated(_row(x, a), x, a), (2, *x.shape)),
        "units": lambda x, a: jnp.broadcast_to(_expanded(_row(x, a), a), x.shape),
    },
    "views._iota": {"": lambda x, a: x + _repeated(_label(x, a) * 0 + 1, x, a) * 0 + _counted(x)},
    "views._copy": {"": lambda x, _: lax.neg(jnp.copy(x))},
    "views._scalars": {
        name: lambda x, _, f=f: f(x, _uniform(x, 3))
        for name, f in {"mul": lax.mul, "sub": lax.sub, "max": lax.max, "lt": lax.lt}.items()
    },
    "views.sink": {
        "row": lambda x, a: lax.exp(lax.mul(_repeated(_row(x, a), x, a), _number(x, 3))),
        "units": lambda x, a: lax.select_n(
            _expanded(_row(x, a) > 0, a), *[_expanded(f(_row(x, a)), a) for f in (lax.sin, lax.cos)]
        ),
        "uniform": lambda x, _: lax.mul(lax.neg(_uniform(x, 3)), _uniform(x, 2)),
    },
    "one_hot._constant_gather": {"": _second},
}


def _counted(x):
    return lax.broadcast_in_dim(lax.iota(x.dtype, x.shape[-1]), x.shape, (x.ndim - 1,))


# Those that keep all but the signs of zeros.
SIGNS: dict[str, dict[str, Case]] = {
    "pads._side_by_side": {
        "": lambda x, a: _padded(x, a, 0, x.shape[a] + 1) + _padded(lax.sin(x), a, x.shape[a], 1)
    },
    "selects._sum_of_selects": {
        "sub": lambda x, _: jax.vjp(jnp.abs, x)[1](x),
        "add": lambda x, _: jax.vjp(jax.nn.leaky_relu, x)[1](x),
    },
    "one_hot._gather": {
        "": lambda x, a: jnp.take_along_axis(
            lax.sin(_last(x, a)), _label(x, a)[..., None] % x.shape[a], -1
        )
    },
    "one_hot._scatter_add": {
        "": lambda x, a: jax.vjp(
            lambda v: jnp.take_along_axis(v, _label(x, a)[..., None], -1), _last(x, a)
        )[1](_row(x, a)[..., None])
    },
    "one_hot._constant_scatter": {
        "": lambda x, a: jax.vjp(lambda v: _second(v, a), x)[1](_row(x, a))
    },
    "picks.picked": {"": _scaled_pick},
    "choices.decided": {
        "": lambda x, _: lax.select(x > 1, lax.sqrt(lax.select(x > 1, x, lax.exp(x))), lax.sin(x)),
        "other": lambda x, _: lax.select(
            x > 1, lax.sin(x), lax.sqrt(lax.select(x > 1, x, lax.exp(x)))
        ),
    },
}

# Those that round differently, or add up in another order.
ROUNDED: dict[str, dict[str, Case]] = {
    "selects._select_nan": {"": lambda x, _: jax.nn.softplus(x)},
    "selects._difference_of_selects": {
        "": lambda x, a: jax.grad(lambda v: jax.nn.logsumexp(v, axis=a).sum())(x)
    },
    "logistic._exp": {"": lambda x, _: jax.vjp(jax.nn.softplus, x)[1](x)},
    "dots._of_vectors": {
        "": lambda x, a: lax.dot_general(
            x, lax.sin(x), (((a,), (a,)), (tuple({*range(x.ndim)} - {a}),) * 2)
        ),
        "turned": lambda x, _: jnp.einsum("bc,cb->b", _matrix(x), lax.sin(_matrix(x).T)),
        "all axes": lambda x, _: jnp.vdot(x, lax.sin(x)),
    },
    "views._transposed_dot": {
        "": lambda x, _: lax.transpose(lax.dot(_matrix(x).T, _matrix(lax.sin(x))), (1, 0))
    },
    "smaller.unit_axes": {
        "sum": lambda x, a: lax.reduce_sum(_expanded(x, 1), (1, a + (a >= 1))),
        "max": lambda x, a: lax.reduce_max(_expanded(x, a), (a,)),
        "min": lambda x, a: lax.reduce_min(_expanded(x, a), (a,)),
    },
    "known.eliminated": {
        "uniform": lambda x, a: _sum(_uniform(x, 2.5), a),
        "rows": lambda x, a: _sum(_repeated(_row(x, a), x, a), a),
        "the same": lambda x, a: (_sum(x, a), _sum(_expanded(_row(x, a), a) * x, a)),
        "negation": lambda x, a: _sum(lax.neg(_repeated(_row(x, a), x, a)), a),
        "centred": lambda x, a: _sum(x - x.mean(a, keepdims=True), a),
        "softmax": lambda x, a: _sum(jax.nn.softmax(x, a), a),
        "exponential of log_softmax": lambda x, a: _sum(lax.exp(jax.nn.log_softmax(x, a)), a),
        "exponential less logsumexp": lambda x, a: _sum(
            lax.exp(x - jax.nn.logsumexp(x, a, keepdims=True)), a
        ),
        "one-hot": lambda x, a: _sum(_one_hot(x, a, _label(x, a)).astype(x.dtype), a),
        "smoothed": lambda x, a: _sum(
            _one_hot(x, a, _label(x, a)).astype(x.dtype) * _number(x, 0.75) + _number(x, 0.25), a
        ),
        "chosen": lambda x, a: _sum(
            lax.select_n(_one_hot(x, a, _label(x, a)), _uniform(x, 0), _repeated(_row(x, a), x, a)),
            a,
        ),
        "multiple of a product": _twice,
        "sum of products": _spread_product,
        "gradient of a pick": _picked,
    },
    "smaller.of_view": {
        "transpose": lambda x, a: _sum(jnp.moveaxis(x, a, 0), 0),
        "reversal": lambda x, a: _sum(lax.rev(x, (0, 1)), a),
        "units": lambda x, a: _sum(_expanded(x, 0), a + 1),
    },
    "smaller.of_repeated": {
        "": lambda x, a: lax.reduce_sum(_repeated(_row(x, a), x, a), tuple(range(x.ndim)))
    },
    "smaller.scaled": {
        "row": lambda x, a: _sum(x * _repeated(2 + _row(x, a), x, a), a),
        "quotient": lambda x, a: _sum(x / _expanded(2 + lax.abs(_row(x, a)), a), a),
        "inside": lambda x, a: _sum(x * _repeated(2 + _row(x, a), x, a) * lax.sin(x), a),
        "negation": lambda x, a: _sum(lax.neg(x), a),
    },
    "smaller.contracted": {
        "left": lambda x, _: _sum(lax.dot(_matrix(x), _matrix(lax.sin(x)).T), 0),
        "both": lambda x, _: lax.dot(_matrix(x), _matrix(lax.sin(x)).T).sum(),
        "batch": lambda x, _: _sum(jnp.einsum("bi,bj->bij", _matrix(x), _matrix(lax.sin(x))), 1),
    },
    "smaller.nested": {"": lambda x, _: _sum(_sum(jnp.stack([x, lax.sin(x)]), 0), 0)},
    "choices.chosen": {
        "": lambda x, a: lax.reduce_sum(_chosen(x, a, 1.5), (a,)),
        "squares": lambda x, a: lax.reduce_sum(lax.square(_chosen(x, a, 1.0)), (a,)),
    },
    "ties._equal_terms": {"": lambda x, a: jax.vjp(lambda v: _softmax(v, a), x)[1](lax.sin(x))},
    "ties._share": {"": lambda x, a: jax.vjp(lambda v: _softmax(v, a), x)[1](lax.sin(x))},
    "ties._spread": {"": lambda x, a: jax.vjp(lambda v: _softmax(v, a), x)[1](lax.sin(x))},
}

CASES: dict[tuple[str, str], Case] = {
    (rule, name): case
    for table in (EXACT, SIGNS, ROUNDED)
    for rule, cases in table.items()
    for name, case in cases.items()
}
