"""The layout of an attention's operands: the one that costs the fewest transpositions.

Operands are taken from what they are views of: where the program has ``[B, T, N, H]`` or
``[B, N, T, H]``, they are reshaped only, which moves nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from jevt.lowering.axes import Factor
from jevt.passes.attention.match import Match
from jevt.passes.attention.roles import Roles
from jevt.primitives.attention import Layout, Shape


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The parts of an attention's axes in a layout.

    Attributes:
      layout: of the operands.
      batch, queries, keys, heads, groups, width, value_width: their names; ``heads`` are key heads,
        each shared by ``groups`` query heads.
    """

    layout: Layout
    batch: tuple[Factor, ...]
    queries: tuple[Factor, ...]
    keys: tuple[Factor, ...]
    heads: tuple[Factor, ...]
    groups: tuple[Factor, ...]
    width: tuple[Factor, ...]
    value_width: tuple[Factor, ...]

    def shape(self) -> Shape:
        """Its sizes."""
        heads = size(self.heads)
        return Shape(
            size(self.batch),
            size(self.queries),
            size(self.keys),
            heads * size(self.groups),
            heads,
            size(self.width),
            size(self.value_width),
        )

    def of_queries(self, width: Sequence[Factor]) -> list[tuple[Factor, ...]]:
        """The four axes of q and out."""
        return self._ordered(self.queries, (*self.heads, *self.groups), tuple(width))

    def of_keys(self, width: Sequence[Factor]) -> list[tuple[Factor, ...]]:
        """The four axes of k and v."""
        return self._ordered(self.keys, self.heads, tuple(width))

    def _ordered(
        self, sequence: tuple[Factor, ...], heads: tuple[Factor, ...], width: tuple[Factor, ...]
    ) -> list[tuple[Factor, ...]]:
        if self.layout == "BTNH":
            return [self.batch, sequence, heads, width]
        return [self.batch, heads, sequence, width]

    def moved(self, roles: Roles) -> int:
        """Elements of the operands that are not in this order in memory."""
        wanted = [
            (roles.q, self.of_queries(self.width)),
            (roles.k, self.of_keys(self.width)),
            (roles.v, self.of_keys(self.value_width)),
        ]
        if roles.d_out is not None:
            wanted.append((roles.d_out, self.of_queries(self.value_width)))
        return sum(
            size(use.atoms())
            for use, axes in wanted
            if use.atoms() != [atom for axis in axes for atom in axis]
        )


def arrange(match: Match) -> Arrangement:
    """The arrangement that moves the fewest operands."""
    rows = {name for value in match.added() for name in match.labels.of(value)}

    def cost(option: Arrangement) -> tuple[int, int, int, int]:
        return (
            len(rows.intersection(option.groups)),
            option.moved(match.roles),
            len(option.queries),
            -size(option.queries),
        )

    return min(_arrangements(match), key=cost)


def _arrangements(match: Match) -> Iterator[Arrangement]:
    axes = match.roles.axes
    rows = axes.rows
    ranges = list(itertools.combinations(range(len(rows) + 1), 2))
    slices = [rows[i:j] for i, j in ranges]
    for queries in slices:
        if match.causal and queries != match.causal:
            continue
        groups = tuple(name for name in rows if name not in queries)
        for order, sequence in (
            (match.roles.q.atoms(), queries),
            (match.roles.k.atoms(), axes.keys),
        ):
            start = min(order.index(name) for name in sequence)
            batch = [name for name in order if name in axes.batch]
            inner = [name for name in batch if order.index(name) > start]
            heads = inner or batch[1:][-1:]
            layouts: tuple[Layout, ...] = ("BTNH", "BNTH")
            for layout in layouts:
                yield Arrangement(
                    layout,
                    tuple(name for name in batch if name not in heads),
                    queries,
                    axes.keys,
                    tuple(heads),
                    groups,
                    axes.width,
                    axes.value_width,
                )


def size(names: Sequence[Factor]) -> int:
    """Elements along all these axes."""
    return math.prod(name.size for name in names)
