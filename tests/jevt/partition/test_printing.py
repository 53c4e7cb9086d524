"""Plans as text and numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from partitions import context, trace

from jevt.partition import format_plan, partition, summary

X = np.zeros((64, 64), np.float32)


def program(x):
    with jax.named_scope("attention/scores"):
        x = jax.nn.softmax(x @ x)
    x, _ = lax.scan(lambda c, _: (jax.nn.softmax(c), None), x, None, length=3)
    return jnp.sin(x) * 2


def plan(backend="triton"):
    return partition(trace(program, X)[0], context(backend))


def test_table():
    text = format_plan(plan())
    lines = text.splitlines()
    assert lines[0].split() == ["group", "target", "eqns", "bytes", "µs", "XLA", "µs", "reason"]
    assert any(line.startswith("g00_gemm_scores") and " triton " in line for line in lines)
    assert any(line.startswith("g01_rowwise_scores") and " triton " in line for line in lines)
    inner = lines.index("    scan, body 0:")
    assert lines[inner + 1].startswith("    group")
    assert "optimal" in lines[-1] or "trivial" in lines[-1]
    assert not any(line.endswith(" ") for line in lines)


def test_names_are_unique_identifiers():
    names = [g.name for g in plan().groups]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)


def test_summary_counts_bodies():
    counts = summary(plan())
    assert counts["triton"] == 4
    assert counts["kinds"] == {"gemm": 1, "pointwise": 1, "rowwise": 2}
    assert counts["groups"] == counts["triton"] + sum(counts["xla"].values())
    assert counts["fallbacks"] == 0
    assert counts["equations"] == counts["fused_equations"] + 1  # the scan


def test_summary_joins_reasons_that_differ_in_numbers():
    counts = summary(plan("auto"))
    assert counts["xla"]["cost model: XLA's fusion is predicted faster"] == 1


def test_a_plan_that_the_clock_ended_says_so():
    solution = dataclasses.replace(plan().solution, status="feasible", stopped="clock")
    text = format_plan(dataclasses.replace(plan(), solution=solution))
    assert "stopped by the clock" in text.splitlines()[-1]
    assert "clock" not in format_plan(plan())
