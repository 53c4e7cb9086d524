"""Matrix products written by hand."""

from __future__ import annotations

import kernel_contract as contract
import numpy as np
import pytest

from jevt_kernels.by_hand import GemmTree
from jevt_kernels.index_map import IndexMap, TileAxis
from jevt_kernels.reference import reference
from jevt_kernels.visitor import Load

FLOAT = np.dtype("float32")


def projection() -> GemmTree:
    tree = GemmTree({"t": 6, "h": 2, "d": 3, "c": 4}, m="t", n="hd", k="c")
    product = tree.contract(tree.load("tc", FLOAT), tree.load("chd", FLOAT))
    tree.store(tree.compute("add", product, tree.load("hd", FLOAT)), "htd", FLOAT)
    return tree


def test_the_example() -> None:
    spec = projection().spec("projection")
    x, w, bias = (contract.random(t.shape, seed=i) for i, t in enumerate(spec.inputs))
    (y,) = reference(spec, x, w, bias)
    want = np.einsum("tc,chd->htd", x, w) + bias[:, None]
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_axes() -> None:
    space = projection().spec("projection").space
    assert space.sizes == (6, 2, 3, 4)
    groups = (("batch", ()), ("m", (0,)), ("n", (1, 2)), ("k", (3,)))
    assert space.tile == tuple(TileAxis(*group) for group in groups)
    tree = GemmTree({"m": 1, "n": 2, "k": 3}, m="m", n="n", k="k")
    assert tree.load("nmk", FLOAT) == 0
    assert tree.spec("x").tree == (Load(0, IndexMap((0, 3, 1))),)


def test_several_products() -> None:
    tree = GemmTree({"m": 3, "n": 2, "j": 4, "k": 5, "l": 6}, m="m", n="n", k=("jk", "l"))
    first = tree.contract(tree.load("mjk", FLOAT), tree.load("jkn", FLOAT))
    second = tree.contract(tree.load("lm", FLOAT), tree.load("ln", FLOAT))
    tree.store(tree.compute("add", first, second), "mn", FLOAT)
    spec = tree.spec("both")
    assert [(t.name, t.axes) for t in spec.space.tile[2:]] == [
        ("n", (1,)),
        ("k", (2, 3)),
        ("k1", (4,)),
    ]
    x, w, y, v = (contract.random(t.shape, seed=i) for i, t in enumerate(spec.inputs))
    (z,) = reference(spec, x, w, y, v)
    want = np.einsum("mjk,jkn->mn", x, w) + y.T @ v
    np.testing.assert_allclose(z, want, rtol=1e-5, atol=1e-5)


def test_types() -> None:
    tree = GemmTree({"m": 1, "n": 2, "k": 3}, m="m", n="n", k="k")
    value = tree.contract(tree.load("mk", "int8"), tree.load("kn", "int8"))
    assert tree.dtype(value) == "int32"
    assert tree.dtype(tree.reduce(value, "m", "max")) == "int32"
    assert tree.dtype(tree.compute("convert", value)) == FLOAT
    assert tree.dtype(tree.constant(1.0)) == FLOAT


def test_unknown_axes() -> None:
    with pytest.raises(ValueError, match="expected axes of 'thdc', got 'z'"):
        projection().load("tz", FLOAT)
