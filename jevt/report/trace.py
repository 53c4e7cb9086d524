"""``Trace``: everything about one compilation, kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jax.extend.core import Jaxpr

from jevt._context import Context

if TYPE_CHECKING:
    from jevt.partition.plan import Plan


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
      name: of the pass, or "trace", "partition", "lower".
      milliseconds: wall time that it took; 0 for "trace", which JAX did.
      jaxpr: its result; for "partition" the plan's, with the copies that it made.
      notes: what the pass says of the program, such as what it nearly recognised and why not.
    """

    name: str
    milliseconds: float
    jaxpr: Jaxpr
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trace:
    """How a function was compiled; prints itself as text.

    Attributes:
      name: of the function.
      context: platform and options.
      stages: every stage with its result, in the order in which they ran.
      plan: which equations run together, as what, and why.
      sources: generated Triton source by group name.
      warnings: what fell back to XLA without the cost model having decided so.
      lazy: names of the outputs that the program does not compute, because of ``jevt.lazy``.
    """

    name: str
    context: Context
    stages: tuple[Stage, ...]
    plan: Plan
    sources: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    lazy: tuple[str, ...] = ()

    @property
    def lowered(self) -> Jaxpr:
        """The program that is handed to XLA."""
        return self.stages[-1].jaxpr

    @property
    def milliseconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.milliseconds for stage in self.stages)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the passes say of the program, each once, under the pass's name."""
        lines = (f"{stage.name}: {note}" for stage in self.stages for note in stage.notes)
        return tuple(dict.fromkeys(lines))

    def stage(self, name: str) -> Stage:
        """The last stage of that name."""
        for stage in reversed(self.stages):
            if stage.name == name:
                return stage
        names = ", ".join(dict.fromkeys(s.name for s in self.stages))
        raise KeyError(f"no stage {name!r}; the stages are {names}")

    def __str__(self) -> str:
        from jevt.report import text

        return text.format_trace(self)
