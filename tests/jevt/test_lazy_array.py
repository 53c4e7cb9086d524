"""``LazyArray`` reads as the array that it stands for, and only when it is read."""

from __future__ import annotations

import copy
import operator
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jevt
from jevt._lazy_array import Deferred, LazyArray

VALUES = {
    "scalar": jnp.float32(2.5),
    "integer": jnp.int32(3),
    "bool": jnp.array(True),
    "vector": jnp.arange(4.0),
    "matrix": jnp.arange(6, dtype=jnp.int32).reshape(2, 3),
    "half": jnp.arange(3, dtype=jnp.bfloat16),
}


def lazy_array(*values):
    """Lazy arrays of the same call, and a list with an item for each time that it was run."""
    runs = []

    def program(*operands):
        runs.append(1)
        return operands

    deferred = Deferred(program, values, lambda deleted: f"{deleted} deleted")
    arrays = [LazyArray(deferred, i, jax.typeof(x), f"result[{i}]") for i, x in enumerate(values)]
    return (*arrays, runs)


def _without_jit(x):
    with jax.disable_jit():
        return jnp.sin(x)


READS = {
    "float": (float, "scalar integer bool"),
    "int": (int, "scalar integer bool"),
    "bool": (bool, "scalar integer bool"),
    "complex": (complex, "scalar integer"),
    "index": (lambda x: [1, 2, 3, 4][x], "integer"),
    "range": (lambda x: list(range(x)), "integer"),
    "round": (round, "scalar vector"),
    "round_digits": (lambda x: round(x, 1), "scalar vector"),
    "str": (str, VALUES),
    "format": ("{:.3f}".format, "scalar"),
    "format_plain": ("{}".format, VALUES),
    "percent": (lambda x: "%.2f" % x, "scalar integer"),  # noqa: UP031
    "numpy": (np.asarray, VALUES),
    "numpy_dtype": (lambda x: np.asarray(x, np.float64), VALUES),
    "numpy_function": (np.sum, VALUES),
    "device_get": (jax.device_get, VALUES),
    "device_put": (jax.device_put, VALUES),
    "jnp": (lambda x: jnp.sin(x * 1.0), VALUES),
    "asarray": (jnp.asarray, VALUES),
    "stack": (lambda x: jnp.mean(jnp.stack([x, x])), VALUES),
    "tree": (lambda x: jax.tree.map(jnp.sum, {"a": x}), VALUES),
    "block": (lambda x: x.block_until_ready(), VALUES),
    "jax_block": (lambda x: jnp.asarray(jax.block_until_ready({"a": x})["a"]), VALUES),
    "lax": (lambda x: jax.lax.add(x, x), "scalar vector matrix"),
    "jit": (jax.jit(lambda x: x + 1), VALUES),
    "jevt": (jevt.jit(lambda x: x + 1), VALUES),
    "jit_closure": (lambda x: jax.jit(lambda y: y + x)(jnp.float32(1)), VALUES),
    "jit_lax_closure": (lambda x: jax.jit(lambda y: jax.lax.add(y, x))(jnp.float32(1)), "scalar"),
    "jit_returned": (lambda x: jax.jit(lambda: x)(), VALUES),
    "donated": (jax.jit(lambda x: x + 1, donate_argnums=0), VALUES),
    "aot": (lambda x: jax.jit(lambda x: x + 1).lower(x).compile()(x), VALUES),
    "grad": (jax.grad(lambda x: (x * x).sum()), "scalar vector"),
    "vmap": (jax.vmap(lambda x: x * 2), "vector matrix"),
    "scan": (lambda x: jax.lax.scan(lambda c, r: (c, r + 1), 0.0, x)[1], "vector matrix"),
    "cond": (lambda x: jax.lax.cond(x > 1, lambda: 1, lambda: 0), "scalar"),
    "disabled_jit": (_without_jit, VALUES),
    "abs": (abs, "scalar vector"),
    "neg": (operator.neg, "scalar vector"),
    "pos": (operator.pos, "scalar vector"),
    "invert": (operator.invert, "integer bool"),
    "len": (len, "vector matrix"),
    "iterate": (list, "vector"),
    "unpack": (lambda x: [*x], "matrix"),
    "item": (lambda x: x.item(), "scalar integer"),
    "getitem": (lambda x: x[1:], "vector matrix"),
    "contains": (lambda x: 1 in x, "vector"),
    "methods": (lambda x: x.astype(jnp.float32).mean(), VALUES),
    "attributes": (lambda x: (x.T, x.nbytes, x.at[0].set(1)), "vector matrix"),
    "devices": (lambda x: x.devices(), VALUES),
    "tolist": (lambda x: x.tolist(), VALUES),
    "dlpack": (jnp.from_dlpack, "vector matrix"),
    "copy": (lambda x: copy.deepcopy({"a": x})["a"], VALUES),
    "pickle": (lambda x: pickle.loads(pickle.dumps(x)), VALUES),
}


