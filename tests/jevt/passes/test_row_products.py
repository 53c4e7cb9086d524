"""Products of looked-up rows run as one kernel, and others stay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import sums_of_segments as sums
from sums_of_segments import EDGES, FEATURES, NODES, draw, ends

import jevt
from jevt.passes import row_products
from jevt.primitives.row_products import row_products_p
from jevt_kernels import launch


def scores(a, b, src, dst):
    return (a[src] * b[dst]).sum(1)


# A function of a, b, src and dst, and its products of rows.
PRODUCTS = {
    "sum": (scores, 1),
    "einsum": (lambda a, b, s, d: jnp.einsum("ef,ef->e", a[s], b[d]), 1),
    "vmapped dot": (lambda a, b, s, d: jax.vmap(jnp.dot)(a[s], b[d]), 1),
    "scaled": (lambda a, b, s, d: (a[s] * b[d] / 3).sum(1) * 2, 1),
    "one table": (lambda a, b, s, d: scores(a, a, s, d) + 0 * b.sum(), 1),
    "edges": (lambda a, b, s, d: (a[s] * draw(EDGES)[:, None] * -b[d]).sum(1), 1),
    "heads": (
        lambda a, b, s, d: jnp.einsum(
            "ehf,ehf->eh", a.reshape(NODES, 2, 3)[s], b.reshape(NODES, 2, 3)[d]
        ),
        1,
    ),
    "some beyond": (
        lambda a, b, s, d: (a.at[s + 3].get(mode="fill", fill_value=0) * b[d]).sum(1),
        1,
    ),
    # not along a row, of one or three rows, or of what is made of a row
    "along edges": (lambda a, b, s, d: (a[s] * b[d]).sum(0), 0),
    "everything": (lambda a, b, s, d: (a[s] * b[d]).sum(), 0),
    "one": (lambda a, b, s, d: a[s].sum(1), 0),
    "three": (lambda a, b, s, d: (a[s] * b[d] * b[s]).sum(1), 0),
    "of rows": (lambda a, b, s, d: (jnp.tanh(a[s]) * b[d]).sum(1), 0),
    "filled with NaN": (lambda a, b, s, d: (a.at[s].get(mode="fill") * b[d]).sum(1), 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    function, want = PRODUCTS[name]
    args = draw((NODES, FEATURES)), draw((NODES, FEATURES), seed=3), ends(), ends(seed=2)
    jaxpr, _ = sums.rewritten(jax.make_jaxpr(function)(*args))
    assert sum(eqn.primitive is row_products_p for eqn in jaxpr.eqns) == want
    (got,) = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)
    assert jnp.allclose(got, function(*args), rtol=1e-4, atol=1e-4)


def test_few_are_left_alone():
    args = draw((NODES, FEATURES)), draw((NODES, FEATURES)), ends(), ends(seed=2)
    before = jax.make_jaxpr(scores)(*args)
    assert row_products.run(before, 90) is before


def test_what_does_not_belong_together():
    index, table = ends(), draw((NODES, FEATURES))
    params = {"heads": 1, "dtype": jnp.float32, "fills": (False, False), "capability": 90}
    with pytest.raises(ValueError, match=r"expected indices \[E\] and \[E\].*a multiple of 1, got"):
        jax.eval_shape(lambda *a: row_products_p.bind(*a, **params), index, index[:3], table, table)


LARGE = (draw((5000, 64)), draw((5000, 64)), ends((40000,), high=5000), ends((40000,), high=5000))


@pytest.mark.cuda_lowering
def test_a_step_calls_the_kernel(monkeypatch):
    text = jevt.jit(scores).trace(*LARGE).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" in text
    assert "gather" not in text

    precompile = launch.precompile

    def refuse(spec, *rest):
        if spec.name == "row_products":
            raise RuntimeError("no registers left")
        precompile(spec, *rest)

    monkeypatch.setattr(launch, "precompile", refuse)
    with pytest.warns(jevt.JevtWarning, match="products of rows.*no registers left"):
        text = jevt.jit(scores).trace(*LARGE).lower(lowering_platforms=("cuda",)).as_text()
    assert "gather" in text


def test_the_plan_says_what_it_is():
    step = jevt.jit(scores, strict=True)
    step.trace(*LARGE).lower(lowering_platforms=("cuda",))
    assert "one call: a kernel of its own" in {g.reason for g in jevt.last_trace(step).plan.groups}
