"""Decides, group by group, between a generated kernel and XLA, and writes down why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set

from jax.extend.core import Jaxpr, Var

from jevt._context import Context, Device
from jevt.lowering.errors import NotFusible
from jevt.partition import cost, fusions, names, products
from jevt.partition.build import Builder
from jevt.partition.duplicate import merge_copies
from jevt.partition.graph import Graph, Node, Reading, unexpected
from jevt.partition.plan import Group, Plan
from jevt.tuning import known
from jevt_kernels import limits, tuning
from jevt_kernels.spec import Config, KernelSpec

#: Kinds of the groups of one equation that stands for many and runs as one call.
_COMPOSITES = {"attention": "attention", "attention_backward": "attention"}

#: Predictions are wrong by so much: what is not slower by more is planned, and measured, by a
#: compilation that measures.
_TRIED = 1.25


def choose(
    graph: Graph,
    single: Reading,
    nodes: Sequence[int],
    index: int,
    context: Context,
    builder: Builder,
) -> Group:
    """The group of these nodes of ``graph``, the ``index``-th of the plan.

    ``single`` has one node for each equation of the graph, which knows each equation's kind.
    """
    members = [graph.nodes[n] for n in nodes]
    positions = tuple(sorted(p for node in members for p in node.eqns))
    jaxpr = graph.extract(positions)
    if len(members) == 1 and members[0].opaque:
        node = members[0]
        kind = _COMPOSITES.get(jaxpr.eqns[0].primitive.name, "opaque")
        name = names.group_name(index, kind, jaxpr)
        return Group(
            name, "xla", kind, positions, jaxpr, reason=node.reason, fallback=node.fallback
        )
    parts = [single.nodes[p] for p in positions]
    kind = _kind(parts)
    predicted, xla = _times(jaxpr, parts, graph.apart, context.device)
    group = Group(
        names.group_name(index, kind, jaxpr), "xla", kind, positions, jaxpr, None, xla, xla
    )
    trivial = _trivial(jaxpr, parts, context)
    if trivial:
        return dataclasses.replace(group, reason=trivial)
    jaxpr = merge_copies(jaxpr)
    group = dataclasses.replace(group, jaxpr=jaxpr)
    try:
        spec = builder.spec(jaxpr, group.name)
    except NotFusible as refusal:
        reason = str(refusal)
        return dataclasses.replace(group, reason=reason, fallback=unexpected(reason))
    name = names.group_name(index, spec.mainloop, jaxpr)
    group = dataclasses.replace(group, name=name, kind=spec.mainloop, spec=spec)
    reason, fallback = _barred(context)
    if reason:
        return dataclasses.replace(group, reason=reason, fallback=fallback)
    config = _config(spec, context)
    predicted += cost.long_rows_us(spec, context.device)
    kernel = dataclasses.replace(group, target="triton", predicted_us=predicted, config=config)
    if (measured := known.settled(kernel, context)) is not None:
        return measured
    if context.backend == "auto" and predicted > xla * unsure(context):
        reason = f"cost model: {predicted:.1f} µs as a kernel, {xla:.1f} µs as XLA fuses it"
        return dataclasses.replace(group, reason=reason)
    return kernel


def measured_us(
    graph: Graph, nodes: Sequence[int], context: Context, builder: Builder
) -> float | None:
    """What these nodes were measured to take as one group, None if that is not known."""
    if not chooses(context):
        return None
    positions = sorted(p for n in nodes for p in graph.nodes[n].eqns)
    return known.best_us(merge_copies(graph.extract(positions)), builder, context)


def predicted_us(graph: Graph, positions: Sequence[int], context: Context) -> float:
    """The time of equations as one group: as a kernel, or less if XLA is predicted to be faster.

    Args:
      graph: one node for each equation.
      positions: of the equations; whether they can be one kernel is not asked.
      context: device, and whether XLA's kernels are candidates.
    """
    positions = sorted(positions)
    parts = [graph.nodes[p] for p in positions]
    jaxpr = graph.extract(positions)
    ours, xla = _times(jaxpr, parts, graph.apart, context.device)
    if not chooses(context):
        return ours
    return xla if _trivial(jaxpr, parts, context) else min(ours, xla)


def limit_fuel(plan: Plan, fuel: int) -> Plan:
    """The plan with only its first ``fuel`` kernels; bodies count where their equation stands."""
    return _burn(plan, fuel)[0]


def _burn(plan: Plan, fuel: int) -> tuple[Plan, int]:
    nested = dict(plan.nested)
    groups: list[Group] = []
    for group in plan.groups:
        for at in [at for at in nested if at[0] in group.eqns]:
            nested[at], fuel = _burn(nested[at], fuel)
        if group.target == "triton":
            if fuel <= 0:
                group = dataclasses.replace(
                    group,
                    target="xla",
                    predicted_us=group.xla_us,
                    reason="fuel: JEVT_FUEL is used up",
                )
            fuel -= 1
        groups.append(group)
    return dataclasses.replace(plan, groups=tuple(groups), nested=tuple(nested.items())), max(
        fuel, 0
    )


def _kind(parts: Sequence[Node]) -> str:
    """The mainloop that a group of such equations would have."""
    kinds = {part.kind for part in parts}
    if "contraction" in kinds:
        return "gemm"
    if any(part.ends for part in parts):
        return "columnwise"
    return "rowwise" if "reduction" in kinds else "pointwise"


def _times(
    jaxpr: Jaxpr, parts: Sequence[Node], apart: Set[Var], device: Device
) -> tuple[float, float]:
    """Predicted microseconds of a group as one kernel and as XLA runs it.

    ``apart`` are results of equations that XLA leaves out of calls.
    """
    reductions = {i for i, part in enumerate(parts) if part.kind == "reduction"}
    xla = fusions.xla_us(jaxpr, device, reductions, apart)
    if products.position(jaxpr) is not None:
        sums = [jaxpr.eqns[i] for i in sorted(reductions)]
        return products.kernel_us(jaxpr, device) + products.second_stage_us(sums, device), xla
    ends = [jaxpr.eqns[i] for i, part in enumerate(parts) if part.ends]
    ours = cost.predict_us(jaxpr, device) * cost.narrow_columns(ends)
    whole = any(part.kind == "reduction" and not part.ends for part in parts)
    return ours + cost.second_stage_us(ends, device, whole), xla


def _trivial(jaxpr: Jaxpr, parts: Sequence[Node], context: Context) -> str:
    """Why a group is not worth a kernel, "" if it might be."""
    kinds = {part.kind for part in parts}
    if kinds <= {"view", "source"}:
        return "cost model: only views, no arithmetic"
    if all(part.size <= 1 for part in parts):
        return "cost model: scalars only"
    alone = kinds <= {"view", "source", "contraction"}
    special = products.is_sum(jaxpr) or products.is_padded(jaxpr)
    if alone and not special and chooses(context):
        return "cost model: a matrix product alone is cuBLAS's"
    return ""


def chooses(context: Context) -> bool:
    """Whether the cost model has a say."""
    return context.backend == "auto" and context.platform != "cpu" and not context.partitioned


def _config(spec: KernelSpec, context: Context) -> Config | None:
    """The configuration that runs if none was measured; None leaves it to whoever runs it."""
    if context.platform != "cuda" or context.backend == "interpret":
        return None
    return limits.default_config(tuning.anonymous(spec), context.device.compute_capability)


def unsure(context: Context) -> float:
    """By how much a kernel may be predicted to be slower; what is tried can be measured."""
    return _TRIED if context.tune else 1.0


def _barred(context: Context) -> tuple[str, bool]:
    """Why no kernel is to be, however fast, and whether that is a fallback; "" if any may."""
    if context.backend == "xla" or (context.backend == "auto" and context.platform == "cpu"):
        return f"backend: {context.backend} on {context.platform} leaves all to XLA", False
    if context.partitioned:
        return "automatic partitioning over several devices", True
    return "", False


def body_context(context: Context, primitive: str, params: dict[str, object]) -> Context:
    """The context of a body: in a fully manual ``shard_map`` nothing is partitioned further."""
    if primitive != "shard_map":
        return context
    mesh = getattr(params.get("mesh"), "axis_names", ())
    manual = params.get("manual_axes", frozenset(mesh))
    if isinstance(manual, (set, frozenset)) and manual.issuperset(mesh):
        return dataclasses.replace(context, partitioned=False)
    return context
