"""Every rule of the algebraic passes: it has cases, applies to them, and keeps their values."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import rule_cases
from rewriting import EDGES, evaluate, near, rewritten, same, text
from rule_cases import CASES

from jevt.passes import _rules, canonicalize, cse, eliminate_reductions, inline, one_hot

TABLES = {
    "canonicalize": canonicalize.RULES,
    "one_hot": one_hot.RULES,
    "eliminate_reductions": eliminate_reductions.RULES,
}
PASSES = (canonicalize.run, one_hot.run, canonicalize.run, eliminate_reductions.run)
X = np.linspace(-1, 2, 24, dtype=np.float32).reshape(2, 3, 4)
SHAPES = [(3, 4), (4, 1), (2, 3, 4)]


def name_of(rule) -> str:
    return f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"


def traced(case, x, axis):
    """Without folding, which would do away with much of such small programs."""
    return cse.run(inline.run(jax.make_jaxpr(lambda x: CASES[case](x, axis))(x)))


RULES = {name_of(r) for table in TABLES.values() for rules in table.values() for r in rules}


@pytest.fixture
def applied(monkeypatch):
    """Names of the rules that have applied."""
    names = set()
    original = _rules.Graph._try

    def recording(self, rule, eqn):
        result = original(self, rule, eqn)
        if result:
            names.add(name_of(rule))
        return result

    monkeypatch.setattr(_rules.Graph, "_try", recording)
    return names


def test_every_rule_has_cases():
    assert {rule for rule, _ in CASES} == RULES


@pytest.mark.parametrize("module", sorted({rule.partition(".")[0] for rule in RULES}))
def test_golden(module, golden):
    """Each rule before and after, on an array of 2×3×4 along the second axis."""
    sections = []
    for case in CASES:
        if case[0].startswith(f"{module}."):
            before = traced(case, X, 1)
            after = text(rewritten(PASSES, before))
            name = " ".join(case).strip()
            sections.append(f"{name}\n  before\n{text(before)}\n  after\n{after}\n")
    golden(f"passes/rules_{module}.txt", "\n".join(sections))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_applies(case, applied):
    rewritten(PASSES, traced(case, X, 1))
    assert case[0] in applied


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@hypothesis.given(st.sampled_from(SHAPES), st.integers(0, 2), st.sampled_from("fd"), st.randoms())
@hypothesis.settings(max_examples=2, deadline=None, derandomize=True)
def test_keeps_values(case, shape, axis, dtype, random):
    rule, axis = case[0], axis % len(shape)
    numbers = np.linspace(-2, 3, 7) if rule in rule_cases.ROUNDED else EDGES.reshape(-1)
    with jax.enable_x64(True):
        x = np.array([random.choice(numbers) for _ in range(np.prod(shape))], dtype).reshape(shape)
        jaxpr = traced(case, x, axis)
        result = rewritten(PASSES, jaxpr)
        got, want = (evaluate(j, x) for j in (result, jaxpr))
        if rule in rule_cases.ROUNDED:
            # Differences of like numbers are as precise as these.
            got, want = (
                np.concatenate([np.ravel(v) for v in (*values, x)]) for values in (got, want)
            )
            near([got], [want], 1e-6 if dtype == "f" else 1e-14)
        else:
            same(got, want, signs=rule in rule_cases.EXACT)
