"""The epilogue visitor tree.

Grammar (static single assignment: an operand is the position of an earlier node)::

    tree := node*
    node := Load(input, index)                    full, row, column or scalar: the map says which
          | Constant(value, dtype)
          | Iota(index, dtype)                    the value of an index map, as a number
          | Compute(op, operands, dtype, result)  an operation of ``jevt_kernels.ops``
          | Reduce(op, operand, over)             along the tile axis named ``over``
          | Contract(lhs, rhs, over)              the matrix product along ``over``
          | Lookup(input, row, stride, index)     elements of a row that another node names
          | Segment(operand, bounds, over)        the sum over a row's own part of ``over``
          | Store(output, operand, index)

The tree is what EVT (ASPLOS 2024, section 4) calls the epilogue visitor tree; its row, column and
scalar variants of loads, stores and reductions are not separate classes, because which tile axes a
node depends on follows from its index map and operands (:func:`dependencies`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jevt_kernels.index_map import IndexMap, Space

type Dtype = np.dtype


@dataclasses.dataclass(frozen=True)
class Load:
    """Elements of kernel input ``input`` at ``index``."""

    input: int
    index: IndexMap


@dataclasses.dataclass(frozen=True)
class Constant:
    """A scalar known at compile time."""

    value: bool | int | float
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class Iota:
    """``index`` evaluated as a number of type ``dtype``."""

    index: IndexMap
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class Compute:
    """``ops.OPS[op]`` on earlier nodes; ``result`` picks one of several results."""

    op: str
    operands: tuple[int, ...]
    dtype: Dtype
    result: int = 0


@dataclasses.dataclass(frozen=True)
class Reduce:
    """``op`` ("sum", "max", "min", "prod", "and", "or") of ``operand`` along tile axis ``over``."""

    op: str
    operand: int
    over: str
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class Contract:
    """A matrix product: the sum over tile axis ``over`` of ``lhs`` times ``rhs``.

    The operands may be any trees: what ``lhs`` and ``rhs`` are made of is the kernel's prologue,
    what is made of the product its epilogue. Both are rounded to their own type, which is one and
    the same, before they are multiplied, and the products are added up in ``dtype``.

    Attributes:
      lhs: position of a node that varies along ``batch``, ``m`` and ``over`` at most.
      rhs: position of a node that varies along ``batch``, ``n`` and ``over`` at most.
      over: name of the contracted tile axis: ``"k"``; of further products that are added up in the
        same kernel ``"k1"``, ``"k2"``, ….
      dtype: of the sum: float32 of bfloat16, float16 and float32 operands, float64 of float64,
        int32 of int8.
      precision: how float32 operands are multiplied, a key of :data:`PRECISIONS`; ``"ieee"`` for
        all other types.
    """

    lhs: int
    rhs: int
    over: str
    dtype: Dtype
    precision: str = "ieee"


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Elements of kernel input ``input`` at ``stride`` times the value of node ``row`` + ``index``.

    Attributes:
      input: kernel input.
      row: position of a node of integers.
      stride: elements from one row to the next.
      index: place in the row.
      rows: number of rows of the input, elements of others being 0; None where every number is
        that of a row, which nothing checks.
    """

    input: int
    row: int
    stride: int
    index: IndexMap
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
    """The sum of ``operand`` over the positions along tile axis ``over`` that belong to a row.

    A long row need not be added up by one program: blocks of ``length`` positions, beginning at
    multiples of it, that lie within one row can come as sums that another kernel has made.

    Attributes:
      operand: position of a node that varies along ``over``, and not along ``row``.
      bounds: kernel input of integers. Of shape [rows + 1], ascending: row r owns positions
        ``bounds[r]`` to ``bounds[r + 1] - 1``. Of shape [2, rows]: ``bounds[0, r]`` to
        ``bounds[1, r] - 1``.
      over: name of the tile axis, ``"edge"``.
      dtype: of the sum.
      blocks: kernel input ``[blocks, columns]`` of type ``dtype``, the sums of the blocks that lie
        within one row (others are not read); None where there are none.
      length: of a block.
    """

    operand: int
    bounds: int
    over: str
    dtype: Dtype
    blocks: int | None = None
    length: int = 0


