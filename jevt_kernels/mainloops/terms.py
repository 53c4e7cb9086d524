"""The terms of a matrix product: one ``Contract`` node, or several whose results are added up.

A gradient often is a sum of products: dq·Wq + dk·Wk + dv·Wv. One kernel adds them up in the
registers of its tile. Each term has a contracted axis of its own, "k", "k1", "k2", …, and operands
of its own; their results are added up by ``add`` nodes of two operands, and nothing else reads a
term or a part of the sum.
"""

from __future__ import annotations

import dataclasses

from jevt_kernels import visitor
from jevt_kernels.spec import KernelSpec, UnsupportedKernel

#: The tile axes of the space of a GEMM of one term, in order.
AXES = ("batch", "m", "n", "k")

#: Terms of a kernel at most.
MOST_TERMS = 8


@dataclasses.dataclass(frozen=True)
class Term:
    """One of the matrix products that a GEMM adds up.

    Attributes:
      position: of the ``Contract`` node.
      node: that node.
      k: extent of the contracted tile axis, ``node.over``.
    """

    position: int
    node: visitor.Contract
    k: int

    @property
    def number(self) -> str:
        """What tells the term apart in names: nothing, "1", "2" and so on."""
        return self.node.over.removeprefix("k")

    def steps(self, block: int) -> int:
        """Blocks along the contracted axis."""
        return -(-self.k // block)


def axes(count: int) -> tuple[str, ...]:
    """The tile axes of the space of a GEMM of so many terms, in order."""
    return (*AXES, *(f"k{number}" for number in range(1, count)))


def find(spec: KernelSpec) -> tuple[Term, ...]:
    """The terms of a GEMM kernel, in the order of their axes.

    Raises:
      UnsupportedKernel: if the space is not that of a GEMM, or if it does not fit the terms.
    """
    names = tuple(t.name for t in spec.space.tile)
    count = len(names) + 1 - len(AXES)
    if names != axes(count) or not 1 <= count <= MOST_TERMS:
        raise UnsupportedKernel(
            f"expected the tile axes {AXES} of a GEMM, and k1 to k{MOST_TERMS - 1} for further "
            f"products that are added up; got {names}"
        )
    found = [(i, n) for i, n in enumerate(spec.tree) if isinstance(n, visitor.Contract)]
    contracted = names[len(AXES) - 1 :]
    if len(found) != count:
        raise UnsupportedKernel(
            f"expected one matrix product in a GEMM for each axis of {', '.join(contracted)}; "
            f"got {len(found)}"
        )
    for (_, node), name in zip(found, contracted, strict=True):
        if node.over != name:
            raise UnsupportedKernel(f"expected a contraction over {name!r}, got {node.over!r}")
    extents = [spec.space.extent(spec.space.tile_axis(name)) for name in contracted]
    return tuple(Term(i, n, k) for (i, n), k in zip(found, extents, strict=True))


def total(tree: visitor.Tree, terms: tuple[Term, ...]) -> int:
    """The position of the sum of all terms; of one term its own.

    Raises:
      UnsupportedKernel: if the terms are not added up, or if something else reads a part.
    """
    dtype = terms[0].node.dtype
    parts = {term.position: frozenset({term.position}) for term in terms}
    for position, node in enumerate(tree):
        if isinstance(node, visitor.Compute) and (node.op, node.dtype) == ("add", dtype):
            left, right = (parts.get(operand, frozenset()) for operand in node.operands)
            if left and right and left.isdisjoint(right):
                parts[position] = left | right
    root = next((p for p, summed in parts.items() if len(summed) == len(terms)), None)
    if root is None:
        raise UnsupportedKernel(
            f"expected the {len(terms)} matrix products of a GEMM to be added up in "
            f"{dtype.name}, with nothing between"
        )
    for part in set(visitor.ancestors(tree, root)).intersection(parts) - {root}:
        if sum(visitor.operands(node).count(part) for node in tree) > 1:
            raise UnsupportedKernel(
                f"node {part}, a part of a sum of matrix products, is read by something else"
            )
    return root