@pytest.mark.parametrize("name", READS)
def test_reads_as_the_array(name):
    read, of = READS[name]
    for value in of.split() if isinstance(of, str) else of:
        lazy, runs = lazy_array(VALUES[value] + 0)
        want, got = read(VALUES[value] + 0), read(lazy)
        assert runs == [1], f"{value} is computed once"
        assert type(got) is type(want)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert [x.dtype for x in jax.tree.leaves(got) if hasattr(x, "dtype")] == [
            x.dtype for x in jax.tree.leaves(want) if hasattr(x, "dtype")
        ]


OPERATORS = [
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "divmod"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
]
BITWISE = ["and_", "or_", "xor", "lshift", "rshift"]


@pytest.mark.parametrize("name", [*OPERATORS, *BITWISE, "matmul"])
def test_operators(name):
    function = divmod if name == "divmod" else getattr(operator, name)
    value = jnp.array([1, 2, 5], jnp.int32)
    numbers = [3, jnp.array([3, 1, 2]), np.array([3, 1, 2], np.int32)]
    if name == "matmul":
        numbers = numbers[1:]
    elif name in OPERATORS:
        numbers.append(2.0)
    for other in numbers:
        for swap in (False, True):
            lazy, runs = lazy_array(value)
            got = function(other, lazy) if swap else function(lazy, other)
            want = function(other, value) if swap else function(value, other)
            jax.tree.map(np.testing.assert_array_equal, got, want)
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))
            assert runs == [1]
    a, b, _ = lazy_array(value, value + 1)
    jax.tree.map(np.testing.assert_array_equal, function(a, b), function(value, value + 1))


def test_unsupported_operand():
    lazy, _ = lazy_array(jnp.float32(1))
    with pytest.raises(TypeError, match="unsupported operand|not supported"):
        lazy < "text"  # noqa: B015


def test_what_reads_nothing():
    x, y, runs = lazy_array(jnp.zeros((2, 3), jnp.int8), jnp.float32(1) * 1)
    assert (x.shape, x.dtype, x.ndim, x.size, x.weak_type) == ((2, 3), jnp.int8, 2, 6, False)
    assert repr(x) == "LazyArray(int8[2,3], not computed yet: result[0])"
    assert repr({"loss": y}) == "{'loss': LazyArray(float32[], not computed yet: result[1])}"
    assert [leaf is x for leaf in jax.tree.leaves([x, {"a": y}])] == [True, False]
    assert jax.tree.structure({"a": x}) == jax.tree.structure({"a": 0})
    assert not hasattr(x, "no_such_method") and not hasattr(x, "__cuda_array_interface__")
    assert jnp.shape(x) == (2, 3) and jnp.result_type(x) == jnp.int8
    with pytest.raises(TypeError, match="unhashable"):
        hash(x)
    assert runs == [] and not x.is_computed
    x.block_until_ready()
    assert runs == [1] and y.is_computed
    assert repr(y) == "LazyArray(Array(1., dtype=float32))"


def test_arrays_of_one_call_share_a_run():
    a, b, runs = lazy_array(jnp.float32(1), jnp.float32(2))
    assert float(a) + float(b) + float(a) == 4.0
    assert runs == [1]


def test_concurrent_reads_share_a_run():
    barrier = threading.Barrier(4)
    runs, values = [], []

    def program(x):
        runs.append(1)
        return (x + 1,)

    lazy = LazyArray(Deferred(program, [1.0], str), 0, jax.typeof(1.0), "")

    def read():
        barrier.wait()
        values.append(float(lazy))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs == [1] and values == [2.0] * 4


def test_operands_are_dropped_after_the_read():
    operand = jnp.ones(3)
    deferred = Deferred(lambda x: (x + 1,), [operand], str)
    lazy = LazyArray(deferred, 0, jax.typeof(operand), "")
    assert deferred._operands == [operand]
    lazy.block_until_ready()
    assert deferred._operands is None


def test_an_error_leaves_it_readable():
    fail = True

    def program(x):
        if fail:
            raise MemoryError
        return (x,)

    lazy = LazyArray(Deferred(program, [2.0], str), 0, jax.typeof(2.0), "")
    with pytest.raises(MemoryError):
        float(lazy)
    fail = False
    assert float(lazy) == 2.0


def test_deleted_operands():
    kept, gone = jnp.ones(2), jnp.zeros(2)
    a, b, runs = lazy_array(kept, gone)
    gone.delete()
    for _ in range(2):
        with pytest.raises(jevt.DonatedInputError, match=r"\[1\] deleted"):
            np.asarray(a)
    assert runs == [] and "not computed yet" in repr(b)


def test_reading_while_something_is_traced_computes_a_value():
    lazy, runs = lazy_array(jnp.float32(2))

    @jax.jit
    def f(x):
        assert not isinstance(lazy.value, jax.core.Tracer)
        return x * lazy

    assert f(3.0) == 6.0 and jax.vmap(lambda x: x + lazy)(jnp.zeros(2))[0] == 2.0
    assert float(lazy) == 2.0 and runs == [1]
