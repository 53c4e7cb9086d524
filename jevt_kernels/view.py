"""The tile that values are printed for: which axes are its dimensions, what they are called.

Most kernels have one. A matrix product has three, (m, k), (k, n) and (m, n), and a value that does
not vary along all of a tile's axes has another shape in each.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension of a tile.

    Attributes:
      name: of the tile axis.
      variable: that holds the linear index along it; its mask is ``<variable>_ok``.
      size: number of elements, as text.
    """

    name: str
    variable: str
    size: str


@dataclasses.dataclass(frozen=True)
class View:
    """A tile.

    Attributes:
      dimensions: of the tile, in order. A tile axis of the space that is not among them is a
        scalar in each program.
      prefix: first letter of the names of values.
      layout: in Gluon: the name of the layout of the tile's values, "" where the compiler chooses.
    """

    dimensions: tuple[Dimension, ...]
    prefix: str = "v"
    layout: str = ""

    def in_layout(self, layout: str) -> View:
        """The same tile with its values in a layout."""
        return dataclasses.replace(self, layout=layout)

    def find(self, name: str) -> Dimension | None:
        """The dimension of a tile axis, None if that is a scalar."""
        return next((d for d in self.dimensions if d.name == name), None)

    def position(self, name: str) -> int:
        """The dimension's number."""
        return [d.name for d in self.dimensions].index(name)

    def variable(self, name: str) -> str:
        """What holds the linear index along a tile axis."""
        dimension = self.find(name)
        return name if dimension is None else dimension.variable

    def slot(self, name: str) -> str:
        """The subscript that puts a one-dimensional range at its place in the tile."""
        if len(self.dimensions) == 1:
            return ""
        return "[" + ", ".join(":" if d.name == name else "None" for d in self.dimensions) + "]"

    def lanes(self, name: str) -> str:
        """The positions in the tile along a dimension, at their place in the tile."""
        dimension = self.find(name)
        assert dimension is not None
        if not self.layout:
            return f"tl.arange(0, {dimension.size}){self.slot(name)}"
        (other,) = (d for d in range(len(self.dimensions)) if d != self.position(name))
        sliced = f"gl.SliceLayout({other}, {self.layout})"
        return f"gl.arange(0, {dimension.size}, {sliced}){self.slot(name)}"

    def full(self, shape: str, number: str, dtype: str) -> str:
        """A tile of one number, as an expression."""
        if self.layout:
            return f"gl.full({shape}, {number}, {dtype}, {self.layout})"
        return f"tl.full({shape}, {number}, {dtype})"

    def shape(self, names: frozenset[str] = frozenset()) -> str:
        """The shape of a value that varies along these tile axes."""
        sizes = [d.size if d.name in names else "1" for d in self.dimensions]
        return "(" + ", ".join(sizes) + ("," if len(sizes) == 1 else "") + ")"

    @property
    def names(self) -> frozenset[str]:
        """The tile axes that are dimensions."""
        return frozenset(d.name for d in self.dimensions)


def dimension(name: str, variable: str = "", size: str = "") -> Dimension:
    """A dimension with the usual names."""
    return Dimension(name, variable or name, size or f"BLOCK_{name.upper()}")
