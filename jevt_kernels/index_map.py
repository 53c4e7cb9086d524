"""Iteration spaces and index maps: how a kernel's tile coordinates address a tensor's elements."""

from __future__ import annotations

import dataclasses
import math
import string


@dataclasses.dataclass(frozen=True)
class TileAxis:
    """One dimension of the tile.

    Attributes:
      name: how generated code calls it: ``"i"``, ``"row"``, ``"col"``, ``"m"``, ``"n"``.
      axes: positions in :attr:`Space.sizes`, outermost first. The tile axis is walked by a linear
        index in ``[0, prod(sizes of axes))`` whose mixed-radix digits are the coordinates.
    """

    name: str
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Space:
    """The iteration space of a kernel: static axis sizes and their grouping into tile axes.

    Every axis belongs to exactly one tile axis.
    """

    sizes: tuple[int, ...]
    tile: tuple[TileAxis, ...]

    def __post_init__(self) -> None:
        covered = sorted(axis for tile_axis in self.tile for axis in tile_axis.axes)
        if covered != list(range(len(self.sizes))):
            raise ValueError(
                f"expected the tile axes to cover axes 0..{len(self.sizes) - 1} once each, "
                f"got {self.tile}"
            )

    def extent(self, tile_axis: TileAxis) -> int:
        """Number of positions of the tile axis's linear index."""
        return math.prod(self.sizes[axis] for axis in tile_axis.axes)

    def tile_axis(self, name: str) -> TileAxis:
        for candidate in self.tile:
            if candidate.name == name:
                return candidate
        raise KeyError(f"no tile axis {name!r}; this space has {[t.name for t in self.tile]}")

    @property
    def size(self) -> int:
        """Number of points."""
        return math.prod(self.sizes)


def block_axis(name: str) -> str:
    """The tile axis whose tile size an axis has.

    Each its own, but the contracted axes of products that are added up ("k", "k1", "k2", …) "k"'s.
    """
    return name.rstrip(string.digits)


@dataclasses.dataclass(frozen=True)
class Digit:
    """``(index // divisor) % modulus * stride``: one term of an address along a tile axis.

    ``modulus`` is None where the division alone is exact (the outermost digit).
    """

    divisor: int
    modulus: int | None
    stride: int


@dataclasses.dataclass(frozen=True)
class IndexMap:
    """``offset + sum(stride[a] * coordinate[a])``, in elements.

    Attributes:
      strides: one entry for each axis of the space; 0 means that the value does not depend on it.
      offset: address of the point with all coordinates 0.
    """

    strides: tuple[int, ...]
    offset: int = 0

    def depends_on(self, tile_axis: TileAxis) -> bool:
        return any(self.strides[axis] for axis in tile_axis.axes)

    def digits(self, space: Space, tile_axis: TileAxis) -> tuple[Digit, ...]:
        """The address terms along one tile axis, merged where neighbouring axes are contiguous."""
        merged: list[tuple[int, int]] = []  # (size, stride), outermost first
        for axis in tile_axis.axes:
            size, stride = space.sizes[axis], self.strides[axis]
            if size == 1:
                continue
            if merged and merged[-1][1] == size * stride:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        digits: list[Digit] = []
        divisor = 1
        for position in reversed(range(len(merged))):
            size, stride = merged[position]
            if stride:
                digits.append(Digit(divisor, size if position else None, stride))
            divisor *= size
        return tuple(reversed(digits))

    def span(self, space: Space) -> tuple[int, int]:
        """Smallest and largest address reached from a non-empty space."""
        reach = [
            stride * (size - 1) for stride, size in zip(self.strides, space.sizes, strict=True)
        ]
        return (
            self.offset + sum(r for r in reach if r < 0),
            self.offset + sum(r for r in reach if r > 0),
        )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Element strides of a dense row-major array."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
