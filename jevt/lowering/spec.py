"""From a group's jaxpr to its :class:`~jevt_kernels.spec.KernelSpec`.

This file alone decides whether a set of equations can be one kernel. It goes through the equations
once, relating axes (``lowering.axes``) and collecting visitor nodes; then it resolves axes to the
atoms of one iteration space, picks the mainloop, and checks that every output follows it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jevt._jaxpr import aval
from jevt.lowering import rules
from jevt.lowering.axes import Address, Axes, Factor, View, dense, flat, fresh, leaf, unify
from jevt.lowering.errors import NotFusible
from jevt_kernels import codegen, visitor
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.spec import KernelSpec, TensorType, UnsupportedKernel

#: Operands of one kernel; CUDA allows 4 KiB of parameters, and registers hold a pointer each.
MAX_OPERANDS = 64


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value computed in the kernel: its node, and the factors of its logical axes."""

    node: int
    axes: Axes


class _Builder:
    """Nodes and relations of one group, in the order of its equations."""

    def __init__(self, jaxpr: Jaxpr, *, shared: bool) -> None:
        self.jaxpr = jaxpr
        self.shared = shared
        self.loads: dict[View | tuple[int, int], _Value] = {}
        self.env: dict[Var, _Value | View] = {
            var: View.of(i, tuple(aval(var).shape)) for i, var in enumerate(jaxpr.invars)
        }
        # Nodes whose index maps are still addresses (loads, iotas, stores) keep them beside.
        self.nodes: list[visitor.Node] = []
        self.addresses: dict[int, Address] = {}
        self.reductions: list[
            tuple[list[Factor], Axes, int]
        ] = []  # reduced factors, operand's axes, node

    def add(self, node: visitor.Node, address: Address | None = None) -> int:
        self.nodes.append(node)
        if address is not None:
            self.addresses[len(self.nodes) - 1] = address
        return len(self.nodes) - 1

    def operand(self, atom: Var | Literal) -> _Value:
        """The value of an operand, loaded for this use if it views a group input."""
        if isinstance(atom, Literal):
            return self._literal(atom)
        value = self.env[atom]
        return self._load(value) if isinstance(value, View) else value

    def _load(self, view: View) -> _Value:
        """A load, one for each use of a view.

        With ``shared``, uses of one view run along the same axes, and so do dense views of one
        input.
        """
        if self.shared and view in self.loads:
            return self.loads[view]
        axes, address = leaf(view)
        value = _Value(self.add(visitor.Load(view.input, IndexMap(())), address), axes)
        if self.shared:
            self.loads[view] = value
            if view.dense:
                first = self.loads.setdefault((view.input, math.prod(view.shape)), value)
                unify(flat(first.axes), flat(axes), "views of one operand")
        return value

    def _literal(self, atom: Literal) -> _Value:
        value = np.asarray(atom.val)
        if value.ndim:
            raise NotFusible("a literal array is not a scalar")
        return _Value(self.add(visitor.Constant(value.item(), np.dtype(aval(atom).dtype))), ())

    def equation(self, eqn: JaxprEqn) -> None:
        role = rules.classify(eqn)
        if role.kind == "view":
            self._view(eqn)
        elif role.kind == "reduction":
            self._reduction(eqn, role.axes)
        elif role.kind == "source":
            self._source(eqn)
        else:
            self._pointwise(eqn)

    def _pointwise(self, eqn: JaxprEqn) -> None:
        operation = rules.POINTWISE[eqn.primitive](eqn)
        if operation.op == "copy":
            self.env[eqn.outvars[0]] = self.operand(eqn.invars[0])
            return
        shape = tuple(aval(eqn.outvars[0]).shape)
        axes = fresh(shape)
        operands = [self.operand(atom) for atom in eqn.invars]
        for operand in operands:
            if operand.axes:  # scalars broadcast
                self._broadcast_into(operand.axes, axes, eqn)
        inputs = [operand.node for operand in operands]
        inputs += [self.add(visitor.Constant(c, np.dtype("int32"))) for c in operation.constants]
        for result, var in enumerate(eqn.outvars):
            node = visitor.Compute(operation.op, tuple(inputs), np.dtype(aval(var).dtype), result)
            self.env[var] = _Value(self.add(node), axes)

    @staticmethod
    def _broadcast_into(source: Axes, target: Axes, eqn: JaxprEqn) -> None:
        for mine, theirs in zip(source, target, strict=True):
            if mine:  # an axis of size 1 broadcasts
                unify(mine, theirs, eqn.primitive.name)

    def _reduction(self, eqn: JaxprEqn, reduced: Sequence[int]) -> None:
        operand = self.operand(eqn.invars[0])
        kept = tuple(axis for i, axis in enumerate(operand.axes) if i not in reduced)
        dtype = np.dtype(aval(eqn.outvars[0]).dtype)
        factors = [factor for i in reduced for factor in operand.axes[i]]
        if not factors:  # only axes of size 1: the value itself
            node = self.add(visitor.Compute("convert", (operand.node,), dtype))
        else:
            node = self.add(
                visitor.Reduce(rules.REDUCTIONS[eqn.primitive], operand.node, "col", dtype)
            )
            self.reductions.append((factors, operand.axes, node))
        self.env[eqn.outvars[0]] = _Value(node, kept)

    def _source(self, eqn: JaxprEqn) -> None:
        shape = tuple(aval(eqn.outvars[0]).shape)
        axes = fresh(shape)
        if rules.SOURCES[eqn.primitive] == "iota":
            dimension = eqn.params["dimension"]
            address = dense((axes[dimension],), (shape[dimension],))
            node = self.add(
                visitor.Iota(IndexMap(()), np.dtype(aval(eqn.outvars[0]).dtype)), address
            )
            self.env[eqn.outvars[0]] = _Value(node, axes)
        else:
            uint32 = np.dtype("uint32")
            high = self.add(visitor.Constant(0, uint32))
            low = self.add(visitor.Iota(IndexMap(()), uint32), dense(axes, shape))
            self.env[eqn.outvars[0]] = _Value(high, axes)
            self.env[eqn.outvars[1]] = _Value(low, axes)

    def _view(self, eqn: JaxprEqn) -> None:
        (out,) = eqn.outvars
        atom = eqn.invars[0]
        if len(eqn.invars) > 1:
            raise NotFusible(f"{eqn.primitive.name} with a dynamic shape")
        value = self._literal(atom) if isinstance(atom, Literal) else self.env[atom]
        name = rules.VIEWS[eqn.primitive]
        if isinstance(value, View):
            self.env[out] = _VIEW_OF_INPUT[name](value, eqn)
        else:
            axes = _VIEW_OF_VALUE[name](value.axes, eqn)
            self.env[out] = _Value(value.node, axes)


