"""A few of the models of ``tests/every_pass.py``, and that it finds what a pass breaks."""

from __future__ import annotations

import every_pass
import numpy as np
import pytest
from jax.extend.core import primitives as p

from jevt import pipeline


@pytest.mark.parametrize("name", ["two_towers", "xmlcnn"])
def test_values_after_each_pass(name):
    assert every_pass.check(name).changed > 7


def broken(jaxpr):
    """The program with a subtraction in the place of its last addition."""
    eqns = list(jaxpr.eqns)
    last = max(i for i, eqn in enumerate(eqns) if eqn.primitive is p.add_p)
    eqns[last] = eqns[last].replace(primitive=p.sub_p)
    return jaxpr.replace(eqns=eqns)


def test_a_wrong_pass_is_named(monkeypatch):
    passes = (*pipeline.GRAPH_PASSES[:1], ("wrong", broken))
    monkeypatch.setattr(pipeline, "graph_passes", lambda context: passes)
    with pytest.raises(AssertionError, match=r"contrastive after wrong \(1\)"):
        every_pass.check("contrastive")


def test_errors():
    """One output by itself; NaN and other integers are never right."""

    def fun(state):
        return {"n": state["n"] + 1, "x": state["x"] + 1e-3, "zero": 0 * state["zero"]}, state["x"]

    ones = np.ones(3, np.float32)
    step = every_pass.Step.of(fun, {"n": np.int32(1), "x": ones, "zero": 0 * ones})
    want = step.outputs(step.jaxpr)
    assert step.error(want, want) == 0.0

    def changed(place, value):
        got = [v.copy() for v in want]
        got[place][...] = value
        return step.error(got, want)

    n, x, zero, other = range(4)
    assert changed(x, 1.001001) == pytest.approx(1e-3, rel=0.1)
    assert 0.0 < changed(zero, 1e-9) < 1e-3 < changed(zero, 1e-3)
    assert changed(n, 3) == np.inf
    for place in (x, zero, other):
        assert changed(place, np.nan) == changed(place, np.inf) == np.inf
