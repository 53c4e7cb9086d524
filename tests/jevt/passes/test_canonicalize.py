"""Canonical forms: each rule before and after, the same bits, and nothing that may not change."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import lax
from random_programs import PAIRS, STEPS, programs
from rewriting import EDGES, before_and_after, count, evaluate, near, rewritten, same, traced

from jevt.passes import canonicalize
from jevt.passes.canonical import casts

X = EDGES
BIG = np.linspace(-2, 2, 1600, dtype=np.float32).reshape(40, 40)
Y = np.roll(EDGES, 1, axis=1)
INTS = np.arange(-6, 6, dtype=np.int32).reshape(3, 4)
ROW = np.array([1.0, -0.0, np.inf], np.float32)
BITS = np.array([[True, False, True, False]] * 3)


def _bf16(x):
    return lax.convert_element_type(x, jnp.bfloat16)


def _f32(x):
    return lax.convert_element_type(x, jnp.float32)


# name -> (function, arguments); each has something to simplify.
ARITHMETIC = {
    "add_any": (lambda x, y: jax.vjp(lambda v: (v * y, v * 3.0), x)[1]((x, y)), X, Y),
    "add_negative_zero": (lambda x: lax.add(x, x.dtype.type(-0.0)), X),
    "add_zero_to_nonnegative": (lambda x: lax.add(lax.exp(x), x.dtype.type(0.0)), X),
    "add_zero_to_integer": (lambda x: lax.add(x, np.int32(0)), INTS),
    "add_negation": (lambda x, y: lax.add(lax.neg(x), y), X, Y),
    "add_negated_row": (
        lambda x, r: lax.add(x, lax.broadcast_in_dim(lax.neg(r), (3, 4), (0,))),
        X,
        ROW,
    ),
    "sub_zero": (lambda x: lax.sub(x, x.dtype.type(0.0)), X),
    "sub_negation": (lambda x, y: lax.sub(x, lax.neg(y)), X, Y),
    "neg_neg": (lambda x: lax.neg(lax.neg(x)), X),
    "neg_of_scaled": (lambda x: lax.neg(lax.mul(x, x.dtype.type(3.0))), X),
    "neg_of_quotients": (
        lambda x: (lax.neg(lax.div(x, x.dtype.type(3.0))), lax.neg(lax.div(x.dtype.type(3.0), x))),
        X,
    ),
    "mul_one": (lambda x: lax.mul(x, jnp.ones_like(x)), X),
    "mul_minus_one": (lambda x: lax.mul(x, x.dtype.type(-1.0)), X),
    "mul_zero_of_integers": (lambda x: lax.mul(x, jnp.zeros_like(x)), INTS),
    "mul_negations": (lambda x, y: lax.mul(lax.neg(x), lax.neg(y)), X, Y),
    "mul_negation_by_number": (lambda x: lax.mul(lax.neg(x), x.dtype.type(3.0)), X),
    "mul_self": (lambda x: lax.mul(x, x), X),
    "scale_of_scale": (lambda x: lax.mul(lax.mul(x, x.dtype.type(0.25)), x.dtype.type(3.0)), X),
    "div_by_power_of_two": (lambda x: lax.div(x, x.dtype.type(8.0)), X),
    "div_by_uniform_array": (lambda x: lax.div(x, jnp.full_like(x, 0.5)), X),
    "powers": (lambda x: tuple(lax.integer_pow(x, n) for n in (1, 2, 3, 4, -1, -2)), X),
    "integer_powers": (lambda x: tuple(lax.integer_pow(x, n) for n in (1, 2, 3)), INTS),
    "square_of_negation": (lambda x: (lax.square(lax.neg(x)), lax.square(lax.abs(x))), X),
    "abs_of_nonnegative": (lambda x: lax.abs(lax.reduce_sum(lax.exp(x), (1,))), X),
    "abs_of_negation": (lambda x: lax.abs(lax.neg(x)), X),
    "max_of_lowest": (
        lambda x: (lax.max(x, x.dtype.type(-np.inf)), lax.min(x.dtype.type(np.inf), x)),
        X,
    ),
    "max_of_lowest_integer": (lambda x: lax.max(x, np.int32(-(2**31))), INTS),
}
CASTS = {
    "there_and_back": (lambda x: _bf16(_f32(x)), X.astype(ml_dtypes.bfloat16)),
    "chain": (lambda x: _f32(lax.convert_element_type(x, jnp.int32)), INTS.astype(np.int8)),
    "of_booleans": (lambda x: lax.convert_element_type(_f32(x), jnp.bool_), BITS),
}
SELECTS = {
    "equal_cases": (lambda c, x: lax.select_n(c, x, x), BITS, X),
    "constant_predicate": (lambda x, y: lax.select_n(jnp.full((3, 4), True), x, y), X, Y),
    "negated_predicate": (lambda c, x, y: lax.select_n(lax.bitwise_not(c), x, y), BITS, X, Y),
    "same_predicate_twice": (
        lambda c, x, y: lax.select_n(c, lax.select_n(c, x, y), lax.sin(x)),
        BITS,
        X,
        Y,
    ),
    "logic": (lambda c: (c & True, c | True, c & False, c | False, c & c), BITS),
    "double_negation": (lambda c: lax.bitwise_not(lax.bitwise_not(c)), BITS),
    "integers_equal_themselves": (lambda i: (i == i, i < i), INTS),
    "isnan_of_negation": (lambda x: lax.neg(x) != lax.neg(x), X),
}
VIEWS = {
    "reshapes": (lambda x: lax.reshape(lax.reshape(x, (12,)), (2, 6)), X),
    "reshape_and_back": (lambda x: lax.reshape(lax.reshape(x, (12,)), (3, 4)), X),
    "transposes": (lambda x: lax.transpose(lax.transpose(x[None], (2, 0, 1)), (2, 0, 1)), X),
    "transpose_and_back": (lambda x: lax.transpose(lax.transpose(x, (1, 0)), (1, 0)), X),
    "transpose_of_unit_axes": (lambda x: lax.transpose(lax.reshape(x, (3, 1, 4)), (1, 0, 2)), X),
    "expand_and_squeeze": (lambda x: lax.squeeze(lax.expand_dims(x, (1,)), (1,)), X),
    "broadcast_of_broadcast": (
        lambda r: lax.broadcast_in_dim(lax.broadcast_in_dim(r, (3, 4), (0,)), (2, 3, 4), (1, 2)),
        ROW,
    ),
    "broadcast_of_reshape": (
        lambda r: lax.broadcast_in_dim(lax.reshape(r, (3, 1)), (3, 4), (0, 1)),
        ROW,
    ),
    "broadcast_of_unit_axes": (lambda r: lax.broadcast_in_dim(r, (3, 1), (0,)), ROW),
    "function_of_rows": (
        lambda r: lax.exp(lax.mul(lax.broadcast_in_dim(r, (3, 4), (0,)), r.dtype.type(3.0))),
        ROW,
    ),
    "choice_of_rows": (
        lambda r: lax.select_n(
            lax.broadcast_in_dim(r > 0, (3, 1), (0,)),
            jnp.zeros((3, 1), r.dtype),
            lax.broadcast_in_dim(r, (3, 1), (0,)),
        ),
        ROW,
    ),
    "function_of_uniform": (lambda x: lax.mul(x, lax.neg(jnp.full_like(x, 3))), BIG),
    "iota": (lambda x: x + lax.broadcast_in_dim(lax.iota(x.dtype, 4), (3, 4), (1,)), X),
    "transposed_product": (lambda x, y: lax.transpose(lax.dot(x.T, y), (1, 0)), X, Y),
    "copy": (lambda x: lax.neg(jnp.copy(x)), X),
}
RESIDUE = {
    "max_of_scores": (lambda x: jnp.max(x, axis=-1, initial=-jnp.inf), X),
    "logsumexp_gradient": (jax.grad(lambda x: jax.nn.logsumexp(x, axis=-1).sum()), X),
    "softplus": (jax.nn.softplus, X),
    "sigmoid_cross_entropy_gradient": (
        jax.grad(lambda x, y: optax.sigmoid_binary_cross_entropy(x, y).mean()),
        X,
        Y,
    ),
}
CASES = ARITHMETIC | CASTS | SELECTS | VIEWS | RESIDUE
FLOATING = [n for n in CASES if n not in CASTS and CASES[n][1].dtype.kind == "f"]

# Not the same bits, by a rounding that the rule names; or sums in another order.
ROUNDED = {"sigmoid_cross_entropy_gradient", "transposed_product", "logsumexp_gradient", "softplus"}


@pytest.mark.parametrize("topic", ["ARITHMETIC", "CASTS", "SELECTS", "VIEWS", "RESIDUE"])
def test_golden(topic, golden):
    cases = globals()[topic]
    golden(f"passes/canonicalize_{topic.lower()}.txt", before_and_after(cases, canonicalize.run))


@pytest.mark.parametrize("name", CASES)
def test_same_values(name):
    fun, *args = CASES[name]
    jaxpr = traced(fun, *args)
    result = rewritten(canonicalize.run, jaxpr)
    assert str(result) != str(jaxpr)
    (near if name in ROUNDED else same)(evaluate(result, *args), evaluate(jaxpr, *args))


@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_same_values_of_other_types(name, dtype):
    fun, *args = CASES[name]
    with jax.enable_x64(True):
        dtype = np.dtype(dtype)
        with np.errstate(over="ignore"):
            args = [a.astype(dtype) if a.dtype == np.float32 else a for a in args]
        jaxpr = traced(fun, *args)
        result = rewritten(canonicalize.run, jaxpr)
        (near if name in ROUNDED else same)(evaluate(result, *args), evaluate(jaxpr, *args))


LEFT_ALONE = {
    "add_zero": (lambda x: lax.add(x, np.float32(0.0)), X),
    "zero_minus": (lambda x: lax.sub(np.float32(0.0), x), X),
    "sub_negative_zero": (lambda x: lax.sub(x, np.float32(-0.0)), X),
    "mul_zero": (lambda x: lax.mul(x, np.float32(0.0)), X),
    "div_by_three": (lambda x: lax.div(x, np.float32(3.0)), X),
    "div_by_huge": (lambda x: lax.div(x, np.float32(2.0**127)), X),
    "div_self": (lambda x: lax.div(x, x), X),
    "sub_self": (lambda x: lax.sub(x, x), X),
    "neg_of_sub": (lambda x, y: lax.neg(lax.sub(x, y)), X, Y),
    "scale_overflowing_early": (lambda x: lax.mul(lax.mul(x, np.float32(4.0)), np.float32(0.3)), X),
    "floats_equal_themselves": (lambda x: (lax.eq(x, x), lax.ge(x, x)), X),
    "precision_dropped": (lambda x: _f32(_bf16(x)), X),
    "float_to_integer_and_back": (lambda x: _f32(lax.convert_element_type(x, jnp.int32)), X),
    "abs": (lambda x: lax.abs(lax.sub(lax.exp(x), np.float32(1.0))), X),
    "max_zero": (lambda x: lax.max(x, np.float32(0.0)), X),
    "sign_of_nonnegative": (lambda x: lax.sign(lax.exp(x)), X),
    "copy_that_leaves": (jnp.copy, X),
    "select_by_nan_that_decides": (lambda x, y: lax.select_n(lax.ne(x, x), x, y), X, Y),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    fun, *args = LEFT_ALONE[name]
    jaxpr = traced(fun, *args)
    assert canonicalize.run(jaxpr) is jaxpr


def test_logsumexp_keeps_rows_of_infinities():
    rows = np.array(
        [
            [-np.inf, -np.inf, -np.inf],
            [-np.inf, 0.0, 1.0],
            [np.inf, 0.0, 1.0],
            [np.nan, 0.0, 1.0],
            [1e4, -1e4, 0.0],
        ],
        np.float32,
    )
    for fun in (jax.nn.logsumexp, jax.nn.log_softmax, jax.nn.softmax):
        for derived in (
            lambda x, fun=fun: fun(x, axis=-1),
            jax.grad(lambda x, fun=fun: (fun(x, axis=-1) * 2.0).sum()),
        ):
            jaxpr = traced(derived, rows)
            result = rewritten(canonicalize.run, jaxpr)
            near(evaluate(result, rows), evaluate(jaxpr, rows), 1e-6)


def test_logsumexp_gradient_needs_no_guard():
    jaxpr = traced(jax.grad(lambda x: jax.nn.logsumexp(x, axis=-1).sum()), X)
    result = rewritten(canonicalize.run, jaxpr)
    assert [count(result, name) for name in ("abs", "ge", "sub", "max")] == [0, 0, 1, 0]
    assert count(result, "select_n") == count(result, "is_finite") == 1


def test_softplus_gradient_is_logistic():
    x = np.array(
        [-np.inf, -200.0, -30.0, -1.0, -0.0, 0.0, 1.0, 30.0, 200.0, np.inf, np.nan], np.float32
    )
    for fun, derivative in (
        (jax.nn.softplus, jax.nn.sigmoid),
        (jax.nn.log_sigmoid, lambda v: 1 - jax.nn.sigmoid(v)),
    ):
        jaxpr = traced(jax.grad(lambda v, fun=fun: fun(v).sum()), x)
        result = rewritten(canonicalize.run, jaxpr)
        assert count(result, "logistic") == 1 and count(result, "log1p") == 0
        near(evaluate(result, x), evaluate(jaxpr, x), 1e-6)
        near(evaluate(result, x), [derivative(x)], 1e-6)


def test_holds():
    b, h, f, d = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64
    wider = {
        (f, b),
        (f, h),
        (d, f),
        (jnp.int32, jnp.int8),
        (h, jnp.int8),
        (f, jnp.int16),
        (jnp.int8, bool),
    }
    wider |= {(d, jnp.int32), (jnp.int16, jnp.uint8)}
    narrower = {
        (b, h),
        (h, b),
        (b, f),
        (f, jnp.int32),
        (jnp.int8, jnp.uint8),
        (jnp.uint32, jnp.int8),
    }
    narrower |= {(bool, jnp.int8), (jnp.int32, f), (h, jnp.int32)}
    assert all(casts.holds(np.dtype(a), np.dtype(b)) for a, b in wider)
    assert not any(casts.holds(np.dtype(a), np.dtype(b)) for a, b in narrower)


def test_bodies_scopes_and_settings():
    def body(carry, x):
        with jax.named_scope("inside"):
            return carry + lax.div(x, np.float32(2.0)), lax.neg(lax.neg(x))

    def fun(x):
        with jax.named_scope("outside"), jax.default_matmul_precision("float32"):
            return lax.scan(body, lax.div(x[0], np.float32(4.0)), x)

    jaxpr = jax.make_jaxpr(fun)(X)
    result = rewritten(canonicalize.run, jaxpr)
    assert count(result, "div") == 0
    same(evaluate(result, X), evaluate(jaxpr, X))
    scaled = next(e for e in result.eqns if e.primitive.name == "mul")
    assert str(scaled.source_info.name_stack) == "outside"
    (scan,) = (e for e in result.eqns if e.primitive.name == "scan")
    inner = next(e for e in scan.params["jaxpr"].eqns if e.primitive.name == "mul")
    assert str(inner.source_info.name_stack) == "inside"
    assert scaled.ctx == next(e for e in jaxpr.eqns if e.primitive.name == "div").ctx


def test_effects_stay():
    def fun(x):
        jax.debug.print("{}", lax.neg(lax.neg(x)), ordered=True)
        return lax.mul(x, np.float32(1.0))

    jaxpr = jax.make_jaxpr(fun)(X)
    result = canonicalize.run(jaxpr)
    assert result.effects == jaxpr.effects
    assert [e.primitive.name for e in result.eqns if e.effects] == ["debug_print"] or count(
        result, "debug_callback"
    )


def test_inside_shard_map():
    from jax.sharding import AxisType, PartitionSpec

    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

    def local(x):
        y = jax.nn.softplus(x) * 1.0 - lax.neg(x)
        return lax.psum(jax.nn.logsumexp(y / 2.0, axis=-1), "d")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=PartitionSpec(None, "d"), out_specs=PartitionSpec()
    )
    x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    fun = jax.grad(lambda v: jax.jit(mapped)(v).sum())
    jaxpr = traced(fun, x)
    result = rewritten(canonicalize.run, jaxpr)
    near(evaluate(result, x, compiled=True), evaluate(jaxpr, x, compiled=True), 1e-6)


@hypothesis.given(
    programs([*STEPS, *PAIRS]),
    st.sampled_from(["float32", "float64", "bfloat16"]),
    st.sampled_from([(3, 4), (1, 4), (4, 1), (2, 1, 3), (5,), ()]),
    st.randoms(use_true_random=False),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_random_programs(fun, dtype, shape, random):
    flat = EDGES.reshape(-1)
    values = [random.choice(flat) for _ in range(int(np.prod(shape)))]
    with jax.enable_x64(True):
        x = np.array(values, np.float32).astype(np.dtype(dtype)).reshape(shape)
        jaxpr = jax.make_jaxpr(fun)(x)
        result = rewritten(canonicalize.run, jaxpr)
        same(evaluate(result, x), evaluate(jaxpr, x))
