"""Why two groups are not one, in the words of what decided it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from partitions import context, trace

from jevt.lowering.errors import NotFusible
from jevt.lowering.spec import build
from jevt.partition import partition
from jevt.partition.neighbours import neighbours

X = np.zeros((64, 96), np.float32)


def reasons(function, *arguments, backend="triton", **options):
    """The reason of each cut edge, by the names' kinds: ("pointwise", "rowwise") -> text."""
    plan = partition(trace(function, *arguments)[0], context(backend), **options)
    edges = neighbours(plan, **options)
    kinds = [g.kind for g in plan.groups]
    assert len({(e.writer, e.reader) for e in edges}) == len(edges)
    return plan, {(kinds[e.writer], kinds[e.reader]): e for e in edges}


def test_a_running_sum_is_no_part_of_a_group():
    plan, found = reasons(lambda x: jnp.sin(lax.cumsum(x)) * 2, X)
    edge = found["opaque", "pointwise"]
    assert "is left to XLA: no mainloop: cumsum" in edge.reason
    assert edge.nbytes == 64 * 96 * 4
    assert plan.groups[edge.writer].name in edge.reason


def test_a_refusal_is_told_in_the_words_of_build():
    def function(x):
        return jax.nn.softmax(jax.nn.softmax(x, axis=1).reshape(64 * 96 // 8, 8), axis=1)

    _, found = reasons(function, X)
    assert found["rowwise", "rowwise"].reason.startswith("not one kernel: ")
    jaxpr, _ = trace(function, X)
    with pytest.raises(NotFusible) as refusal:
        build(jaxpr, "all")
    assert found["rowwise", "rowwise"].reason.endswith(str(refusal.value))


def test_what_lies_between_would_have_to_run_inside():
    def function(x):
        a = jnp.sin(x) * 2
        (b,) = lax.optimization_barrier((a,))
        return a + b

    plan, found = reasons(function, X)
    barrier = next(g.name for g in plan.groups if g.reason.startswith("barrier"))
    assert found["pointwise", "pointwise"].reason == (f"{barrier} has to run between them")


def test_times_are_told_where_a_kernel_would_be_possible():
    def pairs(jaxpr, name):
        if len(jaxpr.eqns) == 3:
            raise NotFusible("three equations")
        return build(jaxpr, name)

    def function(x):
        return jnp.sin(jnp.cos(jnp.tan(lax.cumsum(x))) + 1)

    plan, _ = reasons(function, X, build=pairs)
    whole = next(g for g in plan.groups if len(g.eqns) == 4)
    # A plan that cuts where nothing forces it to: by hand.
    halves = [
        dataclasses.replace(whole, name=f"half{i}", eqns=whole.eqns[2 * i : 2 * i + 2])
        for i in range(2)
    ]
    others = [g for g in plan.groups if g is not whole]
    cut = dataclasses.replace(plan, groups=(*others, *halves))
    (edge,) = (e for e in neighbours(cut, build=pairs) if e.writer == len(others))
    one, two = whole.predicted_us, 2 * whole.predicted_us
    assert edge.reason.startswith(f"{one:.1f} µs together, {two:.1f} µs apart")


def test_a_plan_without_its_circumstances_is_refused():
    plan = dataclasses.replace(partition(trace(jnp.sin, X)[0], context()), context=None)
    with pytest.raises(ValueError, match="expected a plan of jevt.partition.partition"):
        neighbours(plan)
