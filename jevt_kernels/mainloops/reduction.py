"""Reductions along a tile axis, printed the same way by every mainloop that holds them."""

from __future__ import annotations

import dataclasses

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.ops import TRITON_TYPES, compute_dtype, is_float, triton_type
from jevt_kernels.spec import Partial, UnsupportedKernel

OPERATIONS = ("sum", "prod", "max", "min", "and", "or")


@dataclasses.dataclass(frozen=True)
class Reduction:
    """One :class:`~jevt_kernels.visitor.Reduce` node.

    Attributes:
      printer: of the kernel.
      position: of the node in the tree.
    """

    printer: Printer
    position: int

    @property
    def node(self) -> visitor.Reduce:
        node = self.printer.spec.tree[self.position]
        assert isinstance(node, visitor.Reduce)
        return node

    @property
    def dtype(self) -> np.dtype:
        """The type of partial results: booleans are reduced as numbers."""
        return partial_dtype(self.node)

    @property
    def accumulator(self) -> str:
        return f"acc{self.position}"

    @property
    def identity(self) -> str:
        """The operation's neutral element as Triton text."""
        op = self.node.op
        if op in ("sum", "or"):
            return "0"
        if op in ("prod", "and"):
            return "1"
        if is_float(self.dtype):
            return "float('-inf')" if op == "max" else "float('inf')"
        if self.node.dtype == np.dtype(bool):
            return "0" if op == "max" else "1"
        info = np.iinfo(self.dtype)
        return str(info.min if op == "max" else info.max)

    def masked(self) -> str:
        """The operand over the full tile, with the identity beyond the reduced axis's end."""
        printer, node = self.printer, self.node
        value = printer.value(node.operand)
        if self.dtype != compute_dtype(printer.node_dtype(node.operand)):
            value = f"{value}.to({triton_type(self.dtype)})"
        varies = printer.dependencies[node.operand]
        if node.over not in varies:
            value = f"tl.broadcast_to({value}, {printer.view.shape(varies | {node.over})})"
        if mask := printer.mask(frozenset({node.over})):
            value = f"tl.where({mask}, {value}, {self.identity})"
        return value

    def start(self, group: int = 1) -> None:
        """Prints the accumulator, a tile of identities, one for each ``group`` of columns."""
        shape = self.printer.view.shape(self.printer.view.names)
        if group > 1:
            shape = shape.replace("BLOCK_COL", f"BLOCK_COL // {group}")
        self.printer.line(
            f"{self.accumulator} = tl.full({shape}, {self.identity}, {triton_type(self.dtype)})"
        )

    def accumulate(self, value: str = "", scale: str = "") -> None:
        """Prints the accumulator's update by the present tile.

        Args:
          value: the masked operand, if it is printed already.
          scale: what a sum so far is multiplied by.
        """
        acc, value = self.accumulator, value or self.masked()
        match self.node.op:
            case "sum":
                text = f"{acc} * {scale} + {value}" if scale else f"{acc} + {value}"
            case "prod":
                text = f"{acc} * {value}"
            case op:
                function = "maximum" if op in ("max", "or") else "minimum"
                nan = ", propagate_nan=tl.PropagateNan.ALL" if is_float(self.dtype) else ""
                text = f"tl.{function}({acc}, {value}{nan})"
        self.printer.line(f"{acc} = {text}")

    def finish(self, tile: str) -> None:
        """Prints the node's value from a tile."""
        text = self.along(tile)
        if self.node.dtype == np.dtype(bool):
            text = f"{text} != 0"
        elif not is_float(self.dtype):
            text = f"{text}.to({triton_type(self.node.dtype)})"
        self.printer.line(f"v{self.position} = {text}")
        self.printer.set_value(self.position, f"v{self.position}")

    def along(self, tile: str) -> str:
        """The reduction of a tile of the partial type, as an expression of that type."""
        axis = self.printer.view.position(self.node.over)
        floating = is_float(self.dtype)
        match self.node.op:
            case "sum":
                text = f"tl.sum({tile}, axis={axis}, keep_dims=True)"
                # Triton widens small integers when it sums them.
                return text if floating else f"{text}.to({triton_type(self.dtype)})"
            case "prod":
                return f"tl.reduce({tile}, {axis}, dm.product, keep_dims=True)"
            case op:
                name = "max" if op in ("max", "or") else "min"
                if floating:
                    return f"tl.reduce({tile}, {axis}, dm.nan_{name}, keep_dims=True)"
                return f"tl.{name}({tile}, axis={axis}, keep_dims=True)"


def store_part(printer: Printer, reduction: Reduction, store: int, value: str, part: str) -> None:
    """Prints the store of what a program knows of a reduction, of its partial type.

    Args:
      printer: of the kernel.
      reduction: what the store writes.
      store: position of the store.
      value: without the dimension that was reduced.
      part: what is added to the address, as an expression.
    """
    node = printer.spec.tree[store]
    assert isinstance(node, visitor.Store)
    mask = printer.mask(printer.stored_along(node))
    value = f"{value}.to({TRITON_TYPES[reduction.dtype]})"
    address = f"{part} + {printer.store_address(node)}"
    printer.line(f"tl.store(y{node.output} + {address}, {value}{f', mask={mask}' if mask else ''})")


def store_partial(
    printer: Printer, reduction: Reduction, store: int, value: str, part: str, programs: int
) -> None:
    """Prints the store of a partial result, one of ``programs``, that a second stage combines.

    Args:
      printer: of the kernel.
      reduction: what the store writes.
      store: position of the store.
      value: without the dimension that was reduced.
      part: number of this program's part, as an atom.
      programs: number of parts.
    """
    node = printer.spec.tree[store]
    assert isinstance(node, visitor.Store)
    size = printer.spec.outputs[node.output].size
    store_part(printer, reduction, store, value, f"{part} * {size}")
    partial = Partial(node.output, programs, reduction.node.op, reduction.dtype)
    if partial not in printer.partials:
        printer.partials.append(partial)


def partial_dtype(node: visitor.Reduce) -> np.dtype:
    """The type in which a reduction accumulates."""
    return np.dtype("int32") if node.dtype == np.dtype(bool) else compute_dtype(node.dtype)


def reductions(printer: Printer, over: str) -> list[Reduction]:
    """The tree's reductions along one tile axis, in order."""
    found = []
    for position, node in enumerate(printer.spec.tree):
        if isinstance(node, visitor.Reduce) and node.over == over:
            if node.op not in OPERATIONS:
                raise UnsupportedKernel(
                    f"expected a reduction {', '.join(OPERATIONS)}; got {node.op!r}"
                )
            found.append(Reduction(printer, position))
    return found


def before_reductions(printer: Printer) -> list[int]:
    """The nodes whose values need no reduction."""
    return [
        position
        for position, node in enumerate(printer.spec.tree)
        if printer.levels[position] == 0 and not isinstance(node, visitor.Store)
    ]


def hoist(printer: Printer, roots: list[int], axis: str) -> None:
    """Prints, before a loop along ``axis``, what its values need that does not vary along it.

    Results of reductions and products count as known: whoever calls this has printed those it
    needs, or prints them inside the loop together with what depends on them.
    """
    known = (visitor.Reduce, visitor.Contract)
    for position in visitor.ancestors(printer.spec.tree, *roots, known=known):
        node = printer.spec.tree[position]
        fixed = axis not in printer.dependencies[position]
        if fixed and not isinstance(node, (visitor.Constant, *known)):
            printer.value(position)
