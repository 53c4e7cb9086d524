"""Why neighbouring groups of a plan are not one: asked of the code that decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.extend.core import Var

from jevt.partition import graph as graphs
from jevt.partition import order, targets
from jevt.partition.build import Build, Builder
from jevt.partition.graph import Classify, Graph
from jevt.partition.plan import Group, Plan


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A group that reads what another one writes.

    Attributes:
      writer, reader: positions in ``Plan.groups``.
      nbytes: of the values that pass between them through memory.
      reason: why the two are not one group.
    """

    writer: int
    reader: int
    nbytes: int
    reason: str


def neighbours(
    plan: Plan, *, classify: Classify | None = None, build: Build | None = None
) -> list[Neighbour]:
    """All pairs of groups between which the plan cuts an edge, by writer and reader.

    Args:
      plan: as :func:`~jevt.partition.partition` made it; nested plans are not looked into.
      classify: as given to ``partition``.
      build: the same.

    Raises:
      ValueError: the plan does not say for which circumstances it was made.
    """
    if plan.context is None:
        raise ValueError("expected a plan of jevt.partition.partition, got one without a context")
    # Imported here, as in `run`, so that the partitioner can be tested without the lowering.
    if classify is None:
        from jevt.lowering import rules

        classify = rules.classify
    if build is None:
        from jevt.lowering import spec

        build = spec.build
    graph = graphs.from_jaxpr(plan.jaxpr, classify)
    successors = order.quotient([list(g.eqns) for g in plan.groups], graph.successors)
    judge = _Judge(plan, graph, successors, Builder(build))
    passing = _passing(plan)
    return [Neighbour(a, b, passing[a, b], judge.why(a, b)) for a, b in sorted(passing)]


def _passing(plan: Plan) -> dict[tuple[int, int], int]:
    """For each pair of groups, the bytes that the second reads of what the first writes."""
    maker = {
        var: index
        for index, group in enumerate(plan.groups)
        for position in group.eqns
        for var in plan.jaxpr.eqns[position].outvars
    }
    result: dict[tuple[int, int], int] = {}
    for index, group in enumerate(plan.groups):
        eqns = (plan.jaxpr.eqns[p] for p in group.eqns)
        for var in dict.fromkeys(v for e in eqns for v in e.invars if isinstance(v, Var)):
            source = maker.get(var)
            if source is not None and source != index:
                pair = source, index
                result[pair] = result.get(pair, 0) + graphs.nbytes(var.aval)
    return result


class _Judge:
    """Asks ``targets.choose`` about two groups as one."""

    def __init__(
        self, plan: Plan, graph: Graph, successors: Sequence[Sequence[int]], builder: Builder
    ) -> None:
        self.plan = plan
        self.graph = graph
        self.successors = successors
        self.builder = builder
        self.below = [1 << index for index in range(len(plan.groups))]
        for index in reversed(range(len(plan.groups))):  # groups are in an executable order
            for following in successors[index]:
                self.below[index] |= self.below[following]

    def why(self, writer: int, reader: int) -> str:
        first, second = self.plan.groups[writer], self.plan.groups[reader]
        for group in (first, second):
            if group.kind == "opaque":
                return f"{group.name} is left to XLA: {group.reason}"
        for between in self.successors[writer]:
            if between != reader and self.below[between] >> reader & 1:
                name = self.plan.groups[between].name
                return f"{name} has to run between them"
        together = self._as_one(first, second)
        if together.fallback:
            return f"not one kernel: {together.reason}"
        if together.predicted_us is None or first.predicted_us is None:
            return together.reason
        apart = first.predicted_us + (second.predicted_us or 0.0)
        text = f"{together.predicted_us:.1f} µs together, {apart:.1f} µs apart"
        if together.predicted_us < apart:
            text += ", but dearer with what else the plan joins"
        return text

    def _as_one(self, first: Group, second: Group) -> Group:
        positions = sorted((*first.eqns, *second.eqns))
        assert self.plan.context is not None
        return targets.choose(self.graph, self.graph, positions, 0, self.plan.context, self.builder)
