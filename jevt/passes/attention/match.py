"""A recognised attention."""

from __future__ import annotations

import dataclasses

from jax.extend.core import JaxprEqn, Var

from jevt.lowering.axes import Factor
from jevt.passes.attention.labels import Labels
from jevt.passes.attention.region import Region, is_renaming
from jevt.passes.attention.roles import Part, Roles


@dataclasses.dataclass(frozen=True)
class Match:
    """An attention: what is emitted in the place of a region.

    Attributes:
      region, labels, roles: where it was found.
      scale: factor of the scores.
      biases: (factor, value) of what is added to the scores.
      masks: (value, what it is where a key is seen), without the causal one.
      causal: the names of the queries' axis, if a query sees the keys up to its own position.
      may_be_blind: whether the masks may hide all keys from a query.
    """

    region: Region
    labels: Labels
    roles: Roles
    scale: float
    biases: tuple[tuple[float, Var], ...]
    masks: tuple[tuple[Var, bool], ...]
    causal: tuple[Factor, ...]
    may_be_blind: bool

    def added(self) -> list[Var]:
        """The values of biases and masks."""
        return [value for _, value in self.biases] + [value for value, _ in self.masks]

    def replaced(self, part: Part) -> list[int]:
        """Positions of the product that gives a result, and of what only renames it."""
        program = self.region.program
        found = [self.roles.results[part]] if part in self.roles.results else []
        for position in found:
            (out,) = program.eqns[position].outvars
            found += [i for i in program.readers.get(out, ()) if self._renames(program.eqns[i])]
        return found

    def _renames(self, eqn: JaxprEqn) -> bool:
        return is_renaming(eqn) and eqn.outvars[0] in self.labels.axes