def _slice_bounds(eqn: JaxprEqn) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    starts = eqn.params["start_indices"]
    return starts, eqn.params["limit_indices"], eqn.params["strides"] or (1,) * len(starts)


_VIEW_OF_INPUT: dict[str, Callable[[View, JaxprEqn], View]] = {
    "broadcast_in_dim": lambda v, e: v.broadcast(
        aval(e.outvars[0]).shape, e.params["broadcast_dimensions"]
    ),
    "reshape": lambda v, e: v.reshape(aval(e.outvars[0]).shape),
    "rev": lambda v, e: v.reverse(e.params["dimensions"]),
    "slice": lambda v, e: v.slice(*_slice_bounds(e)),
    "squeeze": lambda v, e: v.reshape(aval(e.outvars[0]).shape),
    "transpose": lambda v, e: v.transpose(e.params["permutation"]),
}


def _broadcast_value(axes: Axes, eqn: JaxprEqn) -> Axes:
    shape = aval(eqn.outvars[0]).shape
    result = list(fresh(shape))
    for source, target in enumerate(eqn.params["broadcast_dimensions"]):
        if axes[source]:
            result[target] = axes[source]
    return tuple(result)


def _reshape_value(axes: Axes, eqn: JaxprEqn) -> Axes:
    result = fresh(aval(eqn.outvars[0]).shape)
    unify(flat(axes), flat(result), eqn.primitive.name)
    return result


def _no_view_of_value(axes: Axes, eqn: JaxprEqn) -> Axes:
    raise NotFusible(f"{eqn.primitive.name} of a value computed in the same group")


_VIEW_OF_VALUE: dict[str, Callable[[Axes, JaxprEqn], Axes]] = {
    "broadcast_in_dim": _broadcast_value,
    "reshape": _reshape_value,
    "rev": _no_view_of_value,
    "slice": _no_view_of_value,
    "squeeze": lambda axes, e: tuple(
        a for i, a in enumerate(axes) if i not in e.params["dimensions"]
    ),
    "transpose": lambda axes, e: tuple(axes[i] for i in e.params["permutation"]),
}


