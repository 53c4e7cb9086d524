"""What the graph passes do to the five workloads: ``python -m benchmarks passes``.

Nothing is run: the steps are traced at their full shapes and rewritten as for a GPU. For each pass:
equations, reductions, the bytes that would move if each equation were a kernel, and processor time.
The table goes to ``docs/passes.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.extend.core import Jaxpr, Literal

from benchmarks import registry
from benchmarks.machine import ROOT
from benchmarks.options import SIZES, Options
from jevt import pipeline
from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.partition.graph import nbytes

DEFAULT = "bert,vit,resnet,xmlcnn,gcn"
PATH = ROOT / "docs" / "passes.md"

_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "reduce_and")

_INTRODUCTION = """\
# The graph passes on the five workloads

Made by `python -m benchmarks passes`: training steps at their full shapes, traced and rewritten as
for a GPU, without one; no pass that asks for a library of a present GPU (cuDNN) does anything here.
*Traffic* is what would move if each equation were a kernel, every operand read and every result
written once; bodies of loops count once. *ms* is processor time.
"""


@dataclass(frozen=True)
class Line:
    """The program after one pass."""

    name: str
    equations: int
    reductions: int
    nbytes: int
    milliseconds: float


def measure(jaxpr: Jaxpr) -> Iterator[Line]:
    """The program as it was traced, and after each pass."""
    yield _line("traced", jaxpr, 0.0)
    device = DEVICES["H100"]
    context = Context("cuda", "auto", False, (False,) * len(jaxpr.invars), device)
    for name, graph_pass in pipeline.graph_passes(context):
        start = time.process_time()
        jaxpr = graph_pass(jaxpr)
        yield _line(name, jaxpr, (time.process_time() - start) * 1e3)


def _line(name: str, jaxpr: Jaxpr, milliseconds: float) -> Line:
    traffic = reductions = equations = 0
    stack = [jaxpr]
    while stack:
        for eqn in stack.pop().eqns:
            equations += 1
            reductions += eqn.primitive.name in _REDUCTIONS
            bodies = [v for v in jax.tree.leaves(list(eqn.params.values())) if isinstance(v, Jaxpr)]
            stack += bodies
            if not bodies:
                read = [v for v in eqn.invars if not isinstance(v, Literal)]
                traffic += sum(nbytes(v.aval) for v in (*dict.fromkeys(read), *eqn.outvars))
    return Line(name, equations, reductions, traffic, milliseconds)


def table(name: str, lines: Sequence[Line]) -> str:
    """One workload as Markdown."""
    rows = [
        f"| {x.name} | {x.equations} | {x.reductions} | {x.nbytes / 2**30:.2f} GiB | "
        f"{x.milliseconds:.0f} |"
        for x in lines
    ]
    total = sum(x.milliseconds for x in lines)
    head = ["| after | equations | reductions | traffic | ms |", "|---|---|---|---|---|"]
    return "\n".join([f"\n## {name}\n", *head, *rows, f"\nAll passes: {total / 1e3:.2f} s\n"])


def run(arguments: Sequence[str]) -> int:
    """``python -m benchmarks passes``: equations, reductions and bytes before and after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks passes", description=run.__doc__)
    parser.add_argument("--workloads", default=DEFAULT, help=f"comma-separated; default {DEFAULT}")
    parser.add_argument("--size", default="full", choices=SIZES)
    parser.add_argument("--output", type=Path, default=PATH, help="default docs/passes.md")
    args = parser.parse_args(arguments)
    try:
        names = registry.expand(args.workloads.split(","))
    except ValueError as error:
        parser.error(str(error))
    parts = [_INTRODUCTION]
    for name in names:
        workload = registry.make(name, Options(size=args.size))
        jaxpr = jax.make_jaxpr(workload.step)(*workload.shapes())
        parts.append(table(name, list(measure(jaxpr))))
        print(parts[-1])
    args.output.write_text("".join(parts))
    return 0
