"""Products that share their left operand: XLA multiplies them together and adds biases apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from partitions import context, trace

from jevt.partition import partition, siblings

X, W, B = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((16384, 1024), (1024, 1024), (1024,))
)


def projections(x, *weights):
    """A product and a bias for each pair of weights."""
    return [x @ w + b for w, b in zip(weights[::2], weights[1::2], strict=True)]


def products(jaxpr):
    return [eqn.outvars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_products_of_one_left_operand_are_merged(number):
    jaxpr = trace(projections, X, *[W, B] * number)[0].jaxpr
    assert siblings.merged(jaxpr) == frozenset(products(jaxpr) if number > 1 else [])


def test_what_xla_does_not_merge():
    def function(x, w):
        y = x @ w
        return y, x.T @ y, jnp.einsum("mk,nk->mn", y, w)

    jaxpr = trace(function, X, W)[0].jaxpr
    assert len(products(jaxpr)) == 3
    assert siblings.merged(jaxpr) == frozenset()


def test_a_bias_is_fused_where_xla_would_add_it_apart():
    alone, together = (
        partition(trace(projections, X, *[W, B] * number)[0], context("auto")) for number in (1, 3)
    )
    assert [group.target for group in alone.groups] == ["xla"]
    assert [(g.kind, g.target) for g in together.groups] == [("gemm", "triton")] * 3
    for group in together.groups:
        assert group.predicted_us < group.xla_us
        assert group.xla_us > alone.groups[0].xla_us
    total = sum(group.predicted_us for group in together.groups)
    assert total == pytest.approx(together.solution.objective_us, rel=1e-4)
