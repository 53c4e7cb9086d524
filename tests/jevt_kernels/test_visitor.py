"""What follows from a visitor tree without running it."""

from __future__ import annotations

import gemm_kernels
import numpy as np

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.visitor import Compute, Constant, Iota, Load, Reduce, Store

FLOAT = np.dtype("float32")
SPACE = Space((4, 8), (TileAxis("row", (0,)), TileAxis("col", (1,))))

#: x - max(x), its sum, and a row's bias.
TREE: visitor.Tree = (
    Load(0, IndexMap((8, 1))),
    Reduce("max", 0, "col", FLOAT),
    Compute("sub", (0, 1), FLOAT),
    Reduce("sum", 2, "col", FLOAT),
    Load(1, IndexMap((1, 0))),
    Constant(2.0, FLOAT),
    Compute("mul", (4, 5), FLOAT),
    Iota(IndexMap((0, 1)), FLOAT),
    Compute("add", (6, 7), FLOAT),
    Store(0, 8, IndexMap((8, 1))),
    Store(1, 3, IndexMap((1, 0))),
)


def test_dependencies() -> None:
    row, col = frozenset({"row"}), frozenset({"col"})
    assert visitor.dependencies(TREE, SPACE) == (
        *(row | col, row, row | col, row),
        *(row, frozenset(), row, col, row | col),
        *(row | col, row),
    )


def test_a_reduction_forgets_its_own_axis_only() -> None:
    tree = (Load(0, IndexMap((8, 1))), Reduce("sum", 0, "row", FLOAT))
    assert visitor.dependencies(tree, SPACE)[1] == {"col"}


def test_levels() -> None:
    assert visitor.levels(TREE) == (0, 1, 1, 2, 0, 0, 0, 0, 0, 0, 2)


def test_operands() -> None:
    assert [visitor.operands(node) for node in TREE] == [
        *((), (0,), (0, 1), (2,), (), (), (4, 5), (), (6, 7), (8,), (3,))
    ]


def test_a_product_varies_along_all_but_the_contracted_axis() -> None:
    b = gemm_kernels.tree(2, 3, 1, 5)
    lhs, rhs = b.load("mk", FLOAT), b.load("bk", FLOAT)
    value = b.contract(lhs, rhs)
    spec = b.spec("product")
    assert visitor.dependencies(spec.tree, spec.space)[value] == {"batch", "m", "n"}
    assert visitor.operands(spec.tree[value]) == (lhs, rhs)
    assert visitor.levels(spec.tree) == (0, 0, 1)


def test_of_several_products_none_varies_along_what_another_contracts() -> None:
    b = gemm_kernels.GemmTree({"m": 3, "n": 4, "k": 5, "l": 6}, m="m", n="n", k=("k", "l"))
    first = b.contract(b.load("mk", FLOAT), b.load("kn", FLOAT))
    second = b.contract(b.load("ml", FLOAT), b.load("ln", FLOAT))
    spec = b.spec("products")
    dependencies = visitor.dependencies(spec.tree, spec.space)
    assert dependencies[first] == dependencies[second] == {"batch", "m", "n"}
    assert dependencies[second - 1] == {"k1", "n"}
