"""How the tiles of operands lie in the ring of buffers of a specialised kernel.

The terms of a sum of products share the ring's memory. Tiles of two terms that differ in which of
their axes is contiguous, or in their batch axes, have as many bytes, in another order: then the
ring has two names, each with the layout of its tiles.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

from jevt_kernels.mainloops.descriptors import Described
from jevt_kernels.mainloops.product import Product
from jevt_kernels.mainloops.terms import Term
from jevt_kernels.spec import Config

OPERANDS = ("lhs", "rhs")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of an operand of a term.

    Attributes:
      operand: "lhs" or "rhs".
      descriptor: name of the parameter from which they are loaded.
      described: what it describes.
      block: shape of a tile.
      buffers: name of the ring with the layout of these tiles.
    """

    operand: str
    descriptor: str
    described: Described
    block: tuple[int, ...]
    buffers: str


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps of a tile of the result whose operands lie in the ring in one way.

    Attributes:
      first, end: the first step, and the one that follows the last.
      tiles: of both operands.
    """

    first: int
    end: int
    tiles: tuple[Tiles, ...]


@dataclasses.dataclass(frozen=True)
class Ring:
    """What goes through the ring for a tile of the result.

    Attributes:
      terms: those that have elements to multiply, each with its steps along ``k`` and the tiles of
        its operands.
    """

    terms: tuple[tuple[int, tuple[Tiles, ...]], ...]

    @property
    def steps(self) -> int:
        """Of all terms."""
        return sum(steps for steps, _ in self.terms)

    @property
    def buffers(self) -> list[Tiles]:
        """For each name of the ring the first tiles that lie in it, in order."""
        first: dict[str, Tiles] = {}
        for _, operands in self.terms:
            for tiles in operands:
                first.setdefault(tiles.buffers, tiles)
        return list(first.values())

    @property
    def stretches(self) -> list[Stretch]:
        """The steps in order, as few stretches as there can be."""
        result: list[Stretch] = []
        first = 0
        for _, group in itertools.groupby(self.terms, lambda t: [o.buffers for o in t[1]]):
            members = list(group)
            end = first + sum(steps for steps, _ in members)
            result.append(Stretch(first, end, members[0][1]))
            first = end
        return result


def multiplied(found: Product) -> list[Term]:
    """The terms that have elements to multiply."""
    return [term for term in found.terms if term.k]


def lay_out(found: Product, described: Mapping[str, Described], config: Config) -> Ring:
    """What goes through a kernel's ring, and under which names of it.

    Args:
      found: the kernel's product.
      described: the descriptions of all operands of terms that have elements, by the names of
        parameters.
      config: of the kernel.
    """
    names: dict[tuple[object, ...], str] = {}

    def tiles(operand: str, term: Term) -> Tiles:
        descriptor = f"{operand}{term.number}_desc"
        own = described[descriptor]
        block = own.parameter("", config).block
        another = any(known == operand for known, *_ in names)
        name = f"{operand}{term.number if another else ''}_tiles"
        buffers = names.setdefault((operand, own.inner, block), name)
        return Tiles(operand, descriptor, own, block, buffers)

    return Ring(
        tuple(
            (term.steps(config.block("k")), tuple(tiles(operand, term) for operand in OPERANDS))
            for term in multiplied(found)
        )
    )
