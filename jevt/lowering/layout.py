"""A group whose axes are resolved to atoms, and the tile axes that a mainloop makes of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

from jevt.lowering.axes import Axes, Factor, flat
from jevt.lowering.builder import Builder, Reduction, Value
from jevt.lowering.errors import NotFusible
from jevt_kernels import visitor

type Atoms = dict[Factor, None]  # a dict: the order of a set would differ between processes


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a mainloop walks the atoms of a group.

    Attributes:
      mainloop: a key of ``jevt_kernels.mainloops.MAINLOOPS``.
      tiles: the tile axes, each with its atoms, outermost first.
      over: for each reduction node, the tile axis along which it runs, or two, one after the other.
      swapped: the operands of the matrix product change places.
    """

    mainloop: str
    tiles: list[tuple[str, list[Factor]]]
    over: dict[int, tuple[str, ...]]
    swapped: bool = False


class Resolved:
    """What a layout is chosen by: the nodes of a group and the strides of their atoms.

    Raises:
      NotFusible: two axes of one value became one.
    """

    def __init__(self, builder: Builder) -> None:
        self.nodes = builder.nodes
        self.reductions = builder.reductions
        self.contractions = builder.contractions
        _check_diagonals(builder)
        self.strides = {p: address.strides() for p, address in builder.addresses.items()}
        self.stores = [p for p, node in enumerate(self.nodes) if isinstance(node, visitor.Store)]
        self.loads = [p for p, node in enumerate(self.nodes) if isinstance(node, visitor.Load)]

    @functools.cached_property
    def live(self) -> Atoms:
        """The atoms of the space.

        Those that only a broadcast which nothing stores runs along do not belong to it.
        """
        result: Atoms = {atom: None for p in self.stores for atom in self.strides[p]}
        for reduction in self.reductions:
            result |= atoms_of(flat(reduction.axes))
        for product in self.contractions:
            for part in (product.batch, product.left, product.right, *product.contracted):
                result |= atoms_of(part)
        return result

    def reduced(self, reduction: Reduction) -> Atoms:
        return atoms_of(reduction.reduced)

    def extent(self, position: int) -> int:
        """Number of points along which the address of a node varies."""
        return math.prod(atom.size for atom, stride in self.strides[position].items() if stride)

    def largest_first(self, positions: Iterable[int]) -> list[int]:
        return sorted(positions, key=self.extent, reverse=True)

    def memory_order(self, positions: Sequence[int], atoms: Atoms) -> list[Factor]:
        """These atoms, outermost first, as the first of these nodes that has them lays them out."""
        order: Atoms = {}
        for position in positions:
            found = self.strides[position]
            fresh_atoms = [a for a in found if found[a] and a not in order and a in atoms]
            order |= dict.fromkeys(sorted(fresh_atoms, key=lambda a: -abs(found[a])))
        return list(order | atoms)

    def contiguous(self, position: int) -> Factor | None:
        """The atom along which neighbouring points are neighbouring addresses."""
        found = self.strides[position]
        return next(
            (atom for atom, stride in found.items() if abs(stride) == 1 and atom.size > 1), None
        )


def atoms_of(factors: Iterable[Factor]) -> Atoms:
    """The atoms that factors consist of, without repetition."""
    return {atom: None for factor in factors for atom in factor.atoms()}


def _check_diagonals(builder: Builder) -> None:
    """A computed value whose two axes became one would only be known on its diagonal."""
    known: dict[int, Axes] = {
        id(v.axes): v.axes for v in builder.env.values() if isinstance(v, Value)
    }
    for axes in known.values():
        atoms = [atom for factor in flat(axes) for atom in factor.atoms()]
        if len(set(atoms)) != len(atoms):
            raise NotFusible(
                "two axes of one value would share an axis of the iteration space (a diagonal)"
            )
