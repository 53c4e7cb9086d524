"""The usual losses: no sum is left that the algebra gives, and the values stay."""

from __future__ import annotations

import jax
import pytest
from losses import LOSSES
from rewriting import ALGEBRA, count, evaluate, near, rewritten, traced

import jevt
from jevt.passes import lazy_outputs


def reductions(jaxpr):
    return count(jaxpr, "reduce_sum"), count(jaxpr, "reduce_max")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_and_gradient(name, dtype):
    loss = LOSSES[name]
    with jax.enable_x64(dtype == "float64"):
        args = loss.arguments(dtype)
        jaxpr = traced(jax.value_and_grad(loss.function), *args)
        result = rewritten(ALGEBRA, jaxpr)
        assert reductions(result) == (loss.sums, loss.maxima)
        assert count(result, "gather") == count(result, "scatter-add") == 0
        got, want = (evaluate(j, *args, compiled=True) for j in (result, jaxpr))
        near(got, want, 3e-6 if dtype == "float32" else 1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_lazy_loss_leaves_its_gradient_alone(name):
    """What is left of a step with a lazy loss is what is left of ``jax.grad``."""
    loss = LOSSES[name]

    def step(*args):
        value, gradient = jax.value_and_grad(loss.function)(*args)
        return jevt.lazy(value), gradient

    args = loss.arguments()
    split = lazy_outputs.split(jax.make_jaxpr(step)(*args))
    assert split.lazy == (0,)
    lazy, alone = (
        rewritten(ALGEBRA, traced(fun, *args))
        for fun in (lambda *a: evaluate(split.step, *a), jax.grad(loss.function))
    )
    assert reductions(lazy) == reductions(alone) == (loss.gradient_sums, loss.maxima)
    assert [e.primitive for e in lazy.eqns] == [e.primitive for e in alone.eqns]
    later, now = jax.jit(lambda *a: (evaluate(split.rest, *a), [loss.function(*a)]))(*args)
    near(later, now, 1e-6)
