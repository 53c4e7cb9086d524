"""What the GEMM mainloop needs to know of a visitor tree, and which trees it takes."""

from __future__ import annotations

import dataclasses

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.mainloops.reduction import OPERATIONS, partial_dtype
from jevt_kernels.mainloops.terms import Term, total
from jevt_kernels.mainloops.terms import find as find_terms
from jevt_kernels.ops import BFLOAT16, is_float
from jevt_kernels.spec import KernelSpec, UnsupportedKernel

#: Operand types that Triton multiplies, and the type of their product.
PRODUCT_DTYPES: dict[np.dtype, np.dtype] = {
    BFLOAT16: np.dtype("float32"),
    np.dtype("float16"): np.dtype("float32"),
    np.dtype("float32"): np.dtype("float32"),
    np.dtype("float64"): np.dtype("float64"),
    np.dtype("int8"): np.dtype("int32"),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """The matrix product of a tree, or the sum of several.

    Attributes:
      position: of the ``Contract`` node, or of the sum of several.
      terms: the products that are added up, in order.
      dtype: of the operands of each.
      batch, m, n: extents of the tile axes.
    """

    position: int
    terms: tuple[Term, ...]
    dtype: np.dtype
    batch: int
    m: int
    n: int

    @property
    def node(self) -> visitor.Contract:
        """The first term's, whose types and precision are those of all."""
        return self.terms[0].node

    @property
    def k(self) -> int:
        """Products that are added up in an element of the result."""
        return sum(term.k for term in self.terms)

    @property
    def operands(self) -> tuple[int, ...]:
        """Positions of the operands of all terms."""
        return tuple(o for term in self.terms for o in visitor.operands(term.node))

    @property
    def is_sum(self) -> bool:
        """Whether there are several terms."""
        return len(self.terms) > 1

    def steps(self, block: int) -> int:
        """Blocks along the contracted axes."""
        return sum(term.steps(block) for term in self.terms)


def find(spec: KernelSpec) -> Product:
    """The product of a GEMM kernel.

    Raises:
      UnsupportedKernel: if the kernel is not one that the mainloop can generate.
    """
    terms = find_terms(spec)
    dtype = _check_types(spec, terms)
    position = total(spec.tree, terms)
    _check_axes(spec, terms)
    _check_aliases(spec, position)
    batch, m, n = (spec.space.extent(spec.space.tile_axis(name)) for name in ("batch", "m", "n"))
    return Product(position, terms, dtype, batch, m, n)


def parts_of(tree: visitor.Tree, root: int) -> frozenset[int]:
    """Positions of the nodes that a node is made of, itself included."""
    return frozenset(visitor.ancestors(tree, root))


def epilogue_tiles(spec: KernelSpec, product: Product) -> list[int]:
    """Positions of the loads of tiles as large as the result's that follow the product."""
    return epilogue_loads(spec, product, frozenset({"m", "n"}))


def epilogue_loads(spec: KernelSpec, product: Product, along: frozenset[str]) -> list[int]:
    """Positions of the loads that follow the product and vary along these axes."""
    prologue = parts_of(spec.tree, product.position)
    dependencies = visitor.dependencies(spec.tree, spec.space)
    return [
        position
        for position, node in enumerate(spec.tree)
        if isinstance(node, visitor.Load) and position not in prologue
        if along <= dependencies[position]
    ]


def is_plain(spec: KernelSpec, product: Product) -> bool:
    """Whether the product is stored as it is, at most converted to other floating-point types."""
    for node in spec.tree:
        if isinstance(node, visitor.Store):
            position = node.operand
            while position != product.position:
                inner = spec.tree[position]
                if not (isinstance(inner, visitor.Compute) and inner.op in ("convert", "copy")):
                    return False
                if not is_float(inner.dtype):
                    return False
                (position,) = inner.operands
    return True


def _own_dtype(spec: KernelSpec, position: int) -> np.dtype:
    node = spec.tree[position]
    if isinstance(node, visitor.Load | visitor.Lookup):
        return spec.inputs[node.input].dtype
    assert not isinstance(node, visitor.Store)
    return node.dtype


def _check_types(spec: KernelSpec, terms: tuple[Term, ...]) -> np.dtype:
    """The type of all operands."""
    kinds = {(_check_type(spec, t.node), t.node.dtype, t.node.precision): None for t in terms}
    if len(kinds) > 1:
        listed = ", ".join(f"{own.name} to {sums.name} ({how})" for own, sums, how in kinds)
        raise UnsupportedKernel(
            f"expected matrix products that are added up to be of one type and precision; got "
            f"{listed}"
        )
    ((dtype, _, _),) = kinds
    return dtype


def _check_type(spec: KernelSpec, node: visitor.Contract) -> np.dtype:
    lhs, rhs = (_own_dtype(spec, operand) for operand in (node.lhs, node.rhs))
    if lhs != rhs:
        raise UnsupportedKernel(f"expected operands of one type in a product, got {lhs} and {rhs}")
    if PRODUCT_DTYPES.get(lhs) != node.dtype:
        pairs = ", ".join(f"{o.name} to {p.name}" for o, p in PRODUCT_DTYPES.items())
        raise UnsupportedKernel(
            f"expected a product of types {pairs}; got {lhs.name} to {node.dtype.name}"
        )
    if node.precision not in visitor.PRECISIONS:
        raise UnsupportedKernel(
            f"expected a precision of {', '.join(visitor.PRECISIONS)}; got {node.precision!r}"
        )
    if node.precision != "ieee" and lhs != np.dtype("float32"):
        raise UnsupportedKernel(
            f"expected precision 'ieee' of a product of {lhs.name}, got {node.precision!r}"
        )
    return lhs


def _check_axes(spec: KernelSpec, terms: tuple[Term, ...]) -> None:
    dependencies = visitor.dependencies(spec.tree, spec.space)
    contracted = {term.node.over for term in terms}
    for term in terms:
        for operand, name, free in ((term.node.lhs, "lhs", "m"), (term.node.rhs, "rhs", "n")):
            if others := dependencies[operand] - {"batch", free, term.node.over}:
                raise UnsupportedKernel(f"operand {name} of a product varies along {min(others)!r}")
            parts = parts_of(spec.tree, operand)
            if any(isinstance(spec.tree[part], visitor.Reduce) for part in parts):
                raise UnsupportedKernel(f"operand {name} of a product holds a reduction")
    for at, other_node in enumerate(spec.tree):
        if contracted & dependencies[at] and isinstance(other_node, visitor.Store):
            raise UnsupportedKernel("an operand of a product is stored by the same kernel")
        if isinstance(other_node, visitor.Reduce):
            _check_reduction(spec, at, other_node)


def _check_reduction(spec: KernelSpec, position: int, node: visitor.Reduce) -> None:
    if node.over not in ("m", "n") or node.op not in OPERATIONS:
        raise UnsupportedKernel(
            f"expected a reduction {', '.join(OPERATIONS)} along m or n beside a product, got "
            f"{node.op!r} along {node.over!r}"
        )
    for reader in spec.tree:
        if position not in visitor.operands(reader) or isinstance(reader, visitor.Store):
            continue
        same = isinstance(reader, visitor.Reduce) and (
            (reader.op, partial_dtype(reader)) == (node.op, partial_dtype(node))
        )
        if not same:
            raise UnsupportedKernel(
                "the result of a reduction beside a product is used in the same kernel"
            )


def _check_aliases(spec: KernelSpec, position: int) -> None:
    """An output may take the place of what the epilogue reads, element by element."""
    prologue = parts_of(spec.tree, position)
    for source, output in spec.aliases:
        stored = [n.index for n in spec.tree if isinstance(n, visitor.Store) and n.output == output]
        for at, reader in enumerate(spec.tree):
            if not isinstance(reader, visitor.Load | visitor.Lookup) or reader.input != source:
                continue
            elsewhere = isinstance(reader, visitor.Lookup) or stored != [reader.index]
            if at in prologue or elsewhere:
                raise UnsupportedKernel(
                    f"output {output} takes the place of input {source}, "
                    "of which other tiles may still be read"
                )
