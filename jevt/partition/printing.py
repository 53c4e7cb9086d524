"""A plan as text and in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Var

from jevt.partition.graph import nbytes
from jevt.partition.plan import Group, Plan

_COLUMNS = ("group", "target", "eqns", "bytes", "µs", "XLA µs", "reason")


def format_plan(plan: Plan) -> str:
    """A table of the groups, totals, and the plans of control-flow bodies indented below their
    equation.

    ``bytes`` is what a group reads and writes, ``µs`` its time for its target, predicted or, with a
    star, measured; the kind is part of the name.
    """
    return "\n".join(_lines(plan))


def summary(plan: Plan) -> dict[str, Any]:
    """Counts over the plan and its nested plans.

    Returns:
      ``equations``, ``groups``, ``triton`` (groups that become kernels), ``fused_equations``
      (equations in them), ``kinds`` (groups by kind, of those that become kernels), ``xla`` (groups
      by reason), ``fallbacks`` (groups left to XLA for a reason that is not a decision),
      ``predicted_us`` (of the groups whose time is predicted), ``status`` and ``seconds`` of the
      solver.
    """
    groups = list(all_groups(plan))
    kernels = [g for g in groups if g.target == "triton"]
    return {
        "equations": sum(len(p.jaxpr.eqns) for p in all_plans(plan)),
        "groups": len(groups),
        "triton": len(kernels),
        "fused_equations": sum(len(g.eqns) for g in kernels),
        "kinds": dict(sorted(Counter(g.kind for g in kernels).items())),
        "xla": dict(
            Counter(_category(g.reason) for g in groups if g.target == "xla").most_common()
        ),
        "fallbacks": len(fallbacks(plan)),
        "predicted_us": sum(g.predicted_us or 0.0 for g in groups),
        "status": plan.solution.status,
        "seconds": sum(p.solution.seconds for p in all_plans(plan)),
    }


def fallbacks(plan: Plan) -> list[Group]:
    """Groups left to XLA for a reason that is no decision of the cost model or the user."""
    return [group for group in all_groups(plan) if group.fallback]


def all_plans(plan: Plan) -> Iterator[Plan]:
    """The plan and the plans of its bodies, outer ones first."""
    yield plan
    for _, inner in plan.nested:
        yield from all_plans(inner)


def all_groups(plan: Plan) -> Iterator[Group]:
    """The groups of the plan and of its bodies."""
    for each in all_plans(plan):
        yield from each.groups


def _lines(plan: Plan) -> Iterator[str]:
    rows = [_row(group) for group in plan.groups]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    inner: dict[int, list[tuple[int, Plan]]] = {}
    for (position, body), nested in plan.nested:
        inner.setdefault(position, []).append((body, nested))
    yield _line(_COLUMNS, widths)
    yield _line(["-" * w for w in widths], widths)
    for group, row in zip(plan.groups, rows, strict=True):
        yield _line(row, widths)
        for position in group.eqns:
            for body, nested in inner.get(position, ()):
                yield f"    {plan.jaxpr.eqns[position].primitive.name}, body {body}:"
                yield from ("    " + line for line in _lines(nested))
    yield _totals(plan)


def _line(cells: list[str] | tuple[str, ...], widths: list[int]) -> str:
    right = {"eqns", "bytes", "µs", "XLA µs"}
    padded = [
        cell.rjust(width) if column in right else cell.ljust(width)
        for cell, width, column in zip(cells, widths, _COLUMNS, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _row(group: Group) -> tuple[str, ...]:
    return (
        group.name,
        group.target + (" !" if group.fallback else ""),
        str(len(group.eqns)),
        format_bytes(traffic(group)),
        _time(group.predicted_us) if group.measured_us is None else f"{group.measured_us:.1f}*",
        _time(group.xla_us),
        group.reason,
    )


def _totals(plan: Plan) -> str:
    kernels = [g for g in plan.groups if g.target == "triton"]
    known = [g.predicted_us for g in plan.groups if g.predicted_us is not None]
    solution = plan.solution
    gap = "" if solution.status in ("optimal", "trivial") else f", gap {solution.gap:.1%}"
    if solution.stopped == "clock":
        gap += ", stopped by the clock: another run may give another plan"
    return (
        f"{len(plan.jaxpr.eqns)} equations in {len(plan.groups)} groups; "
        f"{len(kernels)} kernels with {sum(len(g.eqns) for g in kernels)} equations; "
        f"{sum(known):.1f} µs predicted for what is not opaque; "
        f"{solution.status}{gap}"
    )


def traffic(group: Group) -> int:
    """Bytes of a group's inputs and outputs."""
    outputs = dict.fromkeys(v for v in group.jaxpr.outvars if isinstance(v, Var))
    return sum(nbytes(v.aval) for v in (*group.jaxpr.invars, *outputs))


def _category(reason: str) -> str:
    """A reason without its particulars: numbers vary from group to group."""
    if "as XLA fuses it" in reason:
        return "cost model: XLA's fusion is predicted faster"
    return "measured: XLA is faster" if "as XLA runs it" in reason else reason


def _time(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def format_bytes(amount: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
