from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import check_jaxpr, jaxpr_as_fun
from programs import PROGRAMS, close
from rewriting import text

import jevt
from jevt.passes import dce, lazy_outputs

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


def trace(fun, *args):
    return jax.make_jaxpr(fun)(*args)


def primitives(jaxpr):
    return [e.primitive.name for e in jaxpr.eqns]


def test_what_only_marked_outputs_need_goes():
    split = lazy_outputs.split(trace(lambda x: (jnp.cos(x), jevt.lazy(jnp.sin(x).sum())), X))
    assert primitives(split.step) == ["cos"]
    assert primitives(split.rest) == ["sin", "reduce_sum"]
    assert split.lazy == (1,)


def test_before_and_after(golden):
    """The loss of a regression; its gradient needs the differences and nothing after them."""

    def loss(w, x, y):
        return jevt.lazy(jnp.sum((x @ w - y) ** 2))

    jaxpr = dce.run(trace(jax.value_and_grad(loss), np.ones((3, 4), np.float32), X, X @ X.T[:, :1]))
    split = lazy_outputs.split(jaxpr)
    parts = {"before": jaxpr, "step": split.step, "rest": split.rest}
    golden(
        "passes/lazy_outputs.txt",
        "regression\n" + "".join(f"  {name}\n{text(part)}\n" for name, part in parts.items()),
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_preserved_and_every_output_is_in_one_of_both(name):
    fun, args = PROGRAMS[name]

    def marked(*args):
        leaves, tree = jax.tree.flatten(fun(*args))
        leaves = [x if i % 2 else jevt.lazy(x) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(tree, leaves)

    split = lazy_outputs.split(trace(marked, *args))
    for part in (split.step, split.rest):
        check_jaxpr(part)
        assert len(part.invars) == len(jax.tree.leaves(args))
    assert not split.rest.effects
    leaves = jax.tree.leaves(args)
    computed = iter(jaxpr_as_fun(split.step)(*leaves))
    later = iter(jaxpr_as_fun(split.rest)(*leaves))
    want = jax.tree.leaves(fun(*args))
    merged = [next(later if i in split.lazy else computed) for i in range(len(want))]
    assert [*computed, *later] == []
    close(merged, want)


def test_second_split_has_nothing_to_do():
    split = lazy_outputs.split(trace(lambda x: (x * 2, jevt.lazy(jnp.sin(x))), X))
    for part in (split.step, split.rest):
        again = lazy_outputs.split(part)
        assert again.lazy == () and str(again.step) == str(part) and again.rest.eqns == []


def test_nothing_marked():
    split = lazy_outputs.split(trace(lambda x: (x * 2, jnp.sin(x)), X))
    assert split.lazy == () and primitives(split.step) == ["mul", "sin"]


def test_shared_equations_stay():
    """Of a loss whose gradient needs the exponentials, the sum and the logarithm go."""

    def f(x):
        e = jnp.exp(x)
        return e * 2.0, jevt.lazy(jnp.log(e.sum()))

    split = lazy_outputs.split(trace(f, X))
    assert primitives(split.step) == ["exp", "mul"]
    assert primitives(split.rest) == ["exp", "reduce_sum", "log"]


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (lambda x: (jnp.sin(x) * 2, jevt.lazy(jnp.sin(x))), ()),  # equal to what is needed
        (lambda x: (jevt.lazy(x), jnp.sin(x)), ()),  # an input
        (lambda x: (jevt.lazy(jnp.float32(3)), jnp.sin(x)), ()),  # known
        (lambda x: (lambda y: (jevt.lazy(y), y))(jnp.sin(x)), ()),  # returned unmarked too
        (lambda x: (lambda y: (jevt.lazy(y), jevt.lazy(y)))(jnp.sin(x)), (0, 1)),
        (lambda x: jevt.lazy(jevt.lazy(jnp.sin(x))), (0,)),
        (lambda x: lax.stop_gradient(jevt.lazy(jnp.sin(x))), (0,)),
        (lambda x: jevt.lazy({"a": jnp.sin(x), "b": (jnp.cos(x), None)}), (0, 1)),
    ],
)
def test_which_outputs_are_lazy(fun, expected):
    assert lazy_outputs.split(trace(fun, X)).lazy == expected


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: jevt.lazy(x.sum()) * 2,
        lambda x: jevt.lazy(x.sum()).astype(jnp.int32),
        lambda x: lax.scan(lambda c, r: (c, jevt.lazy(jnp.sin(r))), 0.0, x)[1],
        lambda x: lax.cond(x[0, 0] > 0, lambda: jevt.lazy(jnp.sin(x)), lambda: x),
        lambda x: lax.fori_loop(0, 3, lambda i, c: jevt.lazy(c * 2), x),
    ],
    ids=["arithmetic", "cast", "scan", "cond", "loop"],
)
def test_a_mark_that_is_not_at_an_output_is_no_mark(fun):
    jaxpr = trace(fun, X)
    split = lazy_outputs.split(jaxpr)
    assert split.lazy == () and "lazy" not in str(split.step)
    close(jaxpr_as_fun(split.step)(X), jaxpr_as_fun(jaxpr)(X))


