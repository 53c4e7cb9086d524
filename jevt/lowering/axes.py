"""One iteration space for a group: logical axes of all its values, refined and identified.

Every logical axis of every value is an ordered list of *factors* (outermost first). Equations
relate factors: pointwise operands share them, a transpose permutes axes, a reshape regroups them, a
broadcast adds some. Relating two lists of factors whose sizes do not match splits the larger one
(1024 against 64 becomes 16 and 64 everywhere), so that in the end the group has a set of *atoms*,
the axes of its space.

A value that only views a group input is not computed in the kernel; it is a :class:`View`, whose
factors carry strides. Slices and reversals exist for views alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jevt.lowering.errors import NotFusible
from jevt_kernels.index_map import row_major


class Factor:
    """A part of a logical axis, possibly identified with another factor or split in two."""

    __slots__ = ("inner", "outer", "same", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.same: Factor | None = None
        self.outer: Factor | None = None
        self.inner: Factor | None = None

    def find(self) -> Factor:
        factor = self
        while factor.same is not None:
            factor = factor.same
        return factor

    def atoms(self) -> list[Factor]:
        """The unsplit factors that this one consists of, outermost first."""
        root = self.find()
        if root.outer is None or root.inner is None:
            return [root]
        return root.outer.atoms() + root.inner.atoms()

    def split(self, inner: int) -> None:
        self.outer, self.inner = Factor(self.size // inner), Factor(inner)


type Axis = tuple[Factor, ...]
type Axes = tuple[Axis, ...]


def fresh(shape: Sequence[int]) -> Axes:
    """New axes for a shape; an axis of size 1 has no factor."""
    return tuple((Factor(size),) if size != 1 else () for size in shape)


def unify(left: Sequence[Factor], right: Sequence[Factor], what: str) -> None:
    """Identifies two lists of factors that run through the same positions in row-major order.

    Raises:
      NotFusible: the sizes do not factor into each other.
    """
    a = [atom for factor in left for atom in factor.atoms()]
    b = [atom for factor in right for atom in factor.atoms()]
    while a and b:
        x, y = a.pop().find(), b.pop().find()
        if x is y:
            continue
        if x.outer is not None:  # an earlier round of this loop split it
            a.extend(x.atoms())
            b.append(y)
        elif y.outer is not None:
            b.extend(y.atoms())
            a.append(x)
        elif x.size == y.size:
            x.same = y
        else:
            large, small, stack = (x, y, a) if x.size > y.size else (y, x, b)
            if small.size == 0 or large.size % small.size:
                raise NotFusible(
                    f"{what}: sizes {x.size} and {y.size} do not factor into common axes"
                )
            large.split(small.size)
            assert large.outer is not None and large.inner is not None
            large.inner.same = small
            stack.append(large.outer)
    if any(factor.size != 1 for factor in (*a, *b)):
        raise NotFusible(f"{what}: the two sides have different sizes")


def flat(axes: Axes) -> list[Factor]:
    """The factors of all axes in row-major order."""
    return [factor for axis in axes for factor in axis]


@dataclasses.dataclass(frozen=True)
class View:
    """A group input seen through views.

    Attributes:
      input: position among the group's inputs.
      axes: for each logical axis its (size, stride) parts, outermost first; parts of size 1 are
        left out.
      offset: address of the first element.
    """

    input: int
    axes: tuple[tuple[tuple[int, int], ...], ...]
    offset: int = 0

    @staticmethod
    def of(position: int, shape: tuple[int, ...]) -> View:
        strides = row_major(shape)
        return View(
            position,
            tuple(
                ((size, stride),) if size != 1 else ()
                for size, stride in zip(shape, strides, strict=True)
            ),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for size, _ in axis) for axis in self.axes)

    @property
    def dense(self) -> bool:
        """Whether this is a whole row-major array, of any shape."""
        parts = _merged([part for axis in self.axes for part in axis])
        return self.offset == 0 and (not parts or (len(parts) == 1 and parts[0][1] == 1))

    def transpose(self, permutation: Sequence[int]) -> View:
        return dataclasses.replace(self, axes=tuple(self.axes[i] for i in permutation))

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> View:
        axes: list[tuple[tuple[int, int], ...]] = [
            ((size, 0),) if size != 1 else () for size in shape
        ]
        for source, target in enumerate(dimensions):
            if self.axes[source] or shape[target] == 1:
                axes[target] = self.axes[source]
        return dataclasses.replace(self, axes=tuple(axes))

    def slice(self, starts: Sequence[int], limits: Sequence[int], steps: Sequence[int]) -> View:
        """Raises NotFusible where an axis consists of several parts and is not taken whole."""
        axes, offset = list(self.axes), self.offset
        for axis, (start, limit, step) in enumerate(zip(starts, limits, steps, strict=True)):
            size = self.shape[axis]
            if (start, limit, step) == (0, size, 1):
                continue
            stride = self._single_stride(axis, "slice")
            count = max(0, -(-(limit - start) // step))
            offset += start * stride
            axes[axis] = ((count, stride * step),) if count != 1 else ()
        return dataclasses.replace(self, axes=tuple(axes), offset=offset)

    def reverse(self, dimensions: Sequence[int]) -> View:
        axes, offset = list(self.axes), self.offset
        for axis in dimensions:
            if self.axes[axis]:
                stride = self._single_stride(axis, "rev")
                offset += (self.shape[axis] - 1) * stride
                axes[axis] = ((self.shape[axis], -stride),)
        return dataclasses.replace(self, axes=tuple(axes), offset=offset)

    def _single_stride(self, axis: int, what: str) -> int:
        parts = self.axes[axis]
        if not parts:
            return 0
        if len(parts) != 1:
            raise NotFusible(
                f"{what} of an axis that a reshape merged does not compose to an index map"
            )
        return parts[0][1]

    def reshape(self, shape: Sequence[int]) -> View:
        """Raises NotFusible where the new axes do not consist of whole parts of the old ones."""
        if 0 in shape:
            raise NotFusible("reshape of an empty array")
        parts = _merged([part for axis in self.axes for part in axis])
        axes: list[tuple[tuple[int, int], ...]] = []
        for size in reversed(shape):
            taken: list[tuple[int, int]] = []
            while size > 1:
                if not parts:
                    raise NotFusible("reshape: the two sides have different sizes")
                have, stride = parts.pop()
                if size % have == 0:
                    taken.append((have, stride))
                    size //= have
                elif have % size == 0:
                    taken.append((size, stride))
                    parts.append((have // size, stride * size))
                    size = 1
                else:
                    raise NotFusible(
                        f"reshape: sizes {have} and {size} do not factor into common axes"
                    )
            axes.append(tuple(reversed(taken)))
        return dataclasses.replace(self, axes=tuple(reversed(axes)))


def _merged(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring parts joined where they are contiguous."""
    result: list[tuple[int, int]] = []
    for size, stride in parts:
        if result and result[-1][1] == size * stride:
            result[-1] = (result[-1][0] * size, stride)
        else:
            result.append((size, stride))
    return result


