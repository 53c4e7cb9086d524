"""Tile axes of a group around a matrix product.

The product's own axes are the space: ``batch`` and ``k``, which both operands have, ``m`` of the
left one and ``n`` of the right one; each product of a sum has a ``k`` of its own. What operands are
made of is the prologue and runs along ``k``; everything else is the epilogue and runs along the
other three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set

from jevt.lowering.axes import Factor, flat
from jevt.lowering.errors import NotFusible
from jevt.lowering.layout import Atoms, Layout, Resolved, atoms_of
from jevt_kernels import visitor


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The atoms of each tile axis, of each product's own ``k``.

    ``swapped`` if ``m`` is the right operand's.
    """

    batch: Atoms
    m: Atoms
    n: Atoms
    k: tuple[Atoms, ...]
    swapped: bool = False


def layout(group: Resolved) -> Layout:
    """The tile axes of a group.

    Raises:
      NotFusible: there are several products, or something in the group follows neither the tile of
        the operands nor that of the product.
    """
    products = _products(group)
    cones = (
        _cone(group, [product.lhs for product in products]),
        _cone(group, [product.rhs for product in products]),
    )
    if any(isinstance(group.nodes[p], visitor.Reduce) for cone in cones for p in cone):
        raise NotFusible("a reduction before a matrix product")
    axes = _axes(group, cones)
    over = _directions(group, axes)
    _check_stores(group, axes, over)
    left, right = reversed(cones) if axes.swapped else cones
    stores = group.largest_first(group.stores)
    lhs, rhs = (group.largest_first(p for p in group.loads if p in cone) for cone in (left, right))
    n = group.memory_order([*rhs, *stores], axes.n)
    last = _last(group)
    if last in axes.n:
        n = [atom for atom in n if atom is not last] + [last]
    tiles = [
        ("batch", group.memory_order(stores, axes.batch)),
        ("m", group.memory_order([*lhs, *stores], axes.m)),
        ("n", n),
    ]
    along = group.largest_first([*lhs, *rhs])
    tiles += [
        (product.over, group.memory_order(along, k))
        for product, k in zip(products, axes.k, strict=True)
    ]
    return Layout("gemm", tiles, over, axes.swapped)


def _products(group: Resolved) -> list[visitor.Contract]:
    if len(group.contractions) > 1:
        raise NotFusible("several matrix products")
    nodes = [group.nodes[position] for position in group.contractions[0].terms]
    return [node for node in nodes if isinstance(node, visitor.Contract)]


def _cone(group: Resolved, positions: Sequence[int]) -> set[int]:
    """The nodes and all that they are made of."""
    return set(visitor.ancestors(group.nodes, *positions))


def _axes(group: Resolved, cones: tuple[set[int], set[int]]) -> _Axes:
    (product,) = group.contractions
    parts = [
        atoms_of(part) for part in (product.batch, product.left, product.right, *product.contracted)
    ]
    together = {atom: None for part in parts for atom in part}
    if len(together) < sum(map(len, parts)):
        raise NotFusible("two axes of a matrix product would be one (a diagonal)")
    if any(atom not in together for atom in group.live):
        raise NotFusible("a value runs along an axis that the matrix product does not have")
    batch, left, right, *contracted = parts
    # An operand that all of a batch share makes it rows, or columns, of one larger product.
    varying = [_varying(group, cone) for cone in cones]
    rows = {atom: None for atom in batch if atom not in varying[1]}
    columns = {atom: None for atom in batch if atom not in varying[0] and atom not in rows}
    batch = {atom: None for atom in batch if atom not in rows and atom not in columns}
    left, right = rows | left, columns | right
    if _last(group) in left:
        return _Axes(batch, right, left, tuple(contracted), swapped=True)
    return _Axes(batch, left, right, tuple(contracted))


def _last(group: Resolved) -> Factor | None:
    """The atom along which tiles are stored contiguously: it is to be the last one of ``n``."""
    reduced = {reduction.node for reduction in group.reductions}
    tiles = [p for p in group.stores if reduced.isdisjoint(visitor.operands(group.nodes[p]))]
    return group.contiguous(group.largest_first(tiles)[0]) if tiles else None


def _varying(group: Resolved, cone: set[int]) -> set[Factor]:
    return {a for p in cone for a, stride in group.strides.get(p, {}).items() if stride}


def _directions(group: Resolved, axes: _Axes) -> dict[int, tuple[str, ...]]:
    """For each reduction, the tile axes along which it runs."""
    over: dict[int, tuple[str, ...]] = {}
    for reduction in group.reductions:
        reduced, own = group.reduced(reduction).keys(), atoms_of(flat(reduction.axes)).keys()
        if own != _tile(axes):
            raise NotFusible("a reduction of something else than the matrix product's tile")
        if reduced == axes.m.keys() | axes.n.keys():
            over[reduction.node] = tuple(name for name in ("n", "m") if getattr(axes, name))
        elif reduced in (axes.m.keys(), axes.n.keys()):
            over[reduction.node] = ("m",) if reduced == axes.m.keys() else ("n",)
        else:
            raise NotFusible("a reduction along a part of the product's rows or columns")
    for node in group.nodes:
        if not isinstance(node, visitor.Store) and not over.keys().isdisjoint(
            visitor.operands(node)
        ):
            raise NotFusible("a value is read after a reduction of a matrix product's tile")
    return over


def _check_stores(group: Resolved, axes: _Axes, over: dict[int, tuple[str, ...]]) -> None:
    for position in group.stores:
        own = group.strides[position].keys()
        (operand,) = visitor.operands(group.nodes[position])
        lost = {atom for name in over.get(operand, ()) for atom in getattr(axes, name)}
        if any(not own.isdisjoint(k) for k in axes.k):
            raise NotFusible("a value along the contracted axes is needed outside")
        if own != _tile(axes) - lost:
            raise NotFusible("an output does not run along every axis of the matrix product")


def _tile(axes: _Axes) -> Set[Factor]:
    return axes.batch.keys() | axes.m.keys() | axes.n.keys()
