"""The partitioner on whole training graphs: ``python -m benchmarks partition``.

Nothing is run: the steps are traced at their full shapes, rewritten and partitioned as for a GPU.
The plans of the five workloads are compared with what greedy fusion makes of the same equations
(:mod:`benchmarks.greedy_fusion`), and planning is timed for BERT- and GPT-3-shaped models of up to
96 layers. Rows go to ``results/partition.json``, tables and chart to ``docs/partitioner.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import Jaxpr

from benchmarks import machine, registry, shapes
from benchmarks.greedy_fusion import GREEDY
from benchmarks.models import bert, gpt
from benchmarks.options import SIZES, Options
from benchmarks.report import partitioner
from benchmarks.results import Header
from benchmarks.workload import Workload
from jevt import pipeline
from jevt._context import Context, Device
from jevt.lowering.rules import classify
from jevt.partition import graph as graphs
from jevt.partition import partition, targets
from jevt.partition.batch import available
from jevt.partition.components import moved
from jevt.partition.cost import DEVICES
from jevt.partition.graph import Graph
from jevt.partition.plan import Plan
from jevt.partition.problem import Grouping, Launches, Problem, Work

WORKLOADS = "bert,vit,resnet,xmlcnn,gcn"
LAYERS = "1,4,12,24,48,96"
DEVICE = "H100"
#: The partitioner's default; a busy machine may want more for the plans of an idle one.
LIMIT = 10.0
JSON = machine.ROOT / "benchmarks" / "results" / "partition.json"
PAGE = machine.ROOT / "docs" / "partitioner.md"


@dataclass(frozen=True)
class PlanRow:
    """One way of grouping the fusible equations of one workload.

    Attributes:
      variant: "jevt", or a name of ``GREEDY``.
      equations: of the program after the passes, all of them.
      groups: of fusible equations; one that only relabels bytes is none.
      cut_bytes: of values that one of these groups writes and another reads: written once, read by
        each.
      moved_bytes: all that these groups read and write.
      objective_us: what the partitioner minimises: the predicted time of these groups.
      status, gap, stopped: of the search; empty for greedy fusion.
      seconds: of the clock, for the plan (greedy fusion: for the groups).
    """

    workload: str
    variant: str
    equations: int
    groups: int
    cut_bytes: int
    moved_bytes: int
    objective_us: float
    seconds: float
    status: str = ""
    gap: float | None = None
    stopped: str = ""


@dataclass(frozen=True)
class DepthRow:
    """Planning a model of some depth.

    Attributes:
      equations: of the program after the passes.
      seconds, cpu_seconds: of the partitioner, by the clock and of all processors together.
      gap: between the plan and the proven bound.
    """

    model: str
    layers: int
    equations: int
    groups: int
    seconds: float
    cpu_seconds: float
    status: str
    gap: float


def traced(workload: Workload, device: Device, limit: float = LIMIT) -> tuple[Jaxpr, Context]:
    """The training step after the passes, constants as inputs; ``limit`` is the time limit."""
    jaxpr = jax.make_jaxpr(workload.step)(*workload.shapes())
    context = Context("cuda", "auto", False, (False,) * len(jaxpr.invars), device)
    for _, graph_pass in pipeline.graph_passes(context):
        jaxpr = graph_pass(jaxpr)
    return jaxpr.with_consts(()), dataclasses.replace(context, partition_seconds=limit)


def compare(name: str, jaxpr: Jaxpr, context: Context) -> Iterator[PlanRow]:
    """jevt's plan, and what greedy fusion makes of the plan's equations."""
    start = time.perf_counter()
    plan = partition(jaxpr, context)
    seconds = time.perf_counter() - start
    graph = graphs.from_jaxpr(plan.jaxpr, classify)
    price = Price(graph, context)
    yield price.row(
        name, "jevt", groups_of(plan), seconds, status=plan.solution.status,
        gap=plan.solution.gap, stopped=plan.solution.stopped,
    )  # fmt: skip
    for variant, fuse in GREEDY.items():
        start = time.perf_counter()
        groups = fuse(graph)
        yield price.row(name, variant, groups, time.perf_counter() - start)


def groups_of(plan: Plan) -> Grouping:
    """The groups of fusible equations."""
    return [list(group.eqns) for group in plan.groups if group.kind != "opaque"]


class Price:
    """The partitioner's objective for any grouping of a graph with one node an equation."""

    def __init__(self, graph: Graph, context: Context) -> None:
        self.graph = graph
        self.context = context
        part = [n for n, node in enumerate(graph.nodes) if not node.opaque]
        self.local = {node: index for index, node in enumerate(part)}
        free = tuple(graph.nodes[n].free for n in part)
        tensors = tuple(traffic for traffic, _ in moved(graph, part))
        none: tuple[Any, ...] = ()
        works = (Work(),) * len(part)
        self.problem = Problem(
            len(part), none, none, none, tensors, none, none, none, free, Launches(0), works
        )

    def row(
        self, name: str, variant: str, groups: Grouping, seconds: float, **more: Any
    ) -> PlanRow:
        """The grouping's row."""
        local = [sorted(self.local[n] for n in group) for group in groups]
        idle = sum(len(g) == 1 and self.problem.free[g[0]] for g in local)
        return PlanRow(
            workload=name,
            variant=variant,
            equations=len(self.graph.nodes),
            groups=len(local) - idle,
            cut_bytes=self._cut(local),
            moved_bytes=self.problem.cost(local),
            objective_us=sum(targets.predicted_us(self.graph, g, self.context) for g in groups),
            seconds=seconds,
            **more,
        )

    def _cut(self, groups: Grouping) -> int:
        owner = {node: index for index, group in enumerate(groups) for node in group}
        total = 0
        for tensor in self.problem.tensors:
            if tensor.producer is None:
                continue
            home = owner[tensor.producer]
            share: dict[int, int] = {}
            for node, amount in zip(tensor.consumers, tensor.read_bytes, strict=True):
                if owner[node] != home:
                    share[owner[node]] = max(amount, share.get(owner[node], 0))
            total += sum(share.values()) + (tensor.nbytes if share else 0)
        return total


