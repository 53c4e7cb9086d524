"""A plan as JSON that a text diff can compare, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from jax.extend.core import Jaxpr

from jevt import _jaxpr
from jevt.lowering import multi_tensor, side_by_side
from jevt.lowering.errors import NotFusible
from jevt.partition.build import Build, Builder
from jevt.partition.duplicate import merge_copies
from jevt.partition.plan import Group, Plan, Solution
from jevt.partition.printing import traffic
from jevt_kernels.spec import KernelSpec
from jevt_kernels.tuning import record


def to_json(plan: Plan) -> str:
    """The plan as JSON with one line a field, so that a text diff compares two plans.

    It is the same for the same plan: times that were measured while planning are left out. Numbers
    are rounded to a thousandth of a microsecond.
    """
    return json.dumps(_data(plan), indent=1, ensure_ascii=False)


def from_json(text: str, jaxpr: Jaxpr, *, build: Build | None = None) -> Plan:
    """The plan that ``to_json`` wrote.

    Args:
      text: the JSON.
      jaxpr: ``Plan.jaxpr`` of the plan that was written, which JSON does not hold.
      build: makes a group a kernel; ``lowering.spec.build`` by default.

    Returns:
      The plan, with times rounded, and without a context.

    Raises:
      ValueError: the text does not fit the jaxpr.
    """
    if build is None:
        from jevt.lowering import spec

        build = spec.build
    return _plan(json.loads(text), jaxpr, Builder(build))


def _data(plan: Plan) -> dict[str, Any]:
    solution = plan.solution
    return {
        "solution": {
            "status": solution.status,
            "stopped": solution.stopped,
            "objective_us": round(solution.objective_us, 3),
            "bound_us": round(solution.bound_us, 3),
            "rounds": solution.rounds,
        },
        "groups": [
            {
                "name": group.name,
                "target": group.target,
                "kind": group.kind,
                "kernel": group.spec is not None,
                "eqns": _ranges(group.eqns),
                "bytes": traffic(group),
                "predicted_us": _rounded(group.predicted_us),
                "xla_us": _rounded(group.xla_us),
                "measured_us": _rounded(group.measured_us),
                "config": None if group.config is None else record.config_to_json(group.config),
                "reason": group.reason,
                "fallback": group.fallback,
            }
            for group in plan.groups
        ],
        "nested": [
            {"equation": position, "body": body, "plan": _data(inner)}
            for (position, body), inner in plan.nested
        ],
    }


def _plan(data: dict[str, Any], jaxpr: Jaxpr, builder: Builder) -> Plan:
    positions = [_positions(item["eqns"]) for item in data["groups"]]
    covered = sorted(p for group in positions for p in group)
    if covered != list(range(len(jaxpr.eqns))):
        raise ValueError(
            f"expected a plan of the {len(jaxpr.eqns)} equations of this jaxpr, each in one group;"
            f" got one of {len(covered)} equations, the last number {covered[-1] if covered else 0}"
        )
    groups = tuple(
        _group(item, eqns, jaxpr, builder)
        for item, eqns in zip(data["groups"], positions, strict=True)
    )
    nested = []
    for item in data["nested"]:
        at = item["equation"], item["body"]
        bodies = [body for _, _, body in _jaxpr.subjaxprs(jaxpr.eqns[at[0]])]
        nested.append((at, _plan(item["plan"], bodies[at[1]], builder)))
    return Plan(jaxpr, groups, Solution(**data["solution"], seconds=0.0), tuple(nested))


def _group(item: dict[str, Any], eqns: tuple[int, ...], jaxpr: Jaxpr, builder: Builder) -> Group:
    inner = _jaxpr.extract(jaxpr, eqns)
    spec = None
    if item["kernel"]:
        try:
            inner, spec = _kernel(inner, item["kind"], item["name"], builder)
        except NotFusible as refusal:
            raise ValueError(
                f"expected equations {item['eqns']} to be a kernel, as in the plan; got: {refusal}"
            ) from None
    fields = ("name", "target", "kind", "predicted_us", "xla_us", "measured_us", "reason")
    return Group(
        eqns=eqns,
        jaxpr=inner,
        spec=spec,
        fallback=item["fallback"],
        config=None if item["config"] is None else record.config(item["config"]),
        **{name: item[name] for name in fields},
    )


def _kernel(jaxpr: Jaxpr, kind: str, name: str, builder: Builder) -> tuple[Jaxpr, KernelSpec]:
    if kind == "multi_tensor":
        parts = [merge_copies(part) for part in multi_tensor.split(jaxpr)]
        return multi_tensor.join(parts, [builder.spec(part, name) for part in parts], name)
    if kind == "columnwise" and len(apart := multi_tensor.split(jaxpr)) > 1:
        parts = [merge_copies(part) for part in apart]
        return side_by_side.join(parts, [builder.spec(part, name) for part in parts], name)
    jaxpr = merge_copies(jaxpr)
    return jaxpr, builder.spec(jaxpr, name)


def _ranges(numbers: Iterable[int]) -> str:
    """``3-5 7`` for 3, 4, 5 and 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _positions(text: str) -> tuple[int, ...]:
    result: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        result += range(int(first), int(last or first) + 1)
    return tuple(result)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