@dataclasses.dataclass(frozen=True)
class Address:
    """Factors with a stride each, not yet resolved to atoms; an index map in the making."""

    parts: tuple[tuple[Factor, int], ...]
    offset: int = 0

    def strides(self) -> dict[Factor, int]:
        """Stride of each atom; raises NotFusible when two parts fall on one atom (a diagonal)."""
        result: dict[Factor, int] = {}
        for factor, stride in self.parts:
            step = stride
            for atom in reversed(factor.atoms()):
                if atom in result:
                    raise NotFusible(
                        "two axes of one array would share an axis of the iteration space "
                        "(a diagonal)"
                    )
                result[atom] = step
                step *= atom.size
        return result


def leaf(view: View) -> tuple[Axes, Address]:
    """Axes of their own for one use of a view, and its address."""
    axes: list[Axis] = []
    parts: list[tuple[Factor, int]] = []
    for axis in view.axes:
        factors = tuple(Factor(size) for size, _ in axis)
        axes.append(factors)
        parts.extend((factor, stride) for factor, (_, stride) in zip(factors, axis, strict=True))
    return tuple(axes), Address(tuple(parts), view.offset)


def dense(axes: Axes, shape: Sequence[int]) -> Address:
    """The address of a row-major array of this shape whose axes are ``axes``."""
    parts: list[tuple[Factor, int]] = []
    for axis, stride in zip(axes, row_major(tuple(shape)), strict=True):
        step = stride
        for factor in reversed(axis):
            parts.append((factor, step))
            step *= factor.size
    return Address(tuple(parts))
