"""The charts: speedups beside the paper's, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.kernel_table import CATEGORIES
from benchmarks.registry import MODELS, WORKLOADS
from benchmarks.report import paper
from benchmarks.report.data import Results
from benchmarks.variants import NAMES

# Paul Tol's bright scheme: distinct for the colour-blind too.
_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
_DPI = 150


def speedups(results: Results, path: Path) -> None:
    """Bars of speedups per workload, as in EVT's Figure 12, the paper's hatched beside ours."""
    device = results.slug.upper()
    series: list[tuple[str, Mapping[str, float], str, str]] = [
        ("EVT over nvFuser (paper, A100)", paper.OVER_NVFUSER, _COLOURS[6], "//"),
        ("EVT over Inductor (paper, A100)", paper.OVER_INDUCTOR, _COLOURS[4], "//"),
        (f"jevt over Inductor ({device})", _measured(results, "inductor"), _COLOURS[0], ""),
        (f"jevt over jax.jit ({device})", _measured(results, "jax"), _COLOURS[1], ""),
    ]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(series)
    for i, (label, values, colour, hatch) in enumerate(series):
        places = [n + (i - (len(series) - 1) / 2) * width for n in range(len(MODELS))]
        heights = [values.get(name, 0.0) for name in MODELS]
        bars = axes.bar(
            places, heights, width, label=label, color=colour, hatch=hatch, edgecolor="white"
        )
        labels = [f"{h:.2f}" if h else "" for h in heights]
        axes.bar_label(bars, labels, fontsize=7, padding=1)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(MODELS)), MODELS)
    axes.set_ylabel("speedup of a training step")
    axes.margins(y=0.12)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    _save(figure, path)


def time_by_category(profile: Results, path: Path) -> None:
    """Stacked horizontal bars per workload and variant: kernel milliseconds by category."""
    present = {(row["workload"], row["variant"]) for row in profile.rows}
    workloads = [w for w in WORKLOADS if any(p[0] == w for p in present)]
    bars = {w: [v for v in NAMES if (w, v) in present] for w in workloads}
    heights = [len(v) + 1 for v in bars.values()]
    figure, panels = plt.subplots(
        len(workloads),
        figsize=(9, 0.32 * sum(heights) + 1.2),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, workload in zip(panels[:, 0], workloads, strict=True):
        _stack(axes, profile, workload, bars[workload])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(CATEGORIES), fontsize=7)
    panels[-1, 0].set_xlabel("kernel time of a step, ms")
    _save(figure, path)


def _stack(axes: plt.Axes, profile: Results, workload: str, variants: Sequence[str]) -> None:
    left = [0.0] * len(variants)
    for category, colour in zip(CATEGORIES, _COLOURS, strict=True):
        widths = [_milliseconds(profile, workload, v, category) for v in variants]
        axes.barh(variants, widths, left=left, color=colour, label=category, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.1f}", va="center", fontsize=7)
    axes.set_ylabel(workload)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)


def _milliseconds(profile: Results, workload: str, variant: str, category: str) -> float:
    key = (workload, variant, category)
    rows = profile.rows
    return sum(r["ms"] for r in rows if (r["workload"], r["variant"], r["category"]) == key)


def _measured(results: Results, over: str) -> dict[str, float]:
    found = {name: results.speedup(name, over) for name in MODELS}
    return {name: value for name, value in found.items() if value is not None}


def planning_time(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Processor seconds of the partitioner against the number of equations, a line a model."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for colour, model in zip(_COLOURS, dict.fromkeys(row["model"] for row in rows), strict=False):
        own = sorted((r for r in rows if r["model"] == model), key=lambda r: r["equations"])
        places = [r["equations"] for r in own]
        axes.plot(places, [r["cpu_seconds"] for r in own], "o-", color=colour, label=model)
        for row in own[-1:]:
            axes.annotate(f"{row['layers']} layers", (row["equations"], row["cpu_seconds"]))
    axes.set_xlabel("equations after the passes")
    axes.set_ylabel("processor seconds")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if rows:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date in the file: the same results give the same bytes.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
