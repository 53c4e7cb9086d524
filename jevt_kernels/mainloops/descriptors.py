"""Operands that the tensor memory accelerator of sm_90 and later copies to shared memory.

A tensor descriptor says where a tensor lies; one thread then asks for a whole tile by its
coordinates, no thread computes addresses, and what lies beyond the tensor's end comes as zeros. The
rules are those of CUDA's tensor maps: one axis is contiguous, the strides of the others are
multiples of 16 bytes, and so is the start. On older GPUs Triton makes ordinary loads of it.
"""

from __future__ import annotations

import dataclasses

from jevt_kernels import visitor
from jevt_kernels.index_map import Digit
from jevt_kernels.mainloops.product import Product
from jevt_kernels.spec import KernelSpec

_ALIGNMENT = 16
_LARGEST_RANK = 5
_LARGEST_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """How an operand of a product is described.

    Attributes:
      input: of the kernel.
      offset: of the first element.
      shape, strides: of the dimensions: those of batch axes, then one along rows or columns and one
        along ``k``, the contiguous one last.
      batch: how the coordinates of the leading dimensions follow from the batch index.
      outer, inner: the tile axes of the last two dimensions.
    """

    input: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    batch: tuple[Digit, ...]
    outer: str
    inner: str

    def make(self) -> str:
        """The descriptor as an expression."""
        base = f"x{self.input} + {self.offset}" if self.offset else f"x{self.input}"
        lists = (self.shape, self.strides)
        shape, strides = (f"[{', '.join(map(str, numbers))}]" for numbers in lists)
        block = ["1"] * len(self.batch) + [f"BLOCK_{name.upper()}" for name in self._last]
        return f"tl.make_tensor_descriptor({base}, {shape}, {strides}, [{', '.join(block)}])"

    def load(self, name: str, starts: dict[str, str], rows: str) -> str:
        """A tile as an expression.

        Args:
          name: that holds the descriptor.
          starts: where the tile starts along its axes.
          rows: the tile axis that is the tile's first dimension.
        """
        coordinates = [_coordinate(digit) for digit in self.batch]
        coordinates += [starts[axis] for axis in self._last]
        text = f"{name}.load([{', '.join(coordinates)}])"
        if self.batch:
            shape = ", ".join(f"BLOCK_{axis.upper()}" for axis in self._last)
            text = f"tl.reshape({text}, ({shape}))"
        return text if self.outer == rows else f"tl.trans({text})"

    @property
    def _last(self) -> tuple[str, str]:
        return self.outer, self.inner


def describe(spec: KernelSpec, found: Product, root: int, free: str) -> Descriptor | None:
    """The descriptor of an operand, None where the rules are not met.

    Args:
      spec: the kernel.
      found: its product.
      root: position of the operand.
      free: the tile axis of the operand's rows or columns, "m" or "n".
    """
    node = spec.tree[root]
    if not isinstance(node, visitor.Load):
        return None
    itemsize = found.dtype.itemsize
    extents = {"m": found.m, "n": found.n, "k": found.k}
    strides: dict[str, int] = {}
    for name in (free, "k"):
        digits = node.index.digits(spec.space, spec.space.tile_axis(name))
        if len(digits) != 1 or digits[0].divisor != 1 or digits[0].modulus is not None:
            return None
        strides[name] = digits[0].stride
    outer, inner = (free, "k") if strides["k"] == 1 else ("k", free)
    batch = node.index.digits(spec.space, spec.space.tile_axis("batch"))
    steps = [*(digit.stride for digit in batch), strides[outer]]
    if strides[inner] != 1 or len(batch) + 2 > _LARGEST_RANK or min(steps) < 1:
        return None
    if any(step * itemsize % _ALIGNMENT for step in (*steps, node.index.offset)):
        return None
    sizes = [digit.modulus or -(-found.batch // digit.divisor) for digit in batch]
    return Descriptor(
        node.input,
        node.index.offset,
        (*sizes, extents[outer], extents[inner]),
        (*steps, 1),
        batch,
        outer,
        inner,
    )


def _coordinate(digit: Digit) -> str:
    text = "batch" if digit.divisor == 1 else f"batch // {digit.divisor}"
    return text if digit.modulus is None else f"{text} % {digit.modulus}"
