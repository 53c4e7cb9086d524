"""The epilogue visitor tree.

Grammar (static single assignment: an operand is the position of an earlier node)::

    tree := node*
    node := Accumulator(dtype)                    the mainloop's tile
          | Load(input, index)                    full, row, column or scalar: the map says which
          | Constant(value, dtype)
          | Iota(index, dtype)                    the value of an index map, as a number
          | Compute(op, operands, dtype, result)  an operation of ``jevt_kernels.ops``
          | Reduce(op, operand, over)             along the tile axis named ``over``
          | Store(output, operand, index)

The tree is what EVT (ASPLOS 2024, section 4) calls the epilogue visitor tree; its row, column and
scalar variants of loads, stores and reductions are not separate classes, because which tile axes a
node depends on follows from its index map and operands (:func:`dependencies`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jevt_kernels.index_map import IndexMap, Space

type Dtype = np.dtype


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """The tile that the mainloop produces."""

    dtype: Dtype


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
class Store:
    """Writes ``operand`` to kernel output ``output`` at ``index``."""

    output: int
    operand: int
    index: IndexMap


type Node = Accumulator | Load | Constant | Iota | Compute | Reduce | Store
type Tree = tuple[Node, ...]


def operands(node: Node) -> tuple[int, ...]:
    """Positions of the nodes that ``node`` reads."""
    match node:
        case Compute():
            return node.operands
        case Reduce() | Store():
            return (node.operand,)
        case _:
            return ()


def dependencies(tree: Tree, space: Space) -> tuple[frozenset[str], ...]:
    """For each node, the names of the tile axes along which its value varies."""
    everything = frozenset(tile_axis.name for tile_axis in space.tile)
    result: list[frozenset[str]] = []
    for node in tree:
        match node:
            case Accumulator():
                varies = everything
            case Load() | Iota():
                varies = frozenset(t.name for t in space.tile if node.index.depends_on(t))
            case Reduce():
                varies = result[node.operand] - {node.over}
            case _:
                varies = frozenset().union(*(result[o] for o in operands(node)))
        result.append(varies)
    return tuple(result)


def levels(tree: Tree) -> tuple[int, ...]:
    """For each node, the number of reductions on its longest path from a leaf."""
    result: list[int] = []
    for node in tree:
        below = max((result[o] for o in operands(node)), default=0)
        result.append(below + isinstance(node, Reduce))
    return tuple(result)