def build(jaxpr: Jaxpr, name: str) -> KernelSpec:
    """The kernel that computes ``jaxpr``.

    Args:
      jaxpr: equations of a group, inputs as invars, needed results as outvars.
      name: identifier for the kernel.

    Raises:
      NotFusible: these equations cannot be one kernel; the message says why.
    """
    _check_operands(jaxpr)
    try:
        spec = _build(jaxpr, name, shared=True)
    except NotFusible:  # x and its own transpose, say, cannot run along the same axes
        spec = _build(jaxpr, name, shared=False)
    try:
        codegen.generate(spec)
    except UnsupportedKernel as error:
        raise NotFusible(str(error)) from None
    return spec


def _build(jaxpr: Jaxpr, name: str, *, shared: bool) -> KernelSpec:
    builder = _Builder(jaxpr, shared=shared)
    for eqn in jaxpr.eqns:
        builder.equation(eqn)
    for position, var in enumerate(jaxpr.outvars):
        value = builder.operand(var)
        address = dense(value.axes, aval(var).shape)
        builder.add(visitor.Store(position, value.node, IndexMap(())), address)
    return _resolve(builder, name)


def _check_operands(jaxpr: Jaxpr) -> None:
    if not jaxpr.outvars:
        raise NotFusible("nothing outside needs a result of these equations")
    if len(jaxpr.invars) + len(jaxpr.outvars) > MAX_OPERANDS:
        raise NotFusible(f"more than {MAX_OPERANDS} operands")
    for var in (*jaxpr.invars, *jaxpr.outvars):
        rules.check_aval(aval(var))
        if isinstance(var, Var) and aval(var).size == 0:
            raise NotFusible("an operand without elements")
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            if math.prod(getattr(aval(var), "shape", ())) == 0:
                raise NotFusible("an operand without elements")


def _check_diagonals(builder: _Builder) -> None:
    """A computed value whose two axes became one would only be known on its diagonal."""
    for axes in {
        id(v.axes): v.axes for v in builder.env.values() if isinstance(v, _Value)
    }.values():
        atoms = [atom for axis in axes for factor in axis for atom in factor.atoms()]
        if len(set(atoms)) != len(atoms):
            raise NotFusible(
                "two axes of one value would share an axis of the iteration space (a diagonal)"
            )


def _resolve(builder: _Builder, name: str) -> KernelSpec:
    _check_diagonals(builder)
    strides = {position: address.strides() for position, address in builder.addresses.items()}
    stores = [p for p, node in enumerate(builder.nodes) if isinstance(node, visitor.Store)]
    # Atoms that only a broadcast which nothing stores runs along do not belong to the space.
    # A dict: the order of a set of objects would differ from process to process.
    live = {atom: None for p in stores for atom in strides[p]}
    for _, axes, _ in builder.reductions:
        live |= {atom: None for factor in flat(axes) for atom in factor.atoms()}
    order = _memory_order(builder, strides, stores, live)
    directions = _directions(builder, order)
    _check_reductions(builder, order)
    _check_stores(builder, strides, stores, directions)
    if directions.over:
        tiles = [("row", directions.row), ("col", directions.col)]
    else:
        tiles = _tiles(builder, strides, stores, order)
    atoms = [atom for _, members in tiles for atom in members]
    position_of = {atom: i for i, atom in enumerate(atoms)}
    tile_axes: list[TileAxis] = [
        TileAxis(tile, tuple(position_of[atom] for atom in members)) for tile, members in tiles
    ]
    space = Space(tuple(atom.size for atom in atoms), tuple(tile_axes))
    nodes: list[visitor.Node] = []
    for position, node in enumerate(builder.nodes):
        if position in builder.addresses:
            found = strides[position]
            index = IndexMap(
                tuple(found.get(a, 0) for a in atoms), builder.addresses[position].offset
            )
            node = _at(node, index)
        if isinstance(node, visitor.Reduce):
            node = dataclasses.replace(node, over=directions.over[position])
        nodes.append(node)
    return KernelSpec(
        name=name,
        mainloop=directions.mainloop,
        space=space,
        tree=_compact(nodes),
        inputs=tuple(_tensor(var) for var in builder.jaxpr.invars),
        outputs=tuple(_tensor(var) for var in builder.jaxpr.outvars),
    )


def _at(node: visitor.Node, index: IndexMap) -> visitor.Node:
    assert isinstance(node, visitor.Load | visitor.Iota | visitor.Store)
    return dataclasses.replace(node, index=index)


