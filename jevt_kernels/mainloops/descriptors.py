"""Operands that the tensor memory accelerator of sm_90 and later copies to shared memory.

A tensor descriptor says where a tensor lies; one thread then asks for a whole tile by its
coordinates, no thread computes addresses, and what lies beyond the tensor's end comes as zeros. The
rules are those of CUDA's tensor maps: one axis is contiguous; the strides of the others, and the
start of each tile, are multiples of 16 bytes.
"""

from __future__ import annotations

import dataclasses

from jevt_kernels import visitor
from jevt_kernels.index_map import Digit
from jevt_kernels.mainloops.product import Product
from jevt_kernels.mainloops.terms import Term
from jevt_kernels.spec import Config, Descriptor, KernelSpec

_ALIGNMENT = 16
_LARGEST_RANK = 5


@dataclasses.dataclass(frozen=True)
class Described:
    """How an operand of a product is described.

    Attributes:
      input: of the kernel.
      shape, strides: of the dimensions: those of batch axes, then one along rows or columns and one
        along ``k``, the contiguous one last.
      first: coordinates of the first element.
      batch: how the coordinates of the leading dimensions follow from the batch index.
      outer, inner: the tile axes of the last two dimensions; "k" is that which the term contracts.
    """

    input: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: tuple[int, ...]
    batch: tuple[Digit, ...]
    outer: str
    inner: str

    def parameter(self, name: str, config: Config) -> Descriptor:
        """The kernel's parameter."""
        block = (*(1 for _ in self.batch), config.block(self.outer), config.block(self.inner))
        return Descriptor(name, self.input, self.shape, self.strides, block)

    def coordinates(self, starts: dict[str, str]) -> str:
        """Where a tile lies that starts there along its axes, as the text of a list."""
        steps = [_coordinate(digit) for digit in self.batch]
        steps += [starts[self.outer], starts[self.inner]]
        pairs = zip(steps, self.first, strict=True)
        texts = (f"{step} + {first}" if first else step for step, first in pairs)
        return f"[{', '.join(texts)}]"

    def load(self, name: str, starts: dict[str, str], rows: str) -> str:
        """A tile as an expression.

        Args:
          name: of the parameter.
          starts: where the tile starts along its axes.
          rows: the tile axis that is the tile's first dimension.
        """
        text = f"{name}.load({self.coordinates(starts)})"
        if self.batch:
            shape = ", ".join(f"BLOCK_{axis.upper()}" for axis in (self.outer, self.inner))
            text = f"tl.reshape({text}, ({shape}))"
        return text if self.outer == rows else f"tl.trans({text})"


def describe(spec: KernelSpec, found: Product, term: Term, free: str) -> Described | None:
    """The description of an operand, None where the rules are not met.

    Args:
      spec: the kernel.
      found: its product.
      term: the term of it.
      free: the tile axis of the operand's rows or columns, "m" or "n".
    """
    node = spec.tree[term.node.lhs if free == "m" else term.node.rhs]
    if not isinstance(node, visitor.Load) or not term.k:
        return None
    extents = {"m": found.m, "n": found.n, "k": term.k}
    strides: dict[str, int] = {}
    for name, axis in ((free, free), ("k", term.node.over)):
        digits = node.index.digits(spec.space, spec.space.tile_axis(axis))
        if len(digits) != 1 or digits[0].divisor != 1 or digits[0].modulus is not None:
            return None
        strides[name] = digits[0].stride
    outer, inner = (free, "k") if strides["k"] == 1 else ("k", free)
    batch = node.index.digits(spec.space, spec.space.tile_axis("batch"))
    steps = (*(digit.stride for digit in batch), strides[outer], strides[inner])
    if strides[inner] != 1 or len(steps) > _LARGEST_RANK or min(steps) < 1:
        return None
    offsets = (*steps[:-1], node.index.offset)
    if any(offset * found.dtype.itemsize % _ALIGNMENT for offset in offsets):
        return None
    sizes = [digit.modulus or -(-found.batch // digit.divisor) for digit in batch]
    sizes += [extents[outer], extents[inner]]
    first = _coordinates(node.index.offset, steps)
    return Described(
        node.input,
        tuple(start + size for start, size in zip(first, sizes, strict=True)),
        steps,
        first,
        batch,
        outer,
        inner,
    )


def _coordinates(offset: int, steps: tuple[int, ...]) -> tuple[int, ...]:
    """Coordinates of an address; a descriptor starts where its tensor does, aligned."""
    result = [0] * len(steps)
    for dimension in sorted(range(len(steps)), key=lambda d: -steps[d]):
        result[dimension], offset = divmod(offset, steps[dimension])
    return tuple(result)


def _coordinate(digit: Digit) -> str:
    text = "batch" if digit.divisor == 1 else f"batch // {digit.divisor}"
    return text if digit.modulus is None else f"{text} % {digit.modulus}"
