"""A trace as readable text, printed (``JEVT_DEBUG``) or written to files (``JEVT_DUMP_DIR``)."""

from __future__ import annotations

import itertools
import pathlib
import re
import sys

from jevt._config import Environment
from jevt.partition import format_plan, summary
from jevt.report.trace import Stage, Trace

_count = itertools.count()


def format_trace(trace: Trace) -> str:
    """Every stage as a jaxpr under a line of provenance, then the plan and the sources."""
    parts = [format_summary(trace)]
    previous: Stage | None = None
    for position, stage in enumerate(trace.stages):
        parts.append(format_stage(trace, position, same=_is_same(previous, stage)))
        previous = stage
    parts.append(f"# plan of {trace.name}, as a drawing: .plan.to_svg()\n{format_plan(trace.plan)}")
    parts += [f"# source of {group}\n{source}" for group, source in trace.sources.items()]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def format_summary(trace: Trace) -> str:
    """One line, one for lazy outputs, and one for each warning and each note of a pass."""
    counts = summary(trace.plan)
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts["kinds"].items()) or "none"
    traced, planned = trace.stages[0].jaxpr.eqns, trace.plan.jaxpr.eqns
    head = (
        f"# jevt: {trace.name} for {trace.context.platform}, backend {trace.context.backend!r}:"
        f" {len(traced)} equations traced, {len(planned)} after the passes;"
        f" {counts['groups']} groups, {counts['triton']} of them Triton kernels ({kinds});"
        f" {trace.milliseconds:.0f} ms"
    )
    lines = [head]
    if trace.lazy:
        lines.append(f"# computed on demand, by jevt.lazy: {', '.join(trace.lazy)}")
    lines += [f"# fell back to XLA: {warning}" for warning in trace.warnings]
    lines += [f"# {note}" for note in trace.notes]
    return "\n".join(lines)


def format_stage(trace: Trace, position: int, *, same: bool = False) -> str:
    """One stage: who made it, in what time, and the jaxpr (not again if it is the ``same``)."""
    stage = trace.stages[position]
    how = "traced by JAX" if position == 0 else f"by {stage.name!r} in {stage.milliseconds:.1f} ms"
    head = f"# stage {position} of {trace.name}: {how}, {len(stage.jaxpr.eqns)} equations"
    return f"{head}, unchanged" if same else f"{head}\n{stage.jaxpr.pretty_print(name_stack=False)}"


def publish(trace: Trace, environment: Environment) -> None:
    """Prints and writes what the environment variables ask for."""
    if environment.debug == 1:
        _print(format_summary(trace))
    elif environment.debug == 2:
        _print(f"{format_summary(trace)}\n{format_plan(trace.plan)}")
    elif environment.debug:
        _print(format_trace(trace))
    if environment.dump_dir is not None:
        write(trace, environment.dump_dir)


def write(trace: Trace, directory: pathlib.Path) -> pathlib.Path:
    """Writes stages, plan and sources as files; returns the new folder that holds them."""
    directory.mkdir(parents=True, exist_ok=True)
    name = _file_name(trace.name)
    while True:  # another process may write to the same directory
        folder = directory / f"{next(_count):03d}_{name}"
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
    for position, stage in enumerate(trace.stages):
        body = format_stage(trace, position) + "\n"
        (folder / f"{position:02d}_{stage.name}.jaxpr").write_text(body, encoding="utf-8")
    plan = f"{format_summary(trace)}\n{format_plan(trace.plan)}\n"
    (folder / "plan.txt").write_text(plan, encoding="utf-8")
    (folder / "plan.dot").write_text(trace.plan.to_dot(), encoding="utf-8")
    for group, source in trace.sources.items():
        (folder / f"{_file_name(group)}.py").write_text(source, encoding="utf-8")
    return folder


def _print(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def _is_same(previous: Stage | None, stage: Stage) -> bool:
    """Whether a pass had nothing to do."""
    if previous is None or len(previous.jaxpr.eqns) != len(stage.jaxpr.eqns):
        return False
    return all(a is b for a, b in zip(previous.jaxpr.eqns, stage.jaxpr.eqns, strict=True)) and (
        previous.jaxpr.outvars == stage.jaxpr.outvars
    )


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:100]
