"""The page about the partitioner: tables and the chart of planning time by depth."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_PAGE = """\
# The partitioner on whole training graphs

Made by `python -m benchmarks partition`: training steps traced at their full shapes, rewritten and
partitioned as for an {planned_for}, without one. Seconds are of {device}, commit {commit}, {date}.
Its load average was {load} meanwhile, of which the partitioner makes one or two: where others
use the processors too, *CPU s* says what the work is. The solver's time limit was {limit:g} s.

## Plans against greedy fusion

All three group the same equations, those of jevt's plan (after copies of cheap values were made),
and all are priced by what jevt minimises: the predicted time of their groups of fusible equations,
each as one kernel or, where that is predicted to be faster, as XLA runs it. (The launches that jevt
saves by merging equal updates are in this number, though the integer program does not know of
them.) What no kernel takes is left out.

- **jevt**: the plan, with the solver's status; *gap* is the distance to the proven bound.
- **xla**: greedy producer–consumer fusion in XLA's manner: into the reader, last to first, a
  reduction ends a fusion; then fusions that share an operand become one with several results.
- **inductor**: greedy in Inductor's manner: groups of one iteration space, those with the most
  shared bytes first, in up to ten rounds; what follows a reduction along the same rows may join it.

*Cut* is what one group writes and another reads (written once, read by each); *moved* is all that
groups read and write, the program's inputs and outputs and those of matrix products included. The
greedy ones are models of the two compilers' choice of groups, made for this comparison, and hold
what those compilers' code generators can, which is at places more than a kernel of jevt's:
unrelated outputs of one shape. The compilers themselves are timed in the README.

{plans}

## Planning time by depth

BERT-Large and GPT-3 (175B) with fewer and with more layers, each a whole training step. *s* is the
partitioner alone, by the clock, *CPU s* all processors together. Equal layers are solved once, so
what grows is the linear rest.

![Planning time against the number of equations]({figure})

{depths}
"""


def plan_table(rows: Sequence[Row]) -> str:
    """jevt's plans and the greedy ones, workload by workload."""
    best = {row["workload"]: row["objective_us"] for row in rows if row["variant"] == "jevt"}
    lines = [
        _line("workload", "groups by", "equations", "groups", "cut", "moved", "objective µs",
              "over jevt", "status", "gap", "s"),
        "| --- | --- |" + " --: |" * 6 + " --- | --: | --: |",
    ]  # fmt: skip
    for row in rows:
        ratio = row["objective_us"] / best[row["workload"]]
        status = row["status"]
        if row["stopped"] == "clock":
            status += ", by the clock"
        lines.append(
            _line(
                row["workload"],
                row["variant"],
                row["equations"],
                row["groups"],
                f"{row['cut_bytes'] / 2**30:.2f} GiB",
                f"{row['moved_bytes'] / 2**30:.2f} GiB",
                f"{row['objective_us']:.0f}",
                f"{ratio:.2f}×",
                status or "–",
                "–" if row["gap"] is None else f"{row['gap']:.2%}",
                f"{row['seconds']:.1f}",
            )
        )
    return "\n".join(lines)


def depth_table(rows: Sequence[Row]) -> str:
    """Planning time by model and depth."""
    lines = [
        _line("model", "layers", "equations", "groups", "s", "CPU s", "status", "gap"),
        "| --- |" + " --: |" * 5 + " --- | --: |",
    ]
    lines += [
        _line(
            row["model"],
            row["layers"],
            row["equations"],
            row["groups"],
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            row["status"],
            f"{row['gap']:.2%}",
        )
        for row in rows
    ]
    return "\n".join(lines)


def write_page(content: Mapping[str, Any], page: Path, figure: Path) -> None:
    """Writes the page and the chart from a result file's content."""
    from benchmarks.report import charts  # matplotlib, for those who draw

    charts.planning_time(content["depths"], figure)
    text = _PAGE.format(
        **{key: content[key] for key in ("planned_for", "device", "commit", "date", "limit")},
        plans=plan_table(content["rows"]),
        depths=depth_table(content["depths"]),
        load=" to ".join(f"{x:.1f}" for x in content["load"]),
        figure=os.path.relpath(figure, page.parent),
    )
    page.write_text(text)


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
