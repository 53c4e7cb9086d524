"""The equations of a group as visitor nodes whose axes are related, in one walk through them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence, Set

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jevt._jaxpr import aval
from jevt.lowering import rules
from jevt.lowering.axes import Address, Axes, Factor, View, dense, flat, fresh, leaf, unify
from jevt.lowering.errors import NotFusible
from jevt.lowering.products import Term
from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap
from jevt_kernels.mainloops import terms
from jevt_kernels.ops import compute_dtype


@dataclasses.dataclass(frozen=True)
class Value:
    """A value computed in the kernel: its node, and the factors of its logical axes."""

    node: int
    axes: Axes


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A reduction in the making.

    Attributes:
      node: its position.
      reduced: the factors that it runs along.
      axes: those of its operand.
    """

    node: int
    reduced: list[Factor]
    axes: Axes


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A matrix product, or a sum of several, in the making: the factors by their part in it.

    Attributes:
      terms: positions of the products.
      batch, left, right: of the result, the same for all of them.
      contracted: of each product.
    """

    terms: tuple[int, ...]
    batch: list[Factor]
    left: list[Factor]
    right: list[Factor]
    contracted: tuple[list[Factor], ...]


@dataclasses.dataclass(frozen=True)
class _Term:
    """A product: its node and type, the axes of its batch, rows and columns, and those summed."""

    node: int
    dtype: np.dtype
    axes: tuple[Axes, Axes, Axes]
    contracted: Axes

    @property
    def result(self) -> Axes:
        return tuple(axis for part in self.axes for axis in part)


class Builder:
    """Nodes and relations of one group, in the order of its equations."""

    def __init__(self, jaxpr: Jaxpr, *, shared: bool) -> None:
        self.jaxpr = jaxpr
        self.shared = shared
        self.loads: dict[View | tuple[int, int], Value] = {}
        self.env: dict[Var, Value | View] = {
            var: View.of(i, tuple(aval(var).shape)) for i, var in enumerate(jaxpr.invars)
        }
        # Nodes whose index maps are still addresses (loads, iotas, stores) keep them beside.
        self.nodes: list[visitor.Node] = []
        self.addresses: dict[int, Address] = {}
        self.reductions: list[Reduction] = []
        self.contractions: list[Contraction] = []

    def add(self, node: visitor.Node, address: Address | None = None) -> int:
        self.nodes.append(node)
        if address is not None:
            self.addresses[len(self.nodes) - 1] = address
        return len(self.nodes) - 1

    def operand(self, atom: Var | Literal) -> Value:
        """The value of an operand, loaded for this use if it views a group input."""
        if isinstance(atom, Literal):
            return self._literal(atom)
        value = self.env[atom]
        return self._load(value) if isinstance(value, View) else value

    def _load(self, view: View) -> Value:
        """A load, one for each use of a view.

        With ``shared``, uses of one view run along the same axes, and so do dense views of one
        input.
        """
        if self.shared and view in self.loads:
            return self.loads[view]
        axes, address = leaf(view)
        value = Value(self.add(visitor.Load(view.input, IndexMap(())), address), axes)
        if self.shared:
            self.loads[view] = value
            if view.dense:
                first = self.loads.setdefault((view.input, math.prod(view.shape)), value)
                unify(flat(first.axes), flat(axes), "views of one operand")
        return value

    def _literal(self, atom: Literal) -> Value:
        value = np.asarray(atom.val)
        if value.ndim:
            raise NotFusible("a literal array is not a scalar")
        return Value(self.add(visitor.Constant(value.item(), np.dtype(aval(atom).dtype))), ())

    def equation(self, eqn: JaxprEqn) -> None:
        role = rules.classify(eqn)
        if role.kind == "view":
            self._view(eqn)
        elif role.kind == "reduction":
            self._reduction(eqn, role.axes)
        elif role.kind == "contraction":
            self._contraction(eqn)
        elif role.kind == "source":
            self._source(eqn)
        else:
            self._pointwise(eqn)

    def store(self, position: int, var: Var | Literal) -> None:
        """Stores a result to the output at ``position``."""
        value = self.operand(var)
        address = dense(value.axes, aval(var).shape)
        self.add(visitor.Store(position, self._unrounded(value.node), IndexMap(())), address)

    def _unrounded(self, position: int) -> int:
        """The reduction below conversions that change nothing but what is stored.

        A reduction along rows is known only when all programs' parts are combined: its store
        converts it, but nothing before that can.
        """
        here, node = position, self.nodes[position]
        while isinstance(node, visitor.Compute) and node.op == "convert":
            (here,) = node.operands
            source = self.nodes[here]
            if not isinstance(source, visitor.Compute | visitor.Reduce):
                break
            if compute_dtype(source.dtype) != compute_dtype(node.dtype):
                break
            node = source
        return here if isinstance(node, visitor.Reduce) else position

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
            self.env[var] = Value(self.add(node), axes)

    @staticmethod
    def _broadcast_into(source: Axes, target: Axes, eqn: JaxprEqn) -> None:
        for mine, theirs in zip(source, target, strict=True):
            if mine:  # an axis of size 1 broadcasts
                unify(mine, theirs, eqn.primitive.name)

    def _reduction(self, eqn: JaxprEqn, reduced: Sequence[int]) -> None:
        operand = self.operand(eqn.invars[0])
        kept = _without(operand.axes, set(reduced))
        dtype = np.dtype(aval(eqn.outvars[0]).dtype)
        factors = [factor for i in reduced for factor in operand.axes[i]]
        if not factors:  # only axes of size 1: the value itself
            node = self.add(visitor.Compute("convert", (operand.node,), dtype))
        else:
            node = self.add(
                visitor.Reduce(rules.REDUCTIONS[eqn.primitive], operand.node, "col", dtype)
            )
            self.reductions.append(Reduction(node, factors, operand.axes))
        self.env[eqn.outvars[0]] = Value(node, kept)

    def _contraction(self, eqn: JaxprEqn) -> None:
        asked = rules.CONTRACTIONS[eqn.primitive](eqn)
        found = [self._term(term, number, eqn) for number, term in enumerate(asked)]
        (batch, left, right), axes = found[0].axes, found[0].result
        for other in found[1:]:
            for mine, theirs in zip(axes, other.result, strict=True):
                unify(mine, theirs, eqn.primitive.name)
        self.contractions.append(
            Contraction(
                tuple(term.node for term in found),
                flat(batch),
                flat(left),
                flat(right),
                tuple(flat(term.contracted) for term in found),
            )
        )
        node = found[0].node
        for other in found[1:]:
            node = self.add(visitor.Compute("add", (node, other.node), found[0].dtype))
        dtype = np.dtype(aval(eqn.outvars[0]).dtype)
        if dtype != found[0].dtype:
            node = self.add(visitor.Compute("convert", (node,), dtype))
        self.env[eqn.outvars[0]] = Value(node, axes)

    def _term(self, term: Term, number: int, eqn: JaxprEqn) -> _Term:
        """One product, along ``k``, ``k1`` and so on."""
        product = term.product
        lhs, rhs = self.operand(term.lhs), self.operand(term.rhs)
        for left, right in (*product.contracted, *product.batch):
            unify(lhs.axes[left], rhs.axes[right], eqn.primitive.name)
        pairs = (*product.contracted, *product.batch)
        over = terms.axes(number + 1)[-1]
        node = visitor.Contract(lhs.node, rhs.node, over, product.dtype, product.precision)
        return _Term(
            self.add(node),
            product.dtype,
            (
                tuple(lhs.axes[left] for left, _ in product.batch),
                _without(lhs.axes, {left for left, _ in pairs}),
                _without(rhs.axes, {right for _, right in pairs}),
            ),
            tuple(lhs.axes[left] for left, _ in product.contracted),
        )

    def _source(self, eqn: JaxprEqn) -> None:
        shape = tuple(aval(eqn.outvars[0]).shape)
        axes = fresh(shape)
        if rules.SOURCES[eqn.primitive] == "iota":
            dimension = eqn.params["dimension"]
            address = dense((axes[dimension],), (shape[dimension],))
            node = self.add(
                visitor.Iota(IndexMap(()), np.dtype(aval(eqn.outvars[0]).dtype)), address
            )
            self.env[eqn.outvars[0]] = Value(node, axes)
        else:
            uint32 = np.dtype("uint32")
            high = self.add(visitor.Constant(0, uint32))
            low = self.add(visitor.Iota(IndexMap(()), uint32), dense(axes, shape))
            self.env[eqn.outvars[0]] = Value(high, axes)
            self.env[eqn.outvars[1]] = Value(low, axes)

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
            self.env[out] = Value(value.node, axes)


def _without(axes: Axes, removed: Set[int]) -> Axes:
    return tuple(axis for i, axis in enumerate(axes) if i not in removed)


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
    "squeeze": lambda axes, e: _without(axes, set(e.params["dimensions"])),
    "transpose": lambda axes, e: tuple(axes[i] for i in e.params["permutation"]),
}
