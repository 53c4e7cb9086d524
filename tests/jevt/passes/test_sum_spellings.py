"""Every spelling of an aggregation becomes sums of segments, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import sums_of_segments as sums
from sums_of_segments import EDGES, FEATURES, NODES, draw, ends

segment_sum = jax.ops.segment_sum


def aggregate(h, w, src, dst, **options):
    return segment_sum(h[src] * w[:, None], dst, num_segments=NODES, **options)


def degrees(dst, dtype):
    return segment_sum(jnp.ones(dst.shape, dtype), dst, num_segments=NODES)


def mean(h, w, src, dst):
    total = segment_sum(h[src] * w[:, None], dst, num_segments=NODES)
    return total / jnp.maximum(degrees(dst, h.dtype), 1)[:, None]


def normalised_tables(h, w, src, dst):
    """D^-1/2 A D^-1/2 with the degrees at the nodes."""
    scale = jax.lax.rsqrt(jnp.maximum(degrees(dst, h.dtype), 1))[:, None]
    return aggregate(h * scale, w, src, dst) * scale


def normalised_edges(h, w, src, dst):
    """The same with the degrees at the edges."""
    scale = jax.lax.rsqrt(jnp.maximum(degrees(dst, h.dtype), 1))
    messages = h[src] * (w * scale[src] * scale[dst])[:, None]
    return segment_sum(messages, dst, num_segments=NODES)


def three_factors(h, w, src, dst):
    scale = jnp.cos(w) + 2
    return segment_sum(0.5 * h[src] * w[:, None] / scale[:, None], dst, num_segments=NODES)


def with_messages(h, w, src, dst):
    """As jraph has it: a function of edges, senders and receivers; one that reads two of them."""

    def update_edge(edges, sent, received):
        del received
        return edges * sent

    messages = update_edge(w[:, None], *jax.tree.map(lambda n: (n[src], n[dst]), h))
    return jax.tree.map(lambda e: segment_sum(e, dst, NODES), messages)


def onto_itself(h, w, src, dst):
    return h.at[dst].add(h[src] * w[:, None], mode="drop")


def some_beyond(h, w, src, dst):
    rows = h.at[src + 2].get(mode="fill", fill_value=0)
    return segment_sum(rows * w[:, None], dst - 2, num_segments=NODES)


def clipped(h, w, src, dst):
    return segment_sum(h.at[src + 2].get(mode="clip") * w[:, None], dst, num_segments=NODES)


def where_messages(h, w, src, dst):
    messages = jnp.where((dst % 5 > 0)[:, None], h[src] * w[:, None], 0.0)
    return segment_sum(messages, dst, num_segments=NODES)


def where_rows(h, w, src, dst):
    rows = jnp.where((jnp.arange(EDGES) < 150)[:, None], h.at[src].get(mode="clip"), 0.0)
    return segment_sum(-rows * w[:, None], dst, num_segments=NODES)


def where_not(h, w, src, dst):
    messages = jnp.where((w < 0)[:, None], 0.0, 2 * h[src] / (2 + jnp.cos(w))[:, None])
    return segment_sum(messages, dst, num_segments=NODES)


def where_weights(h, w, src, dst):
    return aggregate(h, jnp.where(dst > src, w, 0), src, dst)


def zero_or_one(h, w, src, dst):
    return aggregate(h, w * (dst > src).astype(w.dtype), src, dst)


# sums, sorts, products of rows for the gradient of the weights
SPELLINGS = {
    "segment_sum": (aggregate, (2, 2, 1)),
    "scaled before": (
        lambda h, w, s, d: aggregate(h * 2, w, s, d),
        (2, 2, 1),
    ),
    "w[:, None] first": (
        lambda h, w, s, d: segment_sum(w[:, None] * h[s], d, num_segments=NODES),
        (2, 2, 1),
    ),
    "einsum": (
        lambda h, w, s, d: segment_sum(jnp.einsum("e,ef->ef", w, h[s]), d, NODES),
        (2, 2, 1),
    ),
    "at.add": (
        lambda h, w, s, d: jnp.zeros_like(h).at[d].add(h[s] * w[:, None]),
        (2, 2, 1),
    ),
    "vmapped edges": (
        lambda h, w, s, d: segment_sum(jax.vmap(lambda w, s: w * h[s])(w, s), d, NODES),
        (2, 2, 1),
    ),
    "jraph": (with_messages, (2, 2, 1)),
    "onto itself": (onto_itself, (2, 2, 1)),
    "mean": (mean, (2, 2, 1)),
    "normalised tables": (normalised_tables, (2, 2, 1)),
    "normalised edges": (normalised_edges, (2, 2, 1)),
    "three factors": (three_factors, (2, 2, 1)),
    "some beyond": (some_beyond, (2, 2, 1)),
    "clipped": (clipped, (2, 2, 1)),
    "where on messages": (where_messages, (2, 2, 1)),
    "where on rows": (where_rows, (2, 2, 1)),
    "where not": (where_not, (2, 2, 1)),
    "where on weights": (where_weights, (2, 2, 1)),
    "0 or 1": (zero_or_one, (2, 2, 1)),
    "without weights": (
        lambda h, w, s, d: segment_sum(h[s], d, num_segments=NODES) + 0 * w.sum(),
        (2, 2, 0),
    ),
}


def counts(result):
    count, jaxpr, notes = result
    assert not notes
    assert count["scatter-add"] == 0
    assert sums.largest_made(jaxpr) < EDGES * FEATURES  # messages are never made
    return count["segment_sum"], count["segment_order"], count["row_products"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    function, want = SPELLINGS[name]
    args = draw((NODES, FEATURES)), draw(EDGES), ends(), ends(seed=2)
    assert counts(sums.check(function, *args)) == want


def test_masked_edges_may_be_anything():
    """What a mask drops is 0, whatever is beyond it: rows and weights that are no numbers."""
    h = draw((NODES, FEATURES)).at[3].set(jnp.inf).at[4].set(jnp.nan)
    w = draw(EDGES).at[:20].set(jnp.nan)
    src, dst = ends(), ends(seed=2)
    mask = (jnp.arange(EDGES) >= 20) & (src != 3) & (src != 4)

    def forward(h, w, mask, src, dst):
        messages = jnp.where(mask[:, None], h[src] * w[:, None], 0.0)
        return segment_sum(messages, dst, num_segments=NODES)

    args = h, w, mask, src, dst
    jaxpr, notes = sums.rewritten(jax.make_jaxpr(forward)(*args))
    assert not notes
    got = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)[0]
    want = forward(*args)
    assert bool(jnp.isfinite(want).all())
    assert float(jnp.abs(got - want).max()) < 1e-5


@pytest.mark.parametrize(
    "mask", [lambda h: h > 0, lambda h: (jnp.arange(FEATURES) > 2)[None, :] & (h == h)]
)
def test_masks_of_elements_stay(mask):
    def function(h, w, src, dst):
        rows = h[src]
        return segment_sum(jnp.where(mask(rows), rows, 0.0), dst, num_segments=NODES) + w.sum()

    args = draw((NODES, FEATURES)), draw(EDGES), ends(), ends(seed=2)
    count, _, notes = sums.check(function, *args)
    assert count["select_n"] >= 1 and any("are not looked up in a table" in n for n in notes)


def test_float64_and_wide_indices():
    with jax.enable_x64(True):
        args = (
            draw((NODES, FEATURES), jnp.float64),
            draw(EDGES, jnp.float64),
            ends(dtype=jnp.int64),
            ends(dtype=jnp.int64, seed=2).at[3].set(2**40).at[4].set(-(2**35)),
        )
        assert counts(sums.check(aggregate, *args, tolerance=1e-13)) == (2, 2, 1)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.uint32])
def test_other_indices(dtype):
    args = draw((NODES, FEATURES)), draw(EDGES), ends(dtype=dtype), ends(dtype=dtype, seed=2)
    assert counts(sums.check(aggregate, *args)) == (2, 2, 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_halves(dtype):
    args = draw((NODES, FEATURES), dtype), draw(EDGES, dtype), ends(), ends(seed=2)
    assert counts(sums.check(aggregate, *args, tolerance=4e-2)) == (2, 2, 1)


@pytest.mark.parametrize("wide", [False, True])
def test_casts_between(wide):
    """A table in bfloat16 is read as it is; one that is rounded is rounded before it is read."""
    table, messages = (jnp.bfloat16, jnp.float32) if wide else (jnp.float32, jnp.bfloat16)

    def function(h, w, src, dst):
        rows = h.astype(table)[src].astype(messages).astype(jnp.float32)
        return segment_sum(rows * w[:, None], dst, num_segments=NODES)

    args = draw((NODES, FEATURES)), draw(EDGES), ends(), ends(seed=2)
    _, jaxpr, _ = sums.check(function, *args, tolerance=2e-2)
    sum_ = next(e for e in jaxpr.eqns if e.primitive.name == "segment_sum")
    assert sum_.invars[3].aval.dtype == jnp.bfloat16
    assert sum_.outvars[0].aval.dtype == jnp.float32


def test_indices_that_are_sorted_are_not_sorted():
    args = draw((NODES, FEATURES)), draw(EDGES), ends(), jnp.sort(ends(seed=2))
    result = sums.check(lambda *a: aggregate(*a, indices_are_sorted=True), *args)
    assert counts(result) == (2, 1, 1)  # only the reversed graph's


@pytest.mark.parametrize(
    "multiply",
    [
        lambda h, w, src: h[src] * w[:, :, None],
        lambda h, w, src: jnp.einsum("eh,ehf->ehf", w, h[src]),
        lambda h, w, src: jax.vmap(lambda h, w: h[src] * w[:, None], 1, 1)(h, w),
    ],
)
def test_heads(multiply):
    """A weight for each edge and head; their gradient is a sum for each."""

    def function(h, w, src, dst):
        return segment_sum(multiply(h, w, src), dst, num_segments=NODES)

    args = draw((NODES, 2, 3)), draw((EDGES, 2)), ends(), ends(seed=2)
    assert counts(sums.check(function, *args)) == (2, 2, 1)


@pytest.mark.parametrize("axes", [(0, 0), (2, 1), (1, -2)])
def test_features_of_a_batch_on_one_graph(axes):
    """``vmap`` over features: the sum is over a wider row, each index used once."""
    args = draw((4, 30, 6)), draw(EDGES), ends(), ends(seed=2)
    args = (jnp.moveaxis(args[0], 0, axes[0]), *args[1:])
    mapped = jax.vmap(aggregate, (axes[0], None, None, None), axes[1])
    count, jaxpr, _ = sums.check(mapped, *args)
    assert (count["segment_sum"], count["segment_order"], count["row_products"]) == (2, 2, 1)
    assert sums.largest_made(jaxpr) <= 4 * EDGES


@pytest.mark.parametrize(("low", "high"), [(0, NODES), (-3, NODES + 3)])
def test_a_graph_for_each_of_a_batch(low, high):
    args = draw((4, NODES, FEATURES)), draw((4, EDGES)), ends((4, EDGES))
    dst = ends((4, EDGES), low, high, seed=2)
    assert counts(sums.check(jax.vmap(aggregate), *args, dst)) == (2, 2, 1)


def test_one_table_for_a_batch_of_graphs():
    args = draw((NODES, FEATURES)), draw((4, EDGES)), ends((4, EDGES)), ends((4, EDGES), seed=2)
    assert counts(sums.check(jax.vmap(aggregate, (None, 0, 0, 0)), *args)) == (2, 2, 1)


def test_counts_are_differences_of_bounds():
    dst = ends(low=-2, high=NODES + 2)
    count, _, _ = sums.check(lambda h, d: h * (3 * degrees(d, h.dtype)), draw(NODES), dst)
    assert (count["segment_sum"], count["segment_bounds"]) == (0, 1)


def test_counts_beyond_what_bfloat16_adds_up():
    """One by one, ones in bfloat16 end at 256."""
    dst = jnp.zeros(1001, jnp.int32)
    jaxpr, _ = sums.rewritten(jax.make_jaxpr(lambda d: degrees(d, jnp.bfloat16))(dst))
    (got,) = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, dst)
    assert float(got[0]) == float(jnp.bfloat16(1001))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda h, w, s, d: segment_sum(h[s] * draw((EDGES, FEATURES)), d, NODES), "by element"),
        (lambda h, w, s, d: segment_sum(jnp.tanh(h[s]), d, NODES), "not looked up"),
        (lambda h, w, s, d: segment_sum(h.at[s].get(mode="fill"), d, NODES), "is not 0"),
        (lambda h, w, s, d: segment_sum(h.at[s, :3].get() * w[:, None], d, NODES), "whole rows"),
    ],
)
def test_terms_that_are_made(function, why):
    """They are summed by the kernel all the same, and the notes say why they had to be made."""
    args = draw((NODES, FEATURES)), draw(EDGES), ends(), ends(seed=2)
    count, _, notes = sums.check(function, *args)
    assert count["segment_sum"] >= 1
    assert any("the terms of the sum of segments at" in n and why in n for n in notes), notes


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda h, w, s, d: jnp.zeros((NODES, NODES)).at[s, d].add(w), "more than rows"),
        (lambda h, w, s, d: jnp.zeros(EDGES).at[d].add(w, unique_indices=True), "no two"),
        (lambda h, w, s, d: jnp.zeros(10 * EDGES).at[d].add(w), "few for 2000 rows"),
        (lambda h, w, s, d: jnp.zeros(NODES).at[d[:1]].add(w[:1]), "30 rows and 1 indices"),
    ],
)
def test_scatters_that_stay_say_why(function, why):
    args = draw((NODES, FEATURES)), draw(EDGES), ends(), ends(seed=2)
    jaxpr, notes = sums.rewritten(jax.make_jaxpr(function)(*args))
    assert "scatter-add" in str(jaxpr)
    assert len(notes) == 1
    assert why in notes[0]
    assert "test_sum_spellings.py" in notes[0]
