"""A plan as a drawing: groups as coloured boxes, cut edges with their bytes and their reasons."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from collections.abc import Iterator

from jevt.partition.neighbours import neighbours
from jevt.partition.plan import Group, Plan
from jevt.partition.printing import format_bytes, traffic

#: Fill colours by kind, of groups that become kernels; other kinds are "_KERNEL".
_COLOURS = {
    "pointwise": "#cfe8cf",
    "multi_tensor": "#e3efb4",
    "rowwise": "#c6dbef",
    "columnwise": "#d9d0ee",
    "gemm": "#fdd8b5",
    "attention": "#f9c6d0",
}
_KERNEL = "#fff2b3"
_XLA, _OPAQUE = "#ffffff", "#e6e6e6"
_FALLBACK = "#c00000"  # colour of the border

#: Letters in a line of a label.
_WIDTH = 44


def to_dot(plan: Plan) -> str:
    """The plan in Graphviz's language.

    A box is a group, filled by kind if it becomes a kernel, white if the cost model left it to XLA,
    grey if no kernel takes it, with a red border if that is a fallback. An arrow is what one group
    writes and another reads, with its bytes and with the reason why the two are not one group;
    where one of them is grey the reason stands in its box. Plans of loops' bodies are frames.

    Args:
      plan: as ``jevt.last_trace(step).plan`` or ``step.explain(...).plan`` has it.
    """
    lines = [
        "digraph plan {",
        '  graph [fontname="Helvetica", rankdir=TB];',
        '  node [fontname="Helvetica", fontsize=11, shape=box, style="filled,rounded"];',
        '  edge [fontname="Helvetica", fontsize=9];',
        *_body(plan, "", "  "),
        "}",
    ]
    return "\n".join(lines) + "\n"


def to_svg(plan: Plan) -> str:
    """The drawing of :func:`to_dot` as SVG, laid out by Graphviz's program ``dot``.

    Raises:
      RuntimeError: the program is not there, or failed.
    """
    program = shutil.which("dot")
    if program is None:
        raise RuntimeError(
            "to_svg expects Graphviz's program `dot` on the PATH and found none. Either\n"
            "  1. install Graphviz (package `graphviz` of apt, dnf, brew and conda), or\n"
            "  2. write the text of to_dot() to a file and draw it elsewhere: dot -Tsvg plan.dot"
        )
    done = subprocess.run(
        [program, "-Tsvg"], input=to_dot(plan), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"`dot -Tsvg` failed with status {done.returncode}: {done.stderr}")
    return done.stdout


def _body(plan: Plan, prefix: str, indent: str) -> Iterator[str]:
    for group in plan.groups:
        yield f"{indent}{_name(prefix, group)} [{_box(group)}];"
    for edge in neighbours(plan):
        writer, reader = plan.groups[edge.writer], plan.groups[edge.reader]
        label = [format_bytes(edge.nbytes)]
        if "opaque" not in (writer.kind, reader.kind):
            label += textwrap.wrap(edge.reason, _WIDTH)
        ends = f"{_name(prefix, writer)} -> {_name(prefix, reader)}"
        yield f"{indent}{ends} [label={_lines(label)}, tooltip={_lines([edge.reason])}];"
    owner = {position: group for group in plan.groups for position in group.eqns}
    for (position, body), inner in plan.nested:
        inside = f"{prefix}{position}.{body}/"
        name = plan.jaxpr.eqns[position].primitive.name
        yield f"{indent}subgraph {_quoted(f'cluster {inside}')} {{"
        yield f"{indent}  label={_quoted(f'{name}, body {body}')};"
        yield from _body(inner, inside, indent + "  ")
        yield f"{indent}}}"
        if inner.groups:
            ends = f"{_name(prefix, owner[position])} -> {_name(inside, inner.groups[0])}"
            yield f"{indent}{ends} [style=dashed, arrowhead=none];"


def _box(group: Group) -> str:
    label = [group.name, _numbers(group)]
    if group.target == "triton":
        fill = _COLOURS.get(group.kind, _KERNEL)
    else:
        fill = _OPAQUE if group.kind == "opaque" else _XLA
        label += textwrap.wrap(group.reason, _WIDTH)
    border = f', color="{_FALLBACK}"' if group.fallback else ""
    return f'label={_lines(label)}, fillcolor="{fill}"{border}'


def _numbers(group: Group) -> str:
    count = len(group.eqns)
    parts = [f"{count} equation{'s' * (count > 1)}", format_bytes(traffic(group))]
    if group.predicted_us is not None:
        parts.append(f"{group.predicted_us:.1f} µs")
    if group.target == "triton" and group.xla_us is not None:
        parts.append(f"XLA {group.xla_us:.1f} µs")
    return " · ".join(parts)


def _name(prefix: str, group: Group) -> str:
    return _quoted(prefix + group.name)


def _lines(lines: list[str]) -> str:
    return '"' + "\\n".join(_escaped(line) for line in lines) + '"'


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