#: How float32 numbers are multiplied in a :class:`Contract`; ``jax.lax.Precision``'s name of it.
PRECISIONS: dict[str, str] = {
    "ieee": "highest",  # every bit
    "tf32x3": "high",  # three products of parts with 10 bits of mantissa
    "tf32": "default",  # operands rounded to 10 bits of mantissa
}


@dataclasses.dataclass(frozen=True)
class Store:
    """Writes ``operand`` to kernel output ``output`` at ``index``."""

    output: int
    operand: int
    index: IndexMap


type Node = Load | Constant | Iota | Compute | Reduce | Contract | Lookup | Segment | Store
type Tree = tuple[Node, ...]


def operands(node: Node) -> tuple[int, ...]:
    """Positions of the nodes that ``node`` reads."""
    match node:
        case Compute():
            return node.operands
        case Reduce() | Segment() | Store():
            return (node.operand,)
        case Contract():
            return (node.lhs, node.rhs)
        case Lookup():
            return (node.row,)
        case _:
            return ()


def reading(node: Node, renamed: Mapping[int, int]) -> Node:
    """The node with its operands at their new positions."""
    match node:
        case Compute():
            return dataclasses.replace(node, operands=tuple(renamed[o] for o in node.operands))
        case Reduce() | Segment() | Store():
            return dataclasses.replace(node, operand=renamed[node.operand])
        case Contract():
            return dataclasses.replace(node, lhs=renamed[node.lhs], rhs=renamed[node.rhs])
        case Lookup():
            return dataclasses.replace(node, row=renamed[node.row])
        case _:
            return node


def ancestors(tree: Sequence[Node], *roots: int, known: tuple[type, ...] = ()) -> tuple[int, ...]:
    """Nodes and those that their values are made of, ascending.

    Args:
      tree: the nodes.
      roots: positions.
      known: kinds of nodes that are among the result, but not what they are made of.
    """
    found: set[int] = set()
    stack = list(roots)
    while stack:
        here = stack.pop()
        if here not in found:
            found.add(here)
            if not isinstance(tree[here], known):
                stack.extend(operands(tree[here]))
    return tuple(sorted(found))


def as_printed(tree: Sequence[Node], *roots: int, known: tuple[type, ...] = ()) -> tuple[int, ...]:
    """:func:`ancestors` in the order in which they are printed, each after its operands."""
    order: dict[int, None] = {}
    for root in roots:
        stack = [root]
        while stack:
            here = tree[stack[-1]]
            below = () if isinstance(here, known) else operands(here)
            missing = [operand for operand in below if operand not in order]
            if missing:
                stack.append(missing[0])
            else:
                order.setdefault(stack.pop())
    return tuple(order)


def dependencies(tree: Tree, space: Space) -> tuple[frozenset[str], ...]:
    """For each node, the names of the tile axes along which its value varies.

    A matrix product varies along every axis that no product contracts: it is a full tile.
    """
    contracted = {node.over for node in tree if isinstance(node, Contract)}
    free = frozenset(tile_axis.name for tile_axis in space.tile) - contracted
    result: list[frozenset[str]] = []
    for node in tree:
        match node:
            case Contract():
                varies = free
            case Load() | Iota():
                varies = frozenset(t.name for t in space.tile if node.index.depends_on(t))
            case Reduce():
                varies = result[node.operand] - {node.over}
            case Segment():
                varies = (result[node.operand] - {node.over}) | {"row"}
            case Lookup():
                varies = frozenset(t.name for t in space.tile if node.index.depends_on(t))
                varies |= result[node.row]
            case _:
                varies = frozenset().union(*(result[o] for o in operands(node)))
        result.append(varies)
    return tuple(result)


def levels(tree: Tree) -> tuple[int, ...]:
    """For each node, the number of reductions of any kind on its longest path from a leaf."""
    result: list[int] = []
    for node in tree:
        below = max((result[o] for o in operands(node)), default=0)
        result.append(below + isinstance(node, Reduce | Contract | Segment))
    return tuple(result)
