"""Plans as drawings: text for Graphviz, and SVG through its program."""

import itertools
import os
import re
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from partitions import context, trace

from jevt.partition import partition

X = np.zeros((64, 64), np.float32)


def program(x):
    with jax.named_scope('say "scores"'):
        x = jax.nn.softmax(x @ x)
    x, _ = lax.scan(lambda c, _: (jax.nn.softmax(c), None), x, None, length=3)
    return jnp.sin(x) * 2


@pytest.fixture(scope="module")
def plan():
    return partition(trace(program, X)[0], context("triton"))


def boxes(text):
    return re.findall(r'^ *"((?:[^"\\]|\\.)*)" \[label', text, re.MULTILINE)


def arrows(text):
    return re.findall(r'^ *"((?:[^"\\]|\\.)*)" -> "((?:[^"\\]|\\.)*)"', text, re.MULTILINE)


def test_every_group_is_a_box_and_every_cut_edge_an_arrow(plan):
    text = plan.to_dot()
    ((position, body), inner) = plan.nested[0]
    names = [g.name for g in plan.groups] + [f"{position}.{body}/{g.name}" for g in inner.groups]
    assert boxes(text) == names
    solid = [pair for pair in arrows(text) if pair[1] in names and "/" not in pair[1]]
    assert solid == list(itertools.pairwise(names[:4]))
    assert text.count("16.0 KiB") >= 3, "64 x 64 numbers of 4 bytes on each"
    assert text.count("{") == text.count("}")


def test_kinds_have_colours_and_bodies_frames(plan):
    text = plan.to_dot()
    fills = dict(re.findall(r'"(g\d\d_[a-z]+)[^"]*" \[.*fillcolor="(#\w+)"', text))
    assert fills["g02_opaque"] == "#e6e6e6"
    assert len(set(fills.values())) == 4, "a product, a rowwise, a pointwise kernel, a scan"
    assert 'label="scan, body 0";' in text
    assert "style=dashed" in text


def test_left_to_xla_tells_why():
    text = partition(trace(lambda x: jnp.sin(x) * 2, X)[0], context()).to_dot()
    assert 'fillcolor="#ffffff"' in text
    assert "cost model:" in text and "#c00000" not in text
    text = partition(trace(jax.nn.softmax, X)[0], context(partitioned=True)).to_dot()
    assert 'color="#c00000"' in text


@pytest.fixture
def fake_dot(tmp_path, monkeypatch):
    """Puts a script in place of ``dot``."""

    def put(script):
        path = tmp_path / "dot"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


def test_svg_is_what_dot_makes_of_it(plan, fake_dot):
    fake_dot('echo "$@"; cat')
    assert plan.to_svg() == "-Tsvg\n" + plan.to_dot()


def test_svg_without_graphviz_says_what_to_do(plan, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)expects Graphviz.* 1\. .* 2\. "):
        plan.to_svg()


def test_a_failure_of_dot_is_told(plan, fake_dot):
    fake_dot("cat > /dev/null; echo 'out of ink' >&2; exit 3")
    with pytest.raises(RuntimeError, match="status 3: out of ink"):
        plan.to_svg()
