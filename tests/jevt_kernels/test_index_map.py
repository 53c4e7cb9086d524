"""Spaces and index maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jevt_kernels.index_map import Digit, IndexMap, Space, TileAxis, row_major
from jevt_kernels.reference import addresses


def digits_value(digits: tuple[Digit, ...], index: np.ndarray) -> Any:
    total = np.zeros_like(index)
    for digit in digits:
        coordinate = index // digit.divisor
        if digit.modulus is not None:
            coordinate = coordinate % digit.modulus
        total = total + coordinate * digit.stride
    return total


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(sizes, st.data())
def test_digits_give_the_address(sizes: list[int], data: st.DataObject) -> None:
    """Whatever is merged: the sum of digits is the sum of strides times coordinates."""
    dense = row_major(tuple(sizes))
    strides = tuple(data.draw(st.sampled_from([step, step, 0, -step, 7])) for step in dense)
    space = Space(tuple(sizes), (TileAxis("i", tuple(range(len(sizes)))),))
    index = IndexMap(strides)
    positions = np.arange(space.size)
    expected = np.broadcast_to(addresses(index, space), sizes).reshape(-1)
    digits = index.digits(space, space.tile[0])
    np.testing.assert_array_equal(digits_value(digits, positions), expected)


@given(sizes, st.data())
def test_span_is_reached(sizes: list[int], data: st.DataObject) -> None:
    strides = tuple(data.draw(st.integers(-9, 9)) for _ in sizes)
    space = Space(tuple(sizes), (TileAxis("i", tuple(range(len(sizes)))),))
    index = IndexMap(strides, data.draw(st.integers(-5, 5)))
    reached = addresses(index, space)
    assert index.span(space) == (reached.min(), reached.max())


def test_contiguous_axes_are_one_digit() -> None:
    space = Space((8, 16, 64), (TileAxis("i", (0, 1, 2)),))
    (axis,) = space.tile
    assert IndexMap((1024, 64, 1)).digits(space, axis) == (Digit(1, None, 1),)
    assert IndexMap((0, 64, 1)).digits(space, axis) == (Digit(1, 1024, 1),)
    assert IndexMap((1024, 0, 1)).digits(space, axis) == (
        Digit(1024, None, 1024),
        Digit(1, 64, 1),
    )
    assert IndexMap((0, 0, 0)).digits(space, axis) == ()
    assert IndexMap((-1024, -64, -1)).digits(space, axis) == (Digit(1, None, -1),)


def test_permuted_axes_of_a_tile() -> None:
    space = Space((4, 6), (TileAxis("row", (1,)), TileAxis("col", (0,))))
    index = IndexMap((6, 1))
    assert index.digits(space, space.tile_axis("row")) == (Digit(1, None, 1),)
    assert index.digits(space, space.tile_axis("col")) == (Digit(1, None, 6),)
    assert space.extent(space.tile_axis("row")) == 6
    assert index.depends_on(space.tile_axis("col"))
    assert not IndexMap((0, 1)).depends_on(space.tile_axis("col"))


def test_row_major() -> None:
    assert row_major((2, 3, 4)) == (12, 4, 1)
    assert row_major(()) == ()


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"cover axes 0\.\.1 once each"):
        Space((2, 3), (TileAxis("i", (0,)),))
    with pytest.raises(ValueError, match="once each"):
        Space((2, 3), (TileAxis("i", (0, 1)), TileAxis("j", (1,))))
    with pytest.raises(KeyError, match="no tile axis 'col'"):
        Space((2,), (TileAxis("i", (0,)),)).tile_axis("col")
