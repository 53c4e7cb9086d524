"""Compact text tables of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def number(key: str, spec: str, scale: float = 1.0) -> Callable[[Mapping[str, Any]], str]:
    """A column's function: the field times ``scale`` by the format, or a dash."""

    def show(row: Mapping[str, Any]) -> str:
        value = row[key]
        return "–" if value is None else format(value * scale, spec)

    return show


def _quartiles(row: Mapping[str, Any]) -> str:
    if row["step_ms_q1"] is None:
        return "–"
    return f"{row['step_ms_q1']:.2f}–{row['step_ms_q3']:.2f}"


STEP_COLUMNS: tuple[Column, ...] = (
    ("workload", lambda r: r["workload"]),
    ("variant", lambda r: r["variant"]),
    ("step ms", number("step_ms", ".2f")),
    ("quartiles", _quartiles),
    ("kernel ms", number("kernel_ms", ".2f")),
    ("kernels", number("kernels", ".0f")),
    ("peak GiB", number("peak_bytes", ".1f", 2**-30)),
    ("cold s", number("cold_start_s", ".1f")),
    ("warm s", number("warm_start_s", ".1f")),
    ("grad err", number("grad_rel_err", ".1e")),
    ("note", lambda r: r["note"]),
)

KERNEL_COLUMNS: tuple[Column, ...] = (
    ("suite", lambda r: r["suite"]),
    ("case", lambda r: r["case"]),
    ("variant", lambda r: r["variant"]),
    ("µs", number("us", ".1f")),
    ("TFLOP/s", number("tflops", ".0f")),
    ("GB/s", number("gbps", ".0f")),
    ("of ceiling", number("fraction_of_ceiling", ".0%")),
    ("rel err", number("rel_err", ".1e")),
    ("note", lambda r: r["note"]),
)


def text_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], note_width: int = 70
) -> str:
    """The rows as aligned text; only the last column is cut, to ``note_width``."""
    cells = [[name for name, _ in columns]]
    cells += [[show(row) for _, show in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) - 1)]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        lines.append("  ".join([*padded, line[-1][:note_width]]).rstrip())
    return "\n".join(lines)