def _tensor(var: Var | Literal) -> TensorType:
    return TensorType(tuple(aval(var).shape), np.dtype(aval(var).dtype))


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


def _directions(builder: _Builder, order: list[Factor]) -> _Directions:
    """Reductions that include the contiguous atom run along "col", the others along "row"."""
    atoms = {
        node: frozenset(atom for factor in factors for atom in factor.atoms())
        for factors, _, node in builder.reductions
    }
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


def _check_reductions(builder: _Builder, order: list[Factor]) -> None:
    for _, axes, _ in builder.reductions:
        own = {atom for factor in flat(axes) for atom in factor.atoms()}
        if any(atom not in own for atom in order):
            raise NotFusible(
                "a reduction would be repeated along an axis that its operand does not have"
            )


def _check_stores(
    builder: _Builder,
    strides: dict[int, dict[Factor, int]],
    stores: list[int],
    directions: _Directions,
) -> None:
    row, col = set(directions.row), set(directions.col)
    for position in stores:
        own = set(strides[position])
        (operand,) = visitor.operands(builder.nodes[position])
        if directions.over.get(operand) == "row":
            if own != col:
                raise NotFusible("a sum along rows does not run along exactly the other axes")
        elif not row <= own:
            raise NotFusible("an output does not run along every axis of the iteration space")
        elif not col <= own and (own & col or directions.mainloop == "columnwise"):
            raise NotFusible("an output runs along a part of the reduced axes")


def _memory_order(
    builder: _Builder,
    strides: dict[int, dict[Factor, int]],
    stores: list[int],
    live: dict[Factor, None],
) -> list[Factor]:
    """Atoms, outermost first, in the order of the largest stores, then of the largest loads."""
    loads = [p for p, node in enumerate(builder.nodes) if isinstance(node, visitor.Load)]

    def extent(position: int) -> int:
        return math.prod(atom.size for atom, stride in strides[position].items() if stride)

    order: list[Factor] = []
    ranked = sorted(stores, key=extent, reverse=True) + sorted(loads, key=extent, reverse=True)
    if loads and max(map(extent, loads)) > max(map(extent, stores)):
        ranked = ranked[len(stores) :] + ranked[: len(stores)]
    for position in ranked:
        found = strides[position]
        fresh_atoms = [a for a in found if found[a] and a not in order and a in live]
        order += sorted(fresh_atoms, key=lambda a: -abs(found[a]))
    order += [a for a in live if a not in order]
    return order


def _contiguous(found: dict[Factor, int]) -> Factor | None:
    """The atom along which neighbouring points are neighbouring addresses."""
    return next(
        (atom for atom, stride in found.items() if abs(stride) == 1 and atom.size > 1), None
    )


def _tiles(
    builder: _Builder,
    strides: dict[int, dict[Factor, int]],
    stores: list[int],
    kept: list[Factor],
) -> list[tuple[str, list[Factor]]]:
    """Tile axes of a pointwise kernel."""
    size = math.prod(atom.size for atom in kept)
    full = [
        position
        for position, found in strides.items()
        if isinstance(builder.nodes[position], (visitor.Load, visitor.Store))
        and math.prod(atom.size for atom, stride in found.items() if stride) == size
    ]
    output = _contiguous(strides[stores[0]])
    others = {_contiguous(strides[p]) for p in full} - {output, None}
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


def _compact(nodes: list[visitor.Node]) -> visitor.Tree:
    """Merges equal nodes and drops what no store needs."""
    needed: set[int] = set()
    stack = [i for i, node in enumerate(nodes) if isinstance(node, visitor.Store)]
    while stack:
        position = stack.pop()
        if position not in needed:
            needed.add(position)
            stack.extend(visitor.operands(nodes[position]))
    renamed: dict[int, int] = {}
    seen: dict[tuple[str, visitor.Node], int] = {}
    result: list[visitor.Node] = []
    for position, node in enumerate(nodes):
        if position not in needed:
            continue
        match node:
            case visitor.Compute():
                node = dataclasses.replace(node, operands=tuple(renamed[o] for o in node.operands))
            case visitor.Reduce() | visitor.Store():
                node = dataclasses.replace(node, operand=renamed[node.operand])
            case _:
                pass
        # repr tells 0.0 from -0.0 and 1 from True, which compare equal.
        key = (repr(node), node)
        if key not in seen:
            seen[key] = len(result)
            result.append(node)
        renamed[position] = seen[key]
    return tuple(result)
