"""How many times a loop has to go over a row: which reductions along ``col`` one pass can make.

A reduction that needs another's result comes one pass later, with one exception. The sum of a
softmax needs the maximum,

    m = max x;  s = Σ w·exp(x - f(m))            (f: whatever is done to m alone, w: to x alone)

and yet one pass makes both (online softmax; Milakov and Gimelshein, 2018): the sum is kept
relative to the maximum so far, and scaled when that grows. What the pass leaves is m and
s₀ = Σ w·exp(x - m), of the whole row or of a part of it; s = s₀·exp(m - f(m)) once m is known.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.ops import compute_dtype, is_float
from jevt_kernels.spec import KernelSpec
from jevt_kernels.visitor import Compute, Reduce

EXPONENTIALS = ("exp", "exp2")


@dataclasses.dataclass(frozen=True)
class Online:
    """A sum that is made in the same pass as the maximum that it needs.

    Attributes:
      sum: position of the sum.
      maximum: position of the maximum, whose operand is what the exponential is of.
      exponential: position of the exponential, in which the sum's operand is linear.
      subtrahend: position of what is subtracted from the maximum's operand.
    """

    sum: int
    maximum: int
    exponential: int
    subtrahend: int


@dataclasses.dataclass(frozen=True)
class Passes:
    """The passes over a row.

    Attributes:
      of: the reductions of each pass, ascending; passes in order.
      online: by the position of the sum.
      known: for each node of the tree, the number of passes after which its value is known.
    """

    of: tuple[tuple[int, ...], ...]
    online: dict[int, Online]
    known: tuple[int, ...]


def passes(spec: KernelSpec, over: str = "col", free: Collection[int] = ()) -> Passes:
    """The passes that the reductions along ``over`` need.

    Reductions along other axes take no part: nothing in the tree may read them.

    Args:
      spec: the kernel.
      over: a tile axis.
      free: reductions that need no pass of their own once their operand could be computed.
    """
    reading = _Reading(spec, over, free)
    for position in range(len(spec.tree)):
        reading.add(position)
    of: dict[int, list[int]] = collections.defaultdict(list)
    for position, one in reading.number.items():
        of[one].append(position)
    sweeps = tuple(tuple(of[one]) for one in sorted(of))
    return Passes(sweeps, reading.online, tuple(reading.known))


class _Reading:
    """The passes of the nodes so far.

    Attributes:
      number: the pass of each reduction.
    """

    def __init__(self, spec: KernelSpec, over: str, free: Collection[int]) -> None:
        self.tree = spec.tree
        self.inputs = spec.inputs
        self.over = over
        self.free = free
        self.dependencies = visitor.dependencies(spec.tree, spec.space)
        self.known: list[int] = []
        self.number: dict[int, int] = {}
        self.online: dict[int, Online] = {}

    def add(self, position: int) -> None:
        node = self.tree[position]
        before = max((self.known[o] for o in visitor.operands(node)), default=0)
        if isinstance(node, Reduce) and node.over == self.over and position not in self.free:
            found = self._online(position, node)
            if found is not None:
                self.online[position] = found
                before = self.number[found.maximum]
            self.number[position] = before
            before += 1
        self.known.append(before)

    def _online(self, position: int, node: Reduce) -> Online | None:
        """The sum at ``position`` as one that its maximum's pass can make."""
        if node.op != "sum" or not is_float(node.dtype):
            return None
        for maximum, its_pass in self.number.items():
            if self.known[node.operand] != its_pass + 1 or not self._extreme(maximum, node.dtype):
                continue
            free = {p for p in range(position) if self.known[p] <= its_pass}
            for exponential, subtrahend in self._exponentials(maximum, node.dtype):
                reductions = self._reductions_of(subtrahend) - {maximum}
                if reductions <= free and self._multiples(node.operand, exponential, free):
                    return Online(position, maximum, exponential, subtrahend)
        return None

    def _extreme(self, position: int, dtype: np.dtype) -> bool:
        node = self.tree[position]
        assert isinstance(node, Reduce)
        return node.op == "max" and compute_dtype(node.dtype) == compute_dtype(dtype)

    def _exponentials(self, maximum: int, dtype: np.dtype) -> list[tuple[int, int]]:
        """Exponentials of the maximum's operand less a row's value, and the positions of that."""
        (of,) = visitor.operands(self.tree[maximum])
        found = []
        for position, node in enumerate(self.tree[: len(self.known)]):
            if not isinstance(node, Compute) or node.op not in EXPONENTIALS:
                continue
            argument = self.tree[self._bare(node.operands[0])]
            if not isinstance(argument, Compute) or argument.op != "sub":
                continue
            x, subtrahend = argument.operands
            alike = compute_dtype(node.dtype) == compute_dtype(dtype)
            row = self.over not in self.dependencies[subtrahend]
            if alike and row and self._bare(x) == self._bare(of):
                found.append((position, subtrahend))
        return found

    def _dtype(self, position: int) -> np.dtype | None:
        match self.tree[position]:
            case visitor.Load() as node:
                return compute_dtype(self.inputs[node.input].dtype)
            case Compute() | Reduce() | visitor.Constant() as node:
                return compute_dtype(node.dtype)
            case _:
                return None

    def _bare(self, position: int) -> int:
        """The node below conversions that change nothing inside a kernel."""
        node = self.tree[position]
        while isinstance(node, Compute) and node.op in ("convert", "copy"):
            (operand,) = node.operands
            if self._dtype(operand) != self._dtype(position):
                break
            position, node = operand, self.tree[operand]
        return position

    def _reductions_of(self, position: int) -> set[int]:
        """The reductions that a value is made of directly."""
        made = visitor.ancestors(self.tree, position, known=(Reduce,))
        return {p for p in made if isinstance(self.tree[p], Reduce)}

    def _is_zero(self, position: int) -> bool:
        node = self.tree[position]
        if isinstance(node, Compute) and node.op == "convert":
            return self._is_zero(node.operands[0])
        return isinstance(node, visitor.Constant) and node.value == 0

    def _multiples(self, position: int, factor: int, free: Collection[int]) -> bool | None:
        """True for a multiple of ``factor``, False for what is in ``free``, else None.

        What else the multiple is made of is in ``free``.
        """
        if position == factor:
            return True
        if position in free:
            return False
        node = self.tree[position]
        if not isinstance(node, Compute) or node.op not in _LINEAR:
            return None
        parts = [self._multiples(operand, factor, free) for operand in node.operands]
        if None in parts:
            return None
        zeros = [self._is_zero(operand) for operand in node.operands]
        return True if _LINEAR[node.op]([bool(part) for part in parts], zeros) else None


#: Operations that are linear in some of their operands: whether the result is a multiple of a
#: factor, given which operands are multiples of it, the others being free of it, and which are 0.
_LINEAR: dict[str, Callable[[list[bool], list[bool]], bool]] = {
    "convert": lambda multiples, zeros: True,
    "copy": lambda multiples, zeros: True,
    "neg": lambda multiples, zeros: True,
    "mul": lambda multiples, zeros: multiples.count(True) == 1,
    "div": lambda multiples, zeros: multiples == [True, False],
    "add": lambda multiples, zeros: all(multiples),
    "sub": lambda multiples, zeros: all(multiples),
    "select_n": lambda multiples, zeros: (
        not multiples[0] and all(m or z for m, z in zip(multiples[1:], zeros[1:], strict=True))
    ),
}
