"""The plan of a bottleneck: what the products that were 1×1 convolutions take along."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from partitions import context
from resnet_block import step

from jevt.partition import fallbacks, partition
from jevt.partition.plan import Group, Plan
from jevt.pipeline import graph_passes


@functools.cache
def plan() -> Plan:
    """Of ResNet-50's first strided bottleneck, as for an H100."""
    shapes = ((1, 1, 256, 128), (3, 3, 128, 128), (1, 1, 128, 512), (1, 1, 256, 512))
    params = [
        (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
            *(jax.ShapeDtypeStruct(shape[-1:], jnp.float32),) * 2,
        )
        for shape in shapes
    ]
    x = jax.ShapeDtypeStruct((128, 56, 56, 256), jnp.bfloat16)
    target = jax.ShapeDtypeStruct((128, 28, 28, 512), jnp.float32)
    jaxpr = jax.make_jaxpr(step)(params, x, target)
    for _, graph_pass in graph_passes(context()):
        jaxpr = graph_pass(jaxpr)
    return partition(jaxpr.with_consts(()), context())


def products() -> dict[str, list[Group]]:
    """The groups around products, by the shapes of their operands and their result."""
    found: dict[str, list[Group]] = {}
    for group in plan().groups:
        for eqn in group.jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "product_sum"):
                shapes = [a.aval.str_short() for a in (*eqn.invars, *eqn.outvars)]
                found.setdefault(" ".join(shapes), []).append(group)
    return found


def names(group: Group) -> list[str]:
    return [eqn.primitive.name for eqn in group.jaxpr.eqns]


def test_products_and_convolutions():
    # Three forward, six for gradients; of two norms xᵀx, its product with W, and W·Wᵀ.
    assert sum(map(len, products().values())) == 9 + 2 * 3
    assert sum("conv_general_dilated" in names(g) for g in plan().groups) == 3
    assert not fallbacks(plan())


def test_forward_product_takes_batch_norms_sums_along():
    shapes = "bfloat16[128,56,56,256] bfloat16[256,128] bfloat16[128,56,56,128]"
    (group,) = products()[shapes]
    assert group.target == "triton" and names(group).count("reduce_sum") == 2
    # The result is stored, and beside it only the sums.
    assert sorted(v.aval.ndim for v in group.jaxpr.outvars) == [1, 1, 4]


def test_where_columns_are_many_the_product_takes_normalisation_and_relu_along():
    shapes = "bfloat16[128,28,28,128] bfloat16[128,512] bfloat16[128,28,28,512]"
    (group,) = products()[shapes]
    assert group.target == "triton" and "max" in names(group)
    # The product itself is not among the results.
    assert [v.aval.shape for v in group.jaxpr.outvars if v.aval.ndim == 4] == [(128, 28, 28, 512)]


def test_the_shortcuts_gradient_is_spread_where_it_is_added():
    (group,) = products()["bfloat16[128,56,56,128] bfloat16[256,128] bfloat16[128,56,56,256]"]
    assert group.target == "triton" and "select_n" in names(group)
    small = [v.aval.shape for v in group.jaxpr.invars]
    assert (128, 28, 28, 256) in small
    assert not any("pad" in names(g) for g in plan().groups)


def test_relus_gradient_and_batch_norms_sums_follow_the_backward_product():
    (group,) = (
        g
        for shapes, groups in products().items()
        for g in groups
        if shapes.startswith("bfloat16[128,28,28,512]") and shapes.endswith("[128,28,28,128]")
    )
    assert group.target == "triton" and "product_sum" in names(group)
    assert "select_n" in names(group)
    assert names(group).count("reduce_sum") >= 2


def test_products_with_small_results_are_left_to_cublas():
    alone = [g for g in plan().groups if set(names(g)) >= {"dot_general"} and g.target == "xla"]
    assert all("a matrix product alone is cuBLAS's" in g.reason for g in alone)
    # Gradients of weights, xᵀx and W·Wᵀ.
    assert sum(g.jaxpr.outvars[0].aval.size < 2**20 for g in alone) == 3 + 2 * 2
