"""Plans as JSON: back again, and two of them compared by lines."""

import dataclasses
import difflib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from partitions import check_valid, context, trace

from jevt.partition import from_json, partition, to_json

X = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


def program(x, scale=2.0):
    x = jax.nn.softmax(x @ x)
    x, _ = lax.scan(lambda c, _: (jax.nn.softmax(c), None), x, None, length=3)
    column = (x * x).sum(0)
    return jnp.sin(x) * scale, column


def plan(function=program, backend="triton"):
    return partition(trace(function, X)[0], context(backend))


@pytest.mark.parametrize("backend", ["triton", "auto", "xla"])
def test_round_trip(backend):
    before = plan(backend=backend)
    text = to_json(before)
    after = from_json(text, before.jaxpr)
    assert to_json(after) == text
    check_valid(after, [X], rtol=1e-5)
    pairs = [*zip(before.groups, after.groups, strict=True)]
    pairs += zip(before.nested[0][1].groups, after.nested[0][1].groups, strict=True)
    for one, two in pairs:
        for field in dataclasses.fields(one):
            was, now = getattr(one, field.name), getattr(two, field.name)
            if field.name == "jaxpr":
                assert str(now) == str(was)
            elif isinstance(was, float):
                assert now == pytest.approx(was, abs=1e-3)
            else:
                assert now == was, field.name


def test_same_plan_same_text():
    assert to_json(plan()) == to_json(plan())


def test_a_diff_shows_what_changed_and_nothing_else():
    one, two = (to_json(plan(backend=b)).splitlines() for b in ("triton", "auto"))
    changed = [x[2:] for x in difflib.ndiff(one, two) if x[0] in "+-"]
    assert changed, "the cost model leaves a pointwise group to XLA"
    indents = {len(line) - len(line.lstrip()) for line in one if '"eqns"' in line}
    own = [line.strip() for line in changed if len(line) - len(line.lstrip()) in indents]
    fields = {line.split(":")[0].strip('"') for line in own} - {"},"}
    assert fields <= {"target", "predicted_us", "reason", "name", "kernel", "config"}


def test_equations_are_one_line_a_group():
    group = max(json.loads(to_json(plan()))["groups"], key=lambda g: len(g["eqns"]))
    assert isinstance(group["eqns"], str)
    lines = to_json(plan()).splitlines()
    assert sum('"eqns"' in line for line in lines) == sum('"kind"' in line for line in lines)


def test_a_plan_of_another_program_is_refused():
    text = to_json(plan())
    shorter = partition(trace(jnp.sin, X)[0], context()).jaxpr
    with pytest.raises(ValueError, match="expected a plan of the 1 equations .* each in one group"):
        from_json(text, shorter)
    data = json.loads(text)
    product, rows = data["groups"][:2]
    assert (product["kind"], rows["kind"]) == ("gemm", "rowwise")
    rows["eqns"] = f"{product['eqns']} {rows['eqns']}"
    data["groups"].remove(product)
    with pytest.raises(ValueError, match="to be a kernel, as in the plan; got: "):
        from_json(json.dumps(data), plan().jaxpr)
