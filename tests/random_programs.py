"""Random programs for the tests of graph passes: steps, each applied to an earlier value."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Of one value, by position and by views.
STEPS = {
    "neg": lax.neg,
    "abs": lax.abs,
    "square": lax.square,
    "exp": lambda x: lax.exp(lax.min(x, x.dtype.type(3.0))),
    "relu": lambda x: lax.max(x, x.dtype.type(0.0)),
    "halve": lambda x: lax.div(x, x.dtype.type(2.0)),
    "third": lambda x: lax.div(x, x.dtype.type(3.0)),
    "double": lambda x: lax.mul(x, x.dtype.type(2.0)),
    "plus_zero": lambda x: lax.add(x, x.dtype.type(0.0)),
    "minus_zero": lambda x: lax.sub(x, x.dtype.type(0.0)),
    "cube": lambda x: lax.integer_pow(x, 3),
    "inverse": lambda x: lax.integer_pow(x, -1),
    "widen": lambda x: lax.convert_element_type(lax.convert_element_type(x, jnp.float32), x.dtype),
    "positive": lambda x: lax.select_n(lax.gt(x, x.dtype.type(0)), jnp.zeros_like(x), x),
    "not_nan": lambda x: lax.select_n(lax.ne(x, x), x, jnp.zeros_like(x)),
    "add_self": lambda x: lax.add(x, lax.neg(x)),
    "expand": lambda x: lax.expand_dims(x, (0,)),
    "expand_last": lambda x: lax.expand_dims(x, (x.ndim,)),
    "squeeze": jnp.squeeze,
    "flatten": lambda x: lax.reshape(x, (x.size,)),
    "transpose": lambda x: lax.transpose(x, tuple(reversed(range(x.ndim)))),
    "repeat": lambda x: lax.broadcast_in_dim(x, (2, *x.shape), tuple(range(1, x.ndim + 1))),
    "repeat_last": lambda x: lax.broadcast_in_dim(x, (*x.shape, 3), tuple(range(x.ndim))),
}
PAIRS = {
    "add": lax.add,
    "sub": lax.sub,
    "mul": lax.mul,
    "div": lax.div,
    "max": lax.max,
    "where": lambda x, y: lax.select_n(lax.lt(x, y), x, y),
}

# … and sums.
SUMS = {
    "sum_last": lambda x: lax.reduce_sum(x, (x.ndim - 1,)) if x.ndim else x,
    "sum_first": lambda x: lax.reduce_sum(x, (0,)) if x.ndim else x,
    "sum_all": lambda x: lax.reduce_sum(x, tuple(range(x.ndim))),
    "mean": lambda x: jnp.broadcast_to(jnp.mean(x, -1, keepdims=True), x.shape) if x.ndim else x,
    "centre": lambda x: x - jnp.mean(x, -1, keepdims=True) if x.ndim else x,
    "softmax": lambda x: jax.nn.softmax(x, -1) if x.ndim else x,
}


def dag(seed: int, size: int):
    """A function of two matrices with about ``size`` equations, for the partitioner.

    Pointwise operations, reductions both ways, broadcasts, views, matrix products and sums that no
    kernel takes, each of values that are not far before it.
    """
    rng = np.random.default_rng(seed)

    def program(x, y):
        full, rows, columns = [x, y], [x.sum(-1)], []
        for _ in range(size):
            a, b = (full[-1 - rng.integers(min(len(full), 6))] for _ in "ab")
            match rng.choice(
                11, p=[0.3, 0.14, 0.08, 0.1, 0.06, 0.08, 0.06, 0.06, 0.05, 0.04, 0.03]
            ):
                case 0:
                    full.append(a * b)
                case 1:
                    full.append(lax.tanh(a))
                case 2:
                    rows.append(lax.reduce_max(a, (1,)))
                case 3:
                    full.append(a - lax.broadcast_in_dim(rows[-1], a.shape, (0,)))
                case 4:
                    rows.append(rows[-1 - rng.integers(min(len(rows), 3))] * 2.0)
                case 5:
                    columns.append(lax.reduce_sum(a, (0,)))
                case 6:
                    full.append(lax.reshape(lax.reshape(a, (a.size,)) + 1.0, a.shape))
                case 7:
                    full.append(a + lax.select(b > 0, b, lax.neg(b)))
                case 8:
                    full.append(a @ lax.slice(b, (0, 0), (b.shape[1], b.shape[1])))
                case 9:
                    columns.append(columns[-1] * 0.5 if columns else x.sum(0))
                case _:
                    full.append(lax.cumsum(a))
        keep = [v for v in (*full[2:], *rows, *columns) if rng.random() < 0.2]
        return [*keep, full[-1], rows[-1], *columns[-1:]]

    return program


@st.composite
def programs(draw, names: Sequence[str]):
    """A function of one array: some steps of these names."""
    steps = draw(st.lists(st.sampled_from(names), min_size=3, max_size=9))
    picks = [draw(st.integers(0, 10)) for _ in steps]

    def fun(x):
        values = [x]
        for step, pick in zip(steps, picks, strict=True):
            value = values[-1 - pick % min(len(values), 3)]
            if step in PAIRS:
                partners = [v for v in values if v.shape == value.shape]
                new = PAIRS[step](value, partners[pick % len(partners)])
            else:
                new = (STEPS | SUMS)[step](value)
            if new.size <= 512 and new.ndim <= 5:
                values.append(new)
        return tuple(values[1:])

    return fun
