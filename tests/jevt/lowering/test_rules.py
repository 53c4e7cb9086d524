"""What each primitive can be in a kernel, and the reasons where it can be nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse
from jax.extend.core import JaxprEqn, Primitive, primitives

from jevt._jax_internals import iota_2x32_shape_p
from jevt.lowering import rules
from jevt.lowering.errors import NotFusible
from jevt.passes import inline
from jevt_kernels.ops import OPS

FLOAT = jax.ShapeDtypeStruct((4, 6), np.float32)
INT = jax.ShapeDtypeStruct((4, 6), np.int32)
BOOL = jax.ShapeDtypeStruct((4, 6), np.bool_)


def equation(function: Callable[..., Any], *arguments: Any) -> JaxprEqn:
    (eqn,) = inline.run(jax.make_jaxpr(function)(*arguments)).eqns
    return eqn


def operation(function: Callable[..., Any], *arguments: Any) -> rules.Operation:
    eqn = equation(function, *arguments)
    assert rules.classify(eqn) == rules.Role("pointwise")
    return rules.POINTWISE[eqn.primitive](eqn)


def test_each_primitive_has_one_role() -> None:
    tables = [rules.POINTWISE, rules.VIEWS, rules.REDUCTIONS, rules.SOURCES, rules._AWAITED]
    seen = [primitive for table in tables for primitive in table]
    assert len(seen) == len(set(seen))
    assert len(rules.POINTWISE) > 60  # a JAX that renames its primitives would empty the table


@pytest.mark.parametrize(
    ("function", "arguments", "op", "constants"),
    [
        (lax.add, (FLOAT, FLOAT), "add", ()),
        (lax.tanh, (FLOAT,), "tanh", ()),
        (lambda x: lax.integer_pow(x, -3), (FLOAT,), "integer_pow", (-3,)),
        (lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), (FLOAT,), "round_even", ()),
        (lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), (FLOAT,), "round_away", ()),
        (lambda x: lax.reduce_precision(x, 8, 7), (FLOAT,), "round_to_bfloat16", ()),
        (lambda x: lax.bitcast_convert_type(x, jnp.int32), (FLOAT,), "bitcast", ()),
        (lambda x: lax.convert_element_type(x, jnp.bfloat16), (FLOAT,), "convert", ()),
        (lax.select, (BOOL, FLOAT, FLOAT), "select_n", ()),
        (lax.bitwise_not, (BOOL,), "not", ()),
        (lax.pow, (FLOAT, FLOAT), "pow", ()),
        (lax.pow, (FLOAT, INT), "pow", ()),
    ],
)
def test_pointwise(
    function: Callable[..., Any], arguments: tuple[Any, ...], op: str, constants: tuple[int, ...]
) -> None:
    assert operation(function, *arguments) == rules.Operation(op, constants)
    assert op in OPS


@pytest.mark.parametrize("primitive", rules.POINTWISE, ids=str)
def test_every_pointwise_rule_names_an_operation(primitive: Any) -> None:
    named = {
        "bitcast_convert_type": "bitcast",
        "convert_element_type": "convert",
        "integer_pow": "integer_pow",
        "reduce_precision": "round_to_bfloat16",
        "round": "round_even",
    }
    if primitive.name in named:
        assert named[primitive.name] in OPS
        return
    eqn = equation(lax.add, FLOAT, FLOAT)  # these rules look at no parameters
    assert rules.POINTWISE[primitive](eqn).op in OPS


def test_views_reductions_sources_and_products() -> None:
    assert rules.classify(equation(lambda x: x.T, FLOAT)).kind == "view"
    assert rules.classify(equation(lambda x: lax.rev(x, (0,)), FLOAT)).kind == "view"
    reduction = equation(lambda x: lax.reduce_max_p.bind(x, axes=(1,), out_sharding=None), FLOAT)
    assert rules.classify(reduction) == rules.Role("reduction", (1,))
    square = jax.ShapeDtypeStruct((4096, 4096), np.float32)
    whole = equation(lambda x: lax.reduce_max_p.bind(x, axes=(0, 1), out_sharding=None), square)
    assert rules.classify(whole) == rules.Role("reduction", (0, 1))
    iota = equation(lambda: lax.broadcasted_iota(np.int32, (4, 5), 1))
    assert rules.classify(iota).kind == "source"
    product = equation(jnp.matmul, FLOAT, jax.ShapeDtypeStruct((FLOAT.shape[1], 3), np.float32))
    assert rules.classify(product).kind == "contraction"


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (
            jnp.matmul,
            (jax.ShapeDtypeStruct((4, 4), np.int32),) * 2,
            "no mainloop: dot_general of int32 to int32",
        ),
        (lax.sort, (FLOAT,), "sort"),
        (lax.cumsum, (FLOAT,), "cumsum (scan)"),
        (lambda x: lax.fft(x, "RFFT", (6,)), (FLOAT,), "no mainloop: fft"),
        (lambda x: lax.complex(x, x), (FLOAT,), "no mainloop: complex"),
        (
            lambda x: x * x,
            (jax.ShapeDtypeStruct((4,), np.complex64),),
            "complex64 stays with XLA",
        ),
        (
            lambda x: x + x,
            (jax.ShapeDtypeStruct((4,), jnp.float8_e4m3fn),),
            "float8_e4m3fn stays with XLA",
        ),
        (lambda x: lax.reduce_precision(x, 5, 10), (FLOAT,), "5 exponent and 10 mantissa bits"),
        (
            lambda x: lax.bitcast_convert_type(x, np.int16),
            (FLOAT,),
            "bitcast from float32 to int16 changes the shape",
        ),
        (
            lambda x: lax.nextafter(x, x),
            (jax.ShapeDtypeStruct((4,), np.float16),),
            "nextafter of float16",
        ),
        (
            lambda x: lax.reduce_and_p.bind(x, axes=(1,)),
            (INT,),
            "bitwise reduce_and of int32",
        ),
        (
            jax.random.wrap_key_data,
            (jax.ShapeDtypeStruct((2,), np.uint32),),
            "no mainloop: random_wrap",
        ),
        (
            lambda x: sparse.BCOO.fromdense(x, nse=3).data,
            (FLOAT,),
            "no mainloop: bcoo_fromdense",
        ),
        (
            lambda x: jax.pure_callback(lambda v: v, FLOAT, x),
            (FLOAT,),
            "one call: a callback to the host",
        ),
        (lambda x: jax.debug.print("{}", x), (FLOAT,), "has effects, which bound groups"),
    ],
)
def test_reasons(function: Callable[..., Any], arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(NotFusible) as caught:
        rules.classify(equation(function, *arguments))
    assert reason in str(caught.value)


def test_64_bit_types_are_taken() -> None:
    with jax.enable_x64(True):
        for dtype in (np.float64, np.int64, np.uint64):
            x = jax.ShapeDtypeStruct((4,), dtype)
            assert rules.classify(equation(lax.add, x, x)).kind == "pointwise"


def test_random_bits_are_a_source_and_arithmetic() -> None:
    """The words of ``iota_2x32_shape`` and ``threefry2x32``, which ``jax.random`` is made of."""
    eqn = equation(lambda: iota_2x32_shape_p.bind(shape=(8, 8)))
    assert rules.classify(eqn).kind == "source"
    words = [jax.ShapeDtypeStruct((8,), np.uint32)] * 4
    assert operation(primitives.threefry2x32_p.bind, *words).op == "threefry2x32"


def test_a_primitive_that_nobody_knows() -> None:
    primitive = Primitive("rotate_by_hand")
    primitive.def_abstract_eval(lambda x: x)
    with pytest.raises(NotFusible, match="unknown primitive 'rotate_by_hand'"):
        rules.classify(equation(primitive.bind, FLOAT))
