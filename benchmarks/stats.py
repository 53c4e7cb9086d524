"""The summary of repeated timings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Quartiles(NamedTuple):
    """First quartile, median, third quartile; the unit is the samples' own."""

    q1: float
    median: float
    q3: float


def quartiles(samples: Sequence[float]) -> Quartiles:
    """The quartiles of at least one sample, interpolated inclusively."""
    if not samples:
        raise ValueError("quartiles: expected at least one sample, got none")
    if len(samples) == 1:
        return Quartiles(samples[0], samples[0], samples[0])
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Quartiles(q1, median, q3)
