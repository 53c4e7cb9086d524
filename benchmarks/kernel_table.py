"""Kernels by name: sums over a profile's events, and what a kernel does, told from its name.

The categories are a heuristic for the stacked bars, never an input to a measurement. Imports no
framework.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable

from benchmarks.messages import Kernel, Profile

CATEGORIES = ("matmul", "convolution", "attention", "sparse", "reduction", "pointwise", "copy")

# In order: the first pattern that matches decides.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (category, re.compile(pattern, re.IGNORECASE))
    for category, pattern in (
        ("copy", r"^mem(cpy|set)|memcpy|memset"),
        ("attention", r"fmha|flash|attention|sdpa|softmax.*gemm"),
        ("sparse", r"spmm|scatter|index_add|segment|csr|indexfunclarge|embedding_backward"),
        ("convolution", r"conv(?!ert)|[fd]prop|wgrad|dgrad|implicit"),
        ("matmul", r"gemm|gemv|nvjet|cutlass|cublas|matmul|_dot|splitk|^triton_mm|^triton_tem"),
        ("reduction", r"reduc|softmax|norm|welford|_red_|_per_|nll_loss|variance|bn_fw|bn_bw"),
        ("copy", r"transpose|_copy|nchwtonhwc|nhwctonchw"),
    )
)


def category(kernel: str) -> str:
    """The category of a kernel's name; ``pointwise`` if nothing else fits."""
    for name, pattern in _PATTERNS:
        if pattern.search(kernel):
            return name
    return "pointwise"


def short_name(kernel: str) -> str:
    """A kernel's name without the numbers that tell its instances apart, at most 70 characters."""
    return re.sub(r"([._]\d{1,5})+$", "", kernel)[:70]


def aggregate(events: Iterable[tuple[str, float]], steps: int) -> Profile:
    """Sums (kernel, nanoseconds) over ``steps`` steps into a profile of one step."""
    nanoseconds: dict[str, float] = collections.defaultdict(float)
    launches: collections.Counter[str] = collections.Counter()
    for name, duration in events:
        nanoseconds[short_name(name)] += duration
        launches[short_name(name)] += 1
    return Profile(
        tuple(
            Kernel(name, category(name), ns / steps / 1e6, launches[name] / steps)
            for name, ns in sorted(nanoseconds.items(), key=lambda item: -item[1])
        )
    )
