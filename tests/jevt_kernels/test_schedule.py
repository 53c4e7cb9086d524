"""The order of an epilogue's values."""

from __future__ import annotations

from collections.abc import Sequence

import gemm_kernels as gemm
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap
from jevt_kernels.mainloops import product
from jevt_kernels.mainloops.schedule import schedule
from jevt_kernels.visitor import Compute, Load, Store

FLOAT = np.dtype("float32")


def most_alive(tree: visitor.Tree, order: Sequence[int], known: frozenset[int]) -> int:
    """Values alive at once, each until its last reader, those that are known from the start."""
    rank = {position: number for number, position in enumerate(order)}
    last: dict[int, int] = {}
    for position in order:
        for operand in visitor.operands(tree[position]):
            last[operand] = max(last.get(operand, 0), rank[position])
    return max(
        sum(rank.get(p, -1) <= now < last[p] for p in last if p in known or p in rank)
        for now in range(len(order))
    )


def binary(op: str, left: int, right: int) -> Compute:
    return Compute(op, (left, right), FLOAT)


def sums_of_pairs(pairs: int) -> visitor.Tree:
    """All loads first, then the sums of pairs, then the sum of these."""
    index = IndexMap((1,))
    nodes: list[visitor.Node] = [Load(i, index) for i in range(2 * pairs)]
    total = None
    for pair in range(pairs):
        nodes.append(binary("add", 2 * pair, 2 * pair + 1))
        if total is not None:
            nodes.append(binary("add", total, len(nodes) - 1))
        total = len(nodes) - 1
    assert total is not None
    return (*nodes, Store(0, total, index))


def test_values_end_before_others_begin() -> None:
    tree = sums_of_pairs(8)
    order = schedule(tree, [len(tree) - 1], (), range(len(tree) - 1))
    assert most_alive(tree, range(len(tree)), frozenset()) == 16
    assert most_alive(tree, order, frozenset()) <= 9
    assert sorted(order) == list(range(len(tree)))


@st.composite
def trees(draw: st.DrawFn) -> visitor.Tree:
    index = IndexMap((1,))
    nodes: list[visitor.Node] = [Load(0, index)]
    for _ in range(draw(st.integers(1, 12))):
        any_node = st.integers(0, len(nodes) - 1)
        if draw(st.booleans()):
            nodes.append(binary("add", draw(any_node), draw(any_node)))
        else:
            nodes.append(Compute("neg", (draw(any_node),), FLOAT))
    ends = draw(st.lists(st.integers(0, len(nodes) - 1), min_size=1, max_size=3, unique=True))
    return (*nodes, *(Store(i, end, index) for i, end in enumerate(ends)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(trees(), st.integers(0, 2))
def test_each_follows_its_operands(tree: visitor.Tree, known: int) -> None:
    roots = [p for p, node in enumerate(tree) if isinstance(node, Store)]
    there = frozenset(range(min(known, roots[0])))
    order = schedule(tree, roots, there, range(len(tree)))
    seen = set(there)
    for position in order:
        assert set(visitor.operands(tree[position])) <= seen
        seen.add(position)
    assert set(roots) <= seen
    assert len(set(order)) == len(order) and not there.intersection(order)


def test_a_gradient_of_a_gelu_keeps_few_values() -> None:
    spec = gemm.dgrad_gelu((1, 4096, 4096, 1024))
    (at,) = (p for p, node in enumerate(spec.tree) if isinstance(node, visitor.Contract))
    known = product.parts_of(spec.tree, at)
    roots = [p for p, node in enumerate(spec.tree) if isinstance(node, Store)]
    order = schedule(spec.tree, roots, known, range(len(spec.tree)))
    rest = [p for p in range(len(spec.tree)) if p in set(order)]
    assert most_alive(spec.tree, order, known) <= most_alive(spec.tree, rest, known)
