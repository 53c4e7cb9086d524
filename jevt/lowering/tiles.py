"""Tile axes of groups without a matrix product: pointwise, rowwise and columnwise."""

from __future__ import annotations

import dataclasses
import math

from jevt.lowering.axes import Factor, flat
from jevt.lowering.errors import NotFusible
from jevt.lowering.layout import Layout, Resolved, atoms_of
from jevt_kernels import visitor


def layout(group: Resolved) -> Layout:
    """The tile axes of a group.

    Raises:
      NotFusible: its reductions or its outputs do not follow one tile.
    """
    order = group.memory_order(_ranked(group), group.live)
    directions = _directions(group, order)
    _check_reductions(group, order)
    _check_stores(group, directions)
    if directions.over:
        tiles = [("row", directions.row), ("col", directions.col)]
    else:
        tiles = _tiles(group, order)
    over: dict[int, tuple[str, ...]] = {n: (name,) for n, name in directions.over.items()}
    return Layout(directions.mainloop, tiles, over)


@dataclasses.dataclass(frozen=True)
class _Directions:
    """How reductions lie in the space.

    Attributes:
      row, col: atoms of the two tile axes; all in ``row`` where nothing is reduced.
      over: for each reduction node, the tile axis along which it runs.
    """

    row: list[Factor]
    col: list[Factor]
    over: dict[int, str]

    @property
    def mainloop(self) -> str:
        if not self.over:
            return "pointwise"
        return "columnwise" if "row" in self.over.values() else "rowwise"


def _directions(group: Resolved, order: list[Factor]) -> _Directions:
    """Reductions that include the contiguous atom run along "col", the others along "row"."""
    atoms = {r.node: frozenset(group.reduced(r)) for r in group.reductions}
    if not atoms:
        return _Directions(order, [], {})
    over = {node: "col" if order[-1] in reduced else "row" for node, reduced in atoms.items()}
    along = {
        name: {atoms[node] for node, direction in over.items() if direction == name}
        for name in ("row", "col")
    }
    if len(along["row"]) > 1 or len(along["col"]) > 1:
        raise NotFusible("reductions along different axes")
    everything = frozenset(order)
    col = next(iter(along["col"]), None)
    row = next(iter(along["row"]), everything - (col or frozenset()))
    if col is None:
        col = everything - row
    if row | col != everything or row & col:
        raise NotFusible("reductions along axes that are neither the same nor complementary")
    return _Directions([a for a in order if a in row], [a for a in order if a in col], over)


def _check_reductions(group: Resolved, order: list[Factor]) -> None:
    for reduction in group.reductions:
        own = atoms_of(flat(reduction.axes))
        if any(atom not in own for atom in order):
            raise NotFusible(
                "a reduction would be repeated along an axis that its operand does not have"
            )


def _check_stores(group: Resolved, directions: _Directions) -> None:
    row, col = set(directions.row), set(directions.col)
    for position in group.stores:
        own = set(group.strides[position])
        (operand,) = visitor.operands(group.nodes[position])
        if directions.over.get(operand) == "row":
            if own != col:
                raise NotFusible("a sum along rows does not run along exactly the other axes")
        elif not row <= own:
            raise NotFusible("an output does not run along every axis of the iteration space")
        elif not col <= own and (own & col or directions.mainloop == "columnwise"):
            raise NotFusible("an output runs along a part of the reduced axes")


def _ranked(group: Resolved) -> list[int]:
    """Stores, then loads, the largest first; loads first where one is larger than every store."""
    stores, loads = group.largest_first(group.stores), group.largest_first(group.loads)
    if loads and group.extent(loads[0]) > group.extent(stores[0]):
        return loads + stores
    return stores + loads


def _tiles(group: Resolved, kept: list[Factor]) -> list[tuple[str, list[Factor]]]:
    """Tile axes of a pointwise kernel."""
    size = math.prod(atom.size for atom in kept)
    full = [p for p in (*group.loads, *group.stores) if group.extent(p) == size]
    output = group.contiguous(group.stores[0])
    others = {group.contiguous(p) for p in full} - {output, None}
    if not others or output is None:
        return [("i", kept)]
    # Coalesce the stores along j and the first disagreeing operand along the innermost axis of i.
    other = next(atom for atom in reversed(kept) if atom in others)
    columns = _suffix(kept, output, other)
    rows = [atom for atom in kept if atom not in columns and atom is not other] + [other]
    return [("i", rows), ("j", columns)]


def _suffix(kept: list[Factor], output: Factor, other: Factor) -> list[Factor]:
    """The stores' contiguous atom with its outer neighbours, up to ``other`` or 1024 elements."""
    columns = [output]
    total = output.size
    for atom in reversed(kept[: kept.index(output)]):
        if atom is other or total * atom.size > 1024:
            break
        columns.insert(0, atom)
        total *= atom.size
    return columns