def mean(x):
    return jevt.lazy(jnp.sin(x).mean())


@pytest.mark.parametrize(
    "fun",
    [
        jax.jit(mean),
        jax.jit(jax.jit(mean)),
        jevt.jit(mean),
        jax.checkpoint(mean),
        lambda x: jax.value_and_grad(mean)(x)[0],
        lambda x: jax.value_and_grad(jax.jit(jax.checkpoint(mean)))(x)[0],
        lambda x: jax.value_and_grad(lambda x: (x.sum(), mean(x)), has_aux=True)(x)[0][1],
        lambda x: jax.jit(lambda x, y: y)(x, mean(x)),
        jax.vmap(mean),
        lambda x: jax.jvp(mean, (x,), (x,))[0],
    ],
)
def test_marks_are_seen_through_calls_and_transformations(fun):
    assert lazy_outputs.marked(trace(fun, X)) == (True,)
    assert lazy_outputs.split(trace(fun, X)).lazy == (0,)


def test_derivatives_are_not_marked():
    assert lazy_outputs.marked(trace(jax.value_and_grad(mean), X)) == (True, False)


def test_loops_lose_what_only_lazy_outputs_need():
    def f(x):
        def body(carry, row):
            total, loss = carry
            return (total + row, loss + jnp.sin(row).sum()), jnp.cos(row)

        (total, loss), cosines = lax.scan(body, (jnp.zeros(3), 0.0), x)
        return total, jevt.lazy((loss, cosines.mean()))

    split = lazy_outputs.split(trace(f, X))
    assert "sin" not in str(split.step) and "cos" not in str(split.step)
    assert "sin" in str(split.rest) and "cos" in str(split.rest)


def test_effects_happen_once():
    """Equations with effects stay in the step, and nothing that depends on them is put off."""

    def callback(x):
        return jax.experimental.io_callback(lambda v: v, jax.ShapeDtypeStruct((), jnp.float32), x)

    def f(x):
        jax.debug.print("{}", x.sum())
        y = callback(x.sum())
        return jevt.lazy((x.sum() * 2, y * 2)), x

    split = lazy_outputs.split(trace(f, X))
    assert split.lazy == (0,)
    assert list(split.effectful) == [1] and split.effectful[1].primitive.name == "io_callback"
    assert primitives(split.rest) == ["reduce_sum", "mul"]
    assert {"debug_print", "io_callback"} <= {
        n.replace("debug_callback", "debug_print") for n in primitives(split.step)
    }


def test_constants_of_calls_are_constants_of_both():
    table = jnp.arange(3.0)
    call = jax.jit(lambda x: (x * table, jevt.lazy((x + table).sum())))
    split = lazy_outputs.split(trace(call, X))
    assert split.step.consts[0] is table and split.rest.consts[0] is table
