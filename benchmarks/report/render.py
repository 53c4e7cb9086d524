"""Puts the tables and the charts together, into the README between its markers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.registry import SUBGRAPHS
from benchmarks.report import charts, tables
from benchmarks.report.data import Results, read_results, select

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def render(folder: Path, readme: Path, figures: Path) -> list[Path]:
    """Renders all result files of a folder.

    Args:
      folder: with the result files.
      readme: has the two markers; what is between them is replaced.
      figures: folder for the PNGs.

    Returns:
      The files that were written.

    Raises:
      FileNotFoundError: if there are no result files.
      ValueError: if the README lacks a marker.
    """
    results = read_results(folder)
    written = _draw(results, figures)
    parts = [_steps_section(r, figures, readme.parent) for r in select(results, "steps")]
    parts += [_kernels_section(r) for r in select(results, "kernels")]
    replace_between_markers(readme, "\n\n".join(parts))
    return [*written, readme]


def replace_between_markers(path: Path, content: str) -> None:
    """Replaces what a file has between the two markers.

    Raises:
      ValueError: unless the file has both markers, in order.
    """
    text = path.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: expected the lines {BEGIN} and {END}, in this order")
    path.write_text(f"{head}{BEGIN}\n{content}\n{END}{tail}")


def _draw(results: Sequence[Results], figures: Path) -> list[Path]:
    written = []
    for steps in select(results, "steps"):
        written.append(_speedup_figure(steps, figures))
        charts.speedups(steps, written[-1])
    for profile in select(results, "profile"):
        written.append(_time_figure(profile, figures))
        charts.time_by_category(profile, written[-1])
    return written


def _speedup_figure(results: Results, figures: Path) -> Path:
    return figures / f"{results.slug}-speedup.png"


def _time_figure(results: Results, figures: Path) -> Path:
    return figures / f"{results.slug}-time.png"


def _steps_section(results: Results, figures: Path, base: Path) -> str:
    parts = [
        f"### Training steps on {results.header['device']}",
        tables.provenance(results),
        tables.step_summary(results),
        _image("Speedups, the paper's beside ours", _speedup_figure(results, figures), base),
    ]
    if any(row["workload"] in SUBGRAPHS for row in results.rows):
        parts.append(tables.subgraph_summary(results))
    time_figure = _time_figure(results, figures)
    if time_figure.exists():
        parts.append(_image("Where the time goes", time_figure, base))
    parts.append(_folded("All that was measured", tables.step_details(results)))
    return "\n\n".join(parts)


def _kernels_section(results: Results) -> str:
    title = f"### Kernels on {results.header['device']}"
    table = _folded("Kernel suites", tables.kernel_table(results))
    return "\n\n".join([title, tables.provenance(results), table])


def _image(text: str, path: Path, base: Path) -> str:
    return f"![{text}]({os.path.relpath(path, base)})"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"
