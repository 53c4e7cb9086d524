"""In which order an epilogue computes its values, so that few are alive at once.

A value of a tile takes as many registers of a thread as the tile has elements for it, and compilers
keep the order of operations on tiles largely as it is. So the next operation is always one that
ends more values than it makes, if there is one: list scheduling, as compilers do it for registers.
"""

from __future__ import annotations

from collections.abc import Collection

from jevt_kernels import visitor

#: Operations that instructions apply to their operands for nothing.
_FREE = frozenset({"neg", "abs", "copy", "convert"})


def schedule(
    tree: visitor.Tree,
    roots: Collection[int],
    known: Collection[int],
    tiles: Collection[int],
) -> list[int]:
    """The nodes that roots need, each after its operands.

    Args:
      tree: the kernel's.
      roots: stores.
      known: nodes that are computed already, with all that they are made of.
      tiles: nodes whose values take room while they are alive.

    Returns:
      Positions, the roots among them, without those that are known.
    """
    needed = {p for root in roots for p in visitor.ancestors(tree, root)}.difference(known)
    sources = {p: frozenset(_source(tree, o) for o in visitor.operands(tree[p])) for p in needed}
    readers: dict[int, set[int]] = {}
    for position, read in sources.items():
        for source in read:
            readers.setdefault(source, set()).add(position)
    done = set(known)
    waiting = sorted(needed)
    order: list[int] = []

    def growth(position: int) -> int:
        """How much more is alive afterwards."""
        made = position in tiles and _source(tree, position) == position
        ended = sum(s in tiles and readers[s] == {position} for s in sources[position])
        return made - ended

    while waiting:
        ready = (p for p in waiting if all(o in done for o in visitor.operands(tree[p])))
        position = min(ready, key=lambda p: (growth(p), p))
        waiting.remove(position)
        done.add(position)
        order.append(position)
        for source in sources[position]:
            readers[source].discard(position)
    return order


def _source(tree: visitor.Tree, position: int) -> int:
    """The node whose registers hold a value."""
    while isinstance(node := tree[position], visitor.Compute) and node.op in _FREE:
        (position,) = node.operands
    return position
