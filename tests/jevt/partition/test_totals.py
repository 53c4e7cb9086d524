"""Sums of whole tensors that are added up: which they are, what adds them up, what they cost."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from partitions import trace

from jevt.lowering.rules import classify
from jevt.partition import fusions, totals
from jevt.partition import graph as graphs
from jevt.partition.cost import DEVICES


def found(function, *arguments):
    """The primitives of the collectors, and how many sums each of the sums is like."""
    program, _ = trace(function, *arguments)
    graph = graphs.from_jaxpr(program, classify)
    result = totals.find(graph)
    nodes = (graph.nodes[n] for n in sorted(result.collectors))
    names = [graph.jaxpr.eqns[p].primitive.name for node in nodes for p in node.eqns]
    assert all(graph.nodes[n].kind == "reduction" for n in result.alike)
    return names, sorted(result.alike.values())


def tensors(count, dtype=np.float32):
    return [np.ones((8, 4 * (k + 1)), dtype) for k in range(count)]


def squares(xs):
    return [jnp.square(x).sum() for x in xs]


def test_what_adds_up_many_sums():
    """From the first addition on."""
    names, alike = found(lambda xs: jnp.sqrt(sum(squares(xs))), tensors(8))
    assert names == ["add"] * 7 + ["sqrt"]
    assert alike == [8] * 8


def test_sums_that_do_the_same():
    """Sums of bfloat16 are of float32 before they are rounded, a maximum is something else."""
    xs, ys = tensors(8), tensors(3, jnp.bfloat16)
    names, alike = found(lambda xs, ys: sum(x.sum() for x in [*xs, *ys]) + jnp.max(xs[0]), xs, ys)
    assert set(names) == {"add", "convert_element_type"}
    assert alike == [1] + [11] * 11


@pytest.mark.parametrize(
    "function",
    [
        lambda xs: sum(squares(xs[:6])),
        lambda xs: [x / jnp.sqrt(s) for x, s in zip(xs, squares(xs), strict=True)],
        lambda xs: sum(x.sum(0)[0] for x in xs),
        lambda xs: sum(x[0, 0] for x in xs),
    ],
    ids=["few", "each its own", "of rows", "no sums"],
)
def test_what_is_no_collector(function):
    assert found(function, tensors(8)) == ([], [])


@pytest.mark.parametrize(
    "function",
    [squares, lambda xs: lax.sort(jnp.stack(squares(xs)))],
    ids=["results", "elements"],
)
def test_sums_that_nothing_adds_up(function):
    """They share launches all the same."""
    assert found(function, tensors(8)) == ([], [8] * 8)


def test_what_tensors_read_is_their_own():
    """As LAMB's ratios, of which a program may also want the mean."""

    def step(xs, ys):
        ratios = [jnp.sqrt(a / b) for a, b in zip(squares(xs), squares(ys), strict=True)]
        return [x * r for x, r in zip(xs, ratios, strict=True)], sum(ratios) / len(ratios)

    names, alike = found(step, tensors(8), tensors(8))
    assert names == ["add"] * 7 + ["mul"]
    assert alike == [], "the sums themselves are not added up"


def test_results_of_the_program_are_their_own():
    names, alike = found(
        lambda xs: ([jnp.sqrt(s) for s in squares(xs)], sum(squares(xs))), tensors(7)
    )
    assert names == ["add"] * 6
    assert alike == [7] * 7


def test_shared_launches():
    """Two of all; alone a sum is a launch like any other."""
    assert totals.launches_us(3.0, 1) == totals.launches_us(3.0, 2) == 3.0
    assert totals.launches_us(3.0, 8) == pytest.approx(6 / 8)
    assert totals.launches_us(3.0, 4000) == totals.launches_us(3.0, 400)


@pytest.mark.parametrize(("count", "kernels"), [(2, 1), (95, 1), (96, 2), (394, 5)])
def test_additions_are_a_few_kernels_of_xlas(count, kernels):
    """A fusion has a limited number of operands."""
    program, _ = trace(lambda *xs: sum(xs[1:], xs[0]), *[np.float32(k) for k in range(count)])
    device = DEVICES["H100"]
    assert fusions.xla_us(program, device, ()) == pytest.approx(
        kernels * device.xla_launch_us, rel=1e-2
    )