#: Models by name: layers -> workload.
MODELS: Mapping[str, Callable[[int], Workload]] = {
    "bert": lambda n: bert.make(Options(), dataclasses.replace(shapes.BERT["full"], layers=n)),
    "gpt-3": lambda n: gpt.make(dataclasses.replace(shapes.GPT3, layers=n), Options()),
}


def depth(model: str, layers: int, device: Device, limit: float) -> DepthRow:
    """Times the partitioner on a model of that depth."""
    jaxpr, context = traced(MODELS[model](layers), device, limit)
    clock, cpu = time.perf_counter(), time.process_time()
    plan = partition(jaxpr, context)
    return DepthRow(
        model=model,
        layers=layers,
        equations=len(jaxpr.eqns),
        groups=len(groups_of(plan)),
        seconds=time.perf_counter() - clock,
        cpu_seconds=time.process_time() - cpu,
        status=plan.solution.status,
        gap=plan.solution.gap,
    )


def run(arguments: Sequence[str]) -> int:
    """``python -m benchmarks partition``: plans against greedy fusion; planning time by depth."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks partition", description=run.__doc__)
    parser.add_argument("--workloads", default=WORKLOADS, help=f"default {WORKLOADS}")
    parser.add_argument("--size", default="full", choices=SIZES)
    parser.add_argument("--layers", default=LAYERS, help=f"comma-separated; default {LAYERS}")
    parser.add_argument("--models", default=",".join(MODELS), help="whose depth is varied")
    parser.add_argument("--device", default=DEVICE, choices=sorted(DEVICES), help="planned for")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds; default %(default)s")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--page", type=Path, default=PAGE, help="default docs/partitioner.md")
    args = parser.parse_args(arguments)
    try:
        names = registry.expand([n for n in args.workloads.split(",") if n])
    except ValueError as error:
        parser.error(str(error))
    device = DEVICES[args.device]
    plans, depths = [], []
    load = [os.getloadavg()[0]]
    for name in names:
        plans += compare(
            name, *traced(registry.make(name, Options(size=args.size)), device, args.limit)
        )
        print(partitioner.plan_table(list(map(dataclasses.asdict, plans[-1 - len(GREEDY) :]))))
    chosen = [m for m in args.models.split(",") if m]
    for model, layers in itertools.product(chosen, map(int, filter(None, args.layers.split(",")))):
        depths.append(depth(model, layers, device, args.limit))
        load.append(os.getloadavg()[0])
        print(depths[-1])
    header = Header(
        machine.processor(available()),
        machine.framework_versions(),
        machine.commit(),
        machine.now(),
    )
    content = {
        **dataclasses.asdict(header),
        "planned_for": device.name,
        "limit": args.limit,
        "load": [min(load), max(load)],
        "rows": list(map(dataclasses.asdict, plans)),
        "depths": list(map(dataclasses.asdict, depths)),
    }
    args.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    partitioner.write_page(content, args.page, args.json.with_suffix(".png"))
    return 0
