"""Column sums of several tensors: which are one kernel, and which are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from partitions import check_valid, context, trace

import jevt
from jevt.partition import from_json, partition, to_json
from jevt_kernels import codegen, visitor

SHAPE = (7, 300, 96)


def arrays(count, shape=SHAPE):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(np.float32) for _ in range(count)]


def plan(function, *arguments, backend="triton", **fields):
    program, consts = trace(function, *arguments)
    assert not consts
    return partition(program, context(backend, **fields))


def sums(*tensors):
    """The gradients of biases."""
    return [jnp.exp(x).sum((0, 1)) for x in tensors]


def sums_of(group):
    return sum(isinstance(node, visitor.Reduce) for node in group.spec.tree)


@pytest.mark.parametrize("backend", ["auto", "triton", "interpret"])
def test_sums_of_three_tensors_are_one_kernel(backend):
    tensors = arrays(3, (64, 512, 1024))
    found = plan(sums, *tensors, backend=backend)
    (group,) = found.groups
    assert (group.target, group.kind, group.name) == ("triton", "columnwise", "g00_columnwise")
    assert sums_of(group) == 3
    source = codegen.generate(group.spec)
    assert len({partial.programs for partial in source.partials}) == 1, "one second stage"
    alone = plan(sums, tensors[0], backend=backend).groups[0]
    assert group.predicted_us < 3 * alone.predicted_us
    check_valid(found, tensors, rtol=1e-4)


@pytest.mark.interpret
def test_values():
    tensors = arrays(3)
    compiled = jevt.jit(sums, backend="interpret")
    for got, want in zip(compiled(*tensors), jax.jit(sums)(*tensors), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert sums_of(compiled.explain(*tensors).plan.groups[0]) == 3


def test_a_plan_comes_back_from_json():
    found = plan(sums, *arrays(3))
    back = from_json(to_json(found), found.jaxpr)
    assert [g.spec for g in back.groups] == [g.spec for g in found.groups]


def test_many_tensors_are_several_kernels():
    found = plan(sums, *arrays(9))
    assert sorted(map(sums_of, found.groups)) == [3, 6]
    assert [g.name[:3] for g in found.groups] == ["g00", "g01"]


def shared_scale(scale, *tensors):
    return [jnp.exp(x * scale).sum((0, 1)) for x in tensors]


def test_a_number_may_be_shared():
    (group,) = plan(shared_scale, np.float32(3), *arrays(2)).groups
    assert len(group.spec.inputs) == 3


def other_shapes(x, y):
    return x.sum((0, 1)), y.sum((0, 1))


def other_operations(x, y):
    return x.sum((0, 1)), jnp.square(y).sum((0, 1))


def one_after_the_other(x, y):
    """The second tensor is there only when the first sum is."""
    first = jnp.exp(x).sum((0, 1))
    return first, jnp.exp(jnp.cumsum(y * first.sum(), 0)).sum((0, 1))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (other_shapes, [*arrays(1), *arrays(1, (5, 300, 96))]),
        (other_operations, arrays(2)),
        (one_after_the_other, arrays(2)),
    ],
)
def test_what_stays_apart(function, arguments):
    found = plan(function, *arguments)
    assert max(sums_of(g) for g in found.groups if g.spec is not None) == 1
    check_valid(found, arguments, rtol=1e-4)


@pytest.mark.parametrize("fields", [{"backend": "xla"}, {"platform": "cpu", "backend": "auto"}])
def test_nothing_is_joined_where_no_kernel_may_be(fields):
    assert len(plan(sums, *arrays(3), **fields).groups) == 3
