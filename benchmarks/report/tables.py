"""Markdown tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.console import KERNEL_COLUMNS, STEP_COLUMNS, Column
from benchmarks.registry import MODELS, SPELLINGS, SUBGRAPHS
from benchmarks.report import paper
from benchmarks.report.data import Results
from benchmarks.variants import FLOOR, NAMES

_OURS = ("jevt", FLOOR)


def provenance(results: Results) -> str:
    """The line above a table: device, commit, date, versions."""
    head = results.header
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    text = f"{head['device']}, commit {head['commit']}, {head['date'][:10]}; {versions}."
    if kept := [row for row in results.rows if "at commit " in row.get("note", "")]:
        names = dict.fromkeys(row.get("workload", row.get("suite")) for row in kept)
        text += f" Of an earlier commit, told in a row's note: {', '.join(names)}."
    return text


def step_summary(results: Results) -> str:
    """Milliseconds per step, a row per workload, a column per variant, and jevt's speedups."""
    present = {row["variant"] for row in results.rows}
    variants = [v for v in NAMES if v in present]
    header = ["ms per step", *variants, "jevt over jax", "jevt over the best other"]
    lines = []
    for workload in _in_order(results, MODELS + SPELLINGS):
        times = [results.step_ms(workload, v) for v in variants]
        others = [v for v in variants if v not in _OURS and results.step_ms(workload, v)]
        best = min(others, key=lambda v: results.step_ms(workload, v) or 0.0, default=None)
        lines.append(
            [
                workload,
                *(_number(t, ".2f") for t in times),
                _times(results.speedup(workload, "jax")),
                _times(results.speedup(workload, best)) if best else "–",
            ]
        )
    return _markdown(header, lines)


def subgraph_summary(results: Results) -> str:
    """The subgraphs: milliseconds, and speedups over eager PyTorch beside the paper's."""
    present = {row["variant"] for row in results.rows}
    variants = [v for v in NAMES if v in present]
    header = ["ms forward + backward", *variants, "jevt over torch", "EVT over torch (paper, A100)"]
    lines = [
        [
            workload,
            *(_number(results.step_ms(workload, v), ".3f") for v in variants),
            _times(results.speedup(workload, "torch")),
            _times(paper.SUBGRAPH_OVER_EAGER.get(workload)),
        ]
        for workload in _in_order(results, SUBGRAPHS)
    ]
    return _markdown(header, lines)


def step_details(results: Results) -> str:
    """Everything measured, a row per workload and variant."""
    return _columns(results.rows, STEP_COLUMNS)


def kernel_table(results: Results) -> str:
    """The kernel suites, a row per case and variant."""
    return _columns(results.rows, KERNEL_COLUMNS)


def _in_order(results: Results, names: Sequence[str]) -> list[str]:
    present = {row["workload"] for row in results.rows}
    return [name for name in names if name in present]


def _columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    header = [name for name, _ in columns]
    return _markdown(header, [[show(row) for _, show in columns] for row in rows])


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["--:" if name != "note" else "---" for name in header[1:]]
    cells = [header, rule, *lines]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in cells)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"
