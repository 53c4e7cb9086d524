"""Relative errors of gradients against references kept on disk.

The error is ‖g − r‖ / ‖r‖ over all gradients together. The worst single gradient is told too,
since a wrong bias gradient hardly moves the whole. NaN never passes: an error that is not finite
is ``inf``. Works on the host, so that it compiles nothing and takes no device memory, and so
that it serves JAX and PyTorch alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Named gradients, in a fixed order; float32. An iterator is fine: each is looked at once.
Gradients = Iterable[tuple[str, np.ndarray]]

# A gradient with this share of the whole's mean square, or less, is judged against that share:
# some gradients (a key's bias before softmax) are zero but for rounding.
NEGLIGIBLE = 1e-4


class Error(NamedTuple):
    """The error over all gradients, and that of the worst one, with its name."""

    total: float
    worst: float
    where: str


class _Squares(NamedTuple):
    where: str
    difference: float
    norm: float
    size: int


def save(gradients: Gradients, folder: Path) -> None:
    """Writes each gradient as ``<index>.npy`` in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (_, gradient) in enumerate(gradients):
        np.save(folder / f"{i}.npy", gradient.astype(np.float32, copy=False))


def references(folder: Path) -> list[np.ndarray] | None:
    """What ``save`` wrote, mapped into memory; None if nothing is there."""
    if not folder.exists():
        return None
    count = len(list(folder.glob("*.npy")))
    return [np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(count)]


def compare(gradients: Gradients, reference: Iterable[np.ndarray]) -> Error:
    """The error of gradients against a reference in the same order.

    Raises:
      ValueError: if the reference has another shape or another number of gradients.
    """
    squares = []
    for (where, g), r in zip(gradients, reference, strict=True):
        if g.shape != r.shape:
            raise ValueError(f"{where}: expected shape {r.shape}, got {g.shape}")
        squares.append(_Squares(where, _square_norm(g - r), _square_norm(r), g.size))
    return _summarise(squares)


def describe(against_float32: Error | None, against_jax: Error | None) -> tuple[float | None, str]:
    """The error against float32 for the row, None if not finite, and the rest for its note."""
    parts = []
    if against_jax is not None:
        parts.append(f"against jax.jit {against_jax.total:.1e}")
        if against_jax.worst > 10 * max(against_jax.total, 1e-2):
            parts.append(f"worst {against_jax.worst:.1e} in {against_jax.where}")
    if against_float32 is None:
        return None, "; ".join(parts)
    if against_float32.total == float("inf"):
        return None, "; ".join([f"NOT FINITE: gradients in {against_float32.where}", *parts])
    return against_float32.total, "; ".join(parts)


def _summarise(squares: list[_Squares]) -> Error:
    norm = sum(s.norm for s in squares)
    mean_square = norm / max(sum(s.size for s in squares), 1)
    total = _ratio(sum(s.difference for s in squares), norm)

    def own(s: _Squares) -> float:
        return _ratio(s.difference, max(s.norm, NEGLIGIBLE * mean_square * s.size))

    worst = max(squares, key=own)
    return Error(total, own(worst), worst.where)


def _ratio(difference: float, norm: float) -> float:
    if difference == 0.0:
        return 0.0
    value = math.sqrt(difference / norm) if norm > 0.0 else math.inf
    return value if math.isfinite(value) else math.inf


def _square_norm(x: np.ndarray) -> float:
    flat = x.reshape(-1)
    return float(np.dot(flat, flat))
