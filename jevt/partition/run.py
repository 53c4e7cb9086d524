"""Jaxpr to plan: the stages of the partitioner in the order in which they run."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Hashable, Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt import _jaxpr
from jevt._context import Context
from jevt.lowering.errors import NotFusible
from jevt.partition import copies, horizontal, order, prices, side_by_side, targets
from jevt.partition import graph as graphs
from jevt.partition.absorb import absorb, allowance
from jevt.partition.batch import Component, Solver
from jevt.partition.build import Build, Builder
from jevt.partition.build import part as part_of
from jevt.partition.canonical import arranged, equations
from jevt.partition.components import moved, pose, split
from jevt.partition.contract import contract
from jevt.partition.duplicate import duplicate, merge_copies
from jevt.partition.graph import Classify, Graph, Reading, Role
from jevt.partition.plan import Plan, Solution
from jevt.partition.prices import Prices
from jevt.partition.problem import Grouping, Problem
from jevt.partition.reach import Links, Reach
from jevt.partition.recompute import recompute
from jevt.partition.refusals import Oracle
from jevt.partition.solve import Outcome, Status


def partition(
    jaxpr: Jaxpr,
    context: Context,
    *,
    classify: Classify | None = None,
    build: Build | None = None,
    workers: int | None = None,
) -> Plan:
    """Partitions a program into groups: each one kernel, or left to XLA with a reason.

    Args:
      jaxpr: the program after the passes.
      context: device, backend and time limit.
      classify: what an equation can be in a kernel; ``lowering.rules.classify`` by default.
      build: makes a group a kernel, or refuses; ``lowering.spec.build`` by default.
      workers: how many components are solved at a time; as there are processors by default.

    Returns:
      A plan whose groups hold every equation once, in an executable order. The same jaxpr and
      context give the same plan, whatever the number of workers and the load of the machine,
      unless the clock is what stopped the solver (``Solution.stopped``).
    """
    # Imported here so that the partitioner can be tested without the lowering.
    if classify is None:
        from jevt.lowering import rules

        classify = rules.classify
    if build is None:
        from jevt.lowering import spec

        build = spec.build
    run = _Run(classify, Builder(build), context.partition_seconds, workers)
    plan = run.plan(jaxpr, context)
    return plan if context.fuel is None else targets.limit_fuel(plan, context.fuel)


class _Run:
    """One call of :func:`partition`: its tools, and what it has already built and solved."""

    def __init__(
        self, classify: Classify, builder: Builder, seconds: float, workers: int | None
    ) -> None:
        self.classify = _once_each(classify)
        self.builder = builder
        self.solver = Solver(seconds, workers)

    def plan(self, jaxpr: Jaxpr, context: Context) -> Plan:
        started = time.monotonic()
        # 1. equations as nodes; what is cheap to make again copied, what stays together joined
        jaxpr = recompute(graphs.read(jaxpr, self.classify), context.device)
        jaxpr = duplicate(graphs.read(jaxpr, self.classify))
        single = self._checked(graphs.from_jaxpr(jaxpr, self.classify))

        def accepts(positions: tuple[int, ...]) -> bool:
            return self._accepts(single.extract(positions))

        graph = contract(single, accepts)
        launch = round(context.device.triton_launch_us * context.device.bytes_per_us)
        # 2. components that no good group crosses, each solved
        reach = Reach.of(graph)
        parts, links = split(graph, reach, launch)
        fewer = absorb(graph, reach, parts, links, accepts, launch)
        if fewer is not graph:
            graph, reach = fewer, Reach.of(fewer)
            parts, links = split(graph, reach, launch)
        parts = [arranged(graph, reach, part) for part in parts]
        costs = prices.prices(graph, single, context)
        outcomes = self._solve(graph, reach, parts, links, costs, context)
        # 3. components whose groups form a cycle together, solved as one
        while True:
            laid, groups, origin = copies.materialise(graph, _all_groups(graph, parts, outcomes))
            cyclic = self._cycle(laid, groups, outcomes)
            if cyclic is None:
                break
            merged = arranged(graph, reach, sorted(n for index in cyclic for n in parts[index]))
            keep = [i for i in range(len(parts)) if i not in cyclic]
            parts = [parts[i] for i in keep] + [merged]
            outcomes = [outcomes[i] for i in keep]
            outcomes += self._solve(graph, reach, [merged], links, costs, context)
        # 4. groups in an executable order, each with its target
        jaxpr = laid.jaxpr
        moved = ({old: new} for new, old in enumerate(origin))
        each = Reading(
            jaxpr,
            tuple(copies.moved(single.nodes[p], at) for p, at in zip(origin, moved, strict=True)),
        )
        ordered = _ordered(laid, groups)
        chosen = tuple(
            targets.choose(laid, each, nodes, index, context, self.builder)
            for index, nodes in enumerate(ordered)
        )
        # 5. those that do the same for tensors of their own, a launch for many
        chosen = horizontal.merge(chosen, order.quotient(ordered, laid.successors), jaxpr, context)
        chosen = side_by_side.merge(chosen, context)
        lost = allowance(graph, launch) / context.device.bytes_per_us
        lost += prices.unproven_us(graph, single, context.device)
        solution = Solution(
            _worst([o.status for o in outcomes] + ["feasible"] * (lost > 0)),
            sum(o.cost * o.unit for o in outcomes),
            sum(o.bound * o.unit for o in outcomes) - lost,
            time.monotonic() - started,
            max((o.rounds for o in outcomes), default=0),
            max((o.stopped for o in outcomes), default="", key=("", "work", "clock").index),
        )
        # 6. bodies of control flow, each a plan of its own
        return Plan(jaxpr, chosen, solution, self._nested(jaxpr, context), context)

    def _checked(self, graph: Graph) -> Graph:
        """The graph, with what ``build`` refuses even alone made opaque."""
        nodes = list(graph.nodes)
        for index, node in enumerate(nodes):
            asked = node.kind in ("pointwise", "reduction", "contraction")
            if asked and node.size > 1:
                reason = self.builder.refusal(graph.extract(node.eqns))
                if reason:
                    nodes[index] = graphs.Node(node.eqns, "opaque", reason=reason, fallback=True)
        return dataclasses.replace(graph, nodes=tuple(nodes))

    def _solve(
        self,
        graph: Graph,
        reach: Reach,
        parts: Sequence[list[int]],
        links: Links,
        costs: Prices,
        context: Context,
    ) -> list[Outcome]:
        problems = [pose(graph, reach, part, links, costs) for part in parts]
        return self.solver.solve(
            [
                self._component(graph, part, problem, context)
                for part, problem in zip(parts, problems, strict=True)
            ]
        )

    def _component(
        self, graph: Graph, part: Sequence[int], problem: Problem, context: Context
    ) -> Component:

        def positions(local: Sequence[int]) -> list[int]:
            return [p for n in local for p in graph.nodes[part[n]].eqns]

        @functools.cache
        def variables() -> list[Var]:
            return [var for _, var in moved(graph, part)]

        def keeps(local: Sequence[int], stored: Sequence[int]) -> bool:
            group = graph.extract(positions(local))
            kept = {variables()[t] for t in stored}
            made = [v for eqn in group.eqns for v in eqn.outvars if v in kept]
            return self._accepts(_jaxpr.make(group.invars, made, group.eqns))

        def measured(local: Sequence[int]) -> int | None:
            us = targets.measured_us(graph, [part[n] for n in local], context, self.builder)
            return None if us is None else round(us / problem.unit)

        oracle = Oracle(
            lambda local: self._accepts(graph.extract(positions(local))),
            lambda local, stored: self._accepts(
                part_of(graph, positions(local), [variables()[t] for t in stored])
            ),
            measured,
            keeps,
        )
        return Component(self._key(graph, part, problem), problem, oracle)

    def _accepts(self, jaxpr: Jaxpr) -> bool:
        made = (v for eqn in jaxpr.eqns for v in eqn.outvars)
        if all(graphs.elements(v.aval) <= 1 for v in (*jaxpr.invars, *made)):
            return True  # numbers are never a kernel of ours, and XLA runs however many there are
        return self.builder.accepts(merge_copies(jaxpr))

    def _key(self, graph: Graph, part: Sequence[int], problem: Problem) -> Hashable:
        """Equal for components with equal equations in equal nodes and an equal border."""
        nodes = tuple(len(graph.nodes[n].eqns) for n in part)
        sequence = graph.sequence(equations(graph, part))
        return nodes, problem.key(), self.builder.keys.key(sequence)

    def _cycle(
        self, graph: Graph, groups: Grouping, outcomes: Sequence[Outcome]
    ) -> set[int] | None:
        """Components whose groups are on a cycle of the quotient graph."""
        found = order.cycle(order.quotient(groups, graph.successors))
        if found is None:
            return None
        home = [index for index, outcome in enumerate(outcomes) for _ in outcome.groups]
        result = {home[g] for g in found if g < len(home)}
        assert len(result) > 1, "the groups of one component are acyclic, other paths included"
        return result

    def _nested(self, jaxpr: Jaxpr, context: Context) -> tuple[tuple[tuple[int, int], Plan], ...]:
        result: list[tuple[tuple[int, int], Plan]] = []
        for position, eqn in enumerate(jaxpr.eqns):
            parameters = graphs.BODIES.get(eqn.primitive.name, frozenset())
            inner = targets.body_context(context, eqn.primitive.name, eqn.params)
            inner = dataclasses.replace(inner, donated=())  # buffers of a body are XLA's
            for ordinal, (parameter, _, body) in enumerate(_jaxpr.subjaxprs(eqn)):
                if parameter in parameters:
                    result.append(((position, ordinal), self.plan(body, inner)))
        return tuple(result)


def _once_each(classify: Classify) -> Classify:
    """``classify`` with a memory, as the program is read once before and once after copying."""
    # The equation is kept beside its role so that its id stays its own.
    known: dict[int, tuple[JaxprEqn, Role | NotFusible]] = {}

    def remembered(eqn: JaxprEqn) -> Role:
        if id(eqn) not in known:
            try:
                known[id(eqn)] = eqn, classify(eqn)
            except NotFusible as refusal:
                known[id(eqn)] = eqn, refusal
        role = known[id(eqn)][1]
        if isinstance(role, NotFusible):
            raise role
        return role

    return remembered


def _all_groups(
    graph: Graph, parts: Sequence[Sequence[int]], outcomes: Sequence[Outcome]
) -> list[list[int]]:
    """The groups of all components, and each opaque node as one."""
    groups = [
        [part[n] for n in group]
        for part, outcome in zip(parts, outcomes, strict=True)
        for group in outcome.groups
    ]
    return groups + [[n] for n, node in enumerate(graph.nodes) if node.opaque]


def _ordered(graph: Graph, groups: list[list[int]]) -> list[list[int]]:
    keys = [min(graph.nodes[n].eqns[0] for n in group) for group in groups]
    ranks = order.executable(keys, order.quotient(groups, graph.successors))
    assert ranks is not None, "cycles were removed above"
    return [groups[index] for index in ranks]


def _worst(statuses: Sequence[Status]) -> Status:
    ranking: tuple[Status, ...] = ("greedy", "feasible", "optimal")
    return next((s for s in ranking if s in statuses), "trivial")
