"""The stages before the solver: graph, copies, contraction, components."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var
from partitions import trace
from programs import PROGRAMS

from jevt import _jaxpr
from jevt.lowering.rules import classify
from jevt.partition import graph as graphs
from jevt.partition import order
from jevt.partition.absorb import absorb
from jevt.partition.components import split
from jevt.partition.contract import contract
from jevt.partition.duplicate import duplicate, merge_copies
from jevt.partition.reach import Reach

X = np.linspace(-1, 1, 512, dtype=np.float32).reshape(8, 64)
BIAS = np.linspace(0, 1, 64, dtype=np.float32)


def graph_of(function, *arguments):
    return graphs.from_jaxpr(trace(function, *arguments)[0], classify)


@pytest.mark.parametrize("name", ["mlp_step", "layer_norm_grad", "scan", "remat", "identity"])
def test_extract_agrees_with_the_shared_tool(name):
    function, arguments = PROGRAMS[name]
    graph = graph_of(function, *arguments)
    count = len(graph.jaxpr.eqns)
    rng = random.Random(0)
    for _ in range(20):
        positions = sorted(rng.sample(range(count), rng.randint(min(1, count), count)))
        ours, theirs = graph.extract(positions), _jaxpr.extract(graph.jaxpr, positions)
        assert (ours.invars, ours.outvars) == (theirs.invars, theirs.outvars)
        assert ours.eqns == theirs.eqns


def test_sizes_of_nodes():
    def function(x, b):
        y = jnp.exp(x + b) * 2
        return y.sum(-1), y.reshape(64, 8), y @ y.T, x.sum((0, 1), keepdims=True)

    graph = graph_of(function, X, BIAS)
    by_name = {graph.jaxpr.eqns[n.eqns[0]].primitive.name: n for n in graph.nodes}
    assert (by_name["exp"].kind, by_name["exp"].size) == ("pointwise", 512)
    product = by_name["dot_general"]
    assert (product.kind, product.size, product.cols) == ("contraction", 64, 0)
    reductions = [n for n in graph.nodes if n.kind == "reduction"]
    assert sorted((n.size, n.cols) for n in reductions) == [(512, 64), (512, 512)]
    assert any(n.free for n in graph.nodes if n.kind == "view")
    assert all(r.consumers == tuple(sorted(set(r.consumers))) for r in graph.tensors)


def test_a_slice_reads_only_its_part():
    graph = graph_of(lambda x: jnp.sin(jax.lax.slice(x, (0, 0), (2, 64))), X)
    assert graph.tensors[0].nbytes == 4 * 512
    assert graph.tensors[0].read_bytes == (4 * 128,)


def test_broadcasts_are_copied_to_their_readers():
    def function(x, y, b):
        wide = jnp.broadcast_to(b, x.shape)
        return x * wide, jnp.tanh(y - wide), x.T @ wide

    graph = graph_of(function, X, X, BIAS)
    jaxpr = duplicate(graph)
    wide = [e for e in jaxpr.eqns if e.primitive.name == "broadcast_in_dim"]
    readers = [sum(e.outvars[0] in r.invars for r in jaxpr.eqns) for e in wide]
    assert len(jaxpr.eqns) == len(graph.jaxpr.eqns) + 2
    assert set(readers) == {1}
    got = jax.core.eval_jaxpr(jaxpr, (), X, 2 * X, BIAS)
    for a, b in zip(got, jax.core.eval_jaxpr(graph.jaxpr, (), X, 2 * X, BIAS), strict=True):
        np.testing.assert_array_equal(a, b)


def test_copies_in_one_group_are_merged_again():
    def function(x, y, b):
        wide = jnp.broadcast_to(b, x.shape)
        return x * wide, y - wide, wide

    original = trace(function, X, X, BIAS)[0]
    copied = duplicate(graphs.from_jaxpr(original, classify))
    assert len(copied.eqns) > len(original.eqns)
    merged = merge_copies(copied)
    assert len(merged.eqns) == len(original.eqns)
    assert merged.outvars == copied.outvars
    got = jax.core.eval_jaxpr(merged, (), X, 2 * X, BIAS)
    for a, b in zip(got, jax.core.eval_jaxpr(original, (), X, 2 * X, BIAS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert merge_copies(original) is original


def test_chains_are_copied_whole_and_dear_equations_are_not():
    def function(x, b):
        wide = jnp.broadcast_to(b.astype(jnp.float32)[None, :], x.shape)
        dear = jnp.tanh(wide)
        return x * wide + dear, x - wide, dear

    jaxpr = duplicate(graph_of(function, X, BIAS.astype(jnp.bfloat16)))
    count = [e.primitive.name for e in jaxpr.eqns].count
    assert count("convert_element_type") == 3
    assert count("tanh") == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_copies_keep_values(name):
    function, arguments = PROGRAMS[name]
    jaxpr, consts = trace(function, *arguments)
    flat = consts + jax.tree.leaves(arguments)
    copied = duplicate(graphs.from_jaxpr(jaxpr, classify))
    expected = jax.core.eval_jaxpr(jaxpr, (), *flat)
    for a, b in zip(jax.core.eval_jaxpr(copied, (), *flat), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_chain_becomes_one_node():
    def function(x):
        for _ in range(20):
            x = jnp.sin(x)
        return x.astype(jnp.bfloat16).T

    graph = contract(graph_of(function, X), lambda positions: True)
    assert [len(n.eqns) for n in graph.nodes] == [22]
    assert graph.nodes[0].kind == "pointwise"


def test_what_build_refuses_stays_apart():
    graph = graph_of(lambda x: jnp.sin(jnp.sin(x)), X)
    assert len(contract(graph, lambda positions: False).nodes) == 2


def test_a_cast_joins_the_side_on_which_fewer_bytes_cross():
    def function(x, w):
        narrow = (jnp.sin(x) * x).astype(jnp.bfloat16)
        return (narrow @ w).astype(jnp.float32) * x

    graph = contract(graph_of(function, X, np.ones((64, 64), jnp.bfloat16)), lambda p: True)
    names = [[graph.jaxpr.eqns[p].primitive.name for p in n.eqns] for n in graph.nodes]
    assert names == [
        ["sin", "mul", "convert_element_type"],
        ["dot_general"],
        ["convert_element_type", "mul"],
    ]


def test_a_residual_connection_is_no_link():
    def function(x, w):
        y = jnp.sin(x) * 2
        return jnp.exp(y @ w + y)

    graph = contract(graph_of(function, X, np.ones((64, 64), np.float32)), lambda p: True)
    parts, links = split(graph, Reach.of(graph), 0)
    ((producer, _),) = links.edges
    assert graph.nodes[producer].kind == "contraction"
    assert sorted(map(len, parts)) == [1, 2]


def test_a_product_belongs_to_what_reads_its_result():
    """Not to what makes its operands, nor to other readers of them; two are never together."""

    def function(x, y, w):
        x, y = jnp.sin(x) * 2, jnp.cos(y) * 2
        return jnp.tanh(x @ w + y @ w) + x, jnp.exp(x @ w.T).sum(0)

    graph = contract(graph_of(function, X, X, np.ones((64, 64), np.float32)), lambda p: True)
    _, links = split(graph, Reach.of(graph), 0)
    products = {n for n, node in enumerate(graph.nodes) if node.kind == "contraction"}
    assert len(products) == 3
    assert {a for a, _ in links.edges} >= products
    assert not any(b in products for _, b in links.edges)
    assert not any(products.intersection(pair) for pair in links.siblings)


def test_views_and_wider_types_of_operands_join_their_product():
    def function(x, w, b):
        x = x.reshape(-1, 64).astype(jnp.float32)
        return jnp.tanh(x @ w.T.astype(jnp.float32) + b)

    narrow = np.ones((4, 16, 64), jnp.bfloat16)
    graph = contract(graph_of(function, narrow, narrow[0], np.ones(16, np.float32)), lambda p: True)
    names = [[graph.jaxpr.eqns[p].primitive.name for p in n.eqns] for n in graph.nodes]
    (product,) = [n for n in names if "dot_general" in n]
    assert sorted(product) == sorted(
        ["reshape", "convert_element_type", "transpose", "convert_element_type", "dot_general"]
    )
    (node,) = [n for n in graph.nodes if n.kind == "contraction"]
    assert node.size == 64 * 16


def test_layers_are_components_of_their_own():
    def function(x, w):
        for _ in range(5):
            x = x + jax.nn.softmax(x @ w)
        return x

    graph = contract(graph_of(function, X, np.ones((64, 64), np.float32)), lambda p: True)
    parts, _ = split(graph, Reach.of(graph), 0)
    largest = max(map(len, parts))
    assert sum(len(p) == largest for p in parts) == 5


def test_a_leaf_that_two_layers_share_does_not_link_them():
    def function(x, w):
        gradient = jnp.tanh(x) * 2
        product = gradient @ w
        bias = (gradient * gradient).sum(0)
        return jnp.sin(product + gradient), bias

    single = graph_of(function, X, np.ones((64, 64), np.float32))
    graph = contract(single, lambda p: True)
    reach = Reach.of(graph)
    parts, links = split(graph, reach, 0)
    fewer = absorb(graph, reach, parts, links, lambda p: True, launch=9000)
    assert len(fewer.nodes) == len(graph.nodes) - 1
    parts, links = split(fewer, Reach.of(fewer), 0)
    ((producer, _),) = links.edges
    assert fewer.nodes[producer].kind == "contraction"
    assert not links.siblings


def test_what_is_reduced_along_rows_links_to_nothing_after():
    def function(x):
        return jnp.exp(x.sum(0)), jnp.exp(x.sum(1))

    graph = graph_of(function, X)
    _, links = split(graph, Reach.of(graph), 0)
    makers = {graph.jaxpr.eqns[graph.nodes[a].eqns[0]].params["axes"] for a, _ in links.edges}
    assert makers == {(1,)}


def test_order_and_cycle():
    assert order.executable([5, 1, 3], [[], [0], [0]]) == [1, 2, 0]
    assert order.executable([0, 1], [[1], [0]]) is None
    assert order.cycle([[1], [2], []]) is None
    assert sorted(order.cycle([[1], [2, 3], [1], []]) or ()) == [1, 2]
    assert order.quotient([[0, 2], [1]], [[1], [2], []]) == [[1], [0]]


def test_tensors_that_only_leave_are_in_order_of_definition():
    """Whatever the order of the outputs: equal layers have equal problems."""

    def function(x):
        return tuple(jnp.sin(x * float(n)) for n in range(2, 40))

    for order_of_outputs in (tuple, lambda results: results[::-1]):
        graph = graph_of(lambda x, f=order_of_outputs: f(function(x)), X)
        leaving = [t.producer for t in graph.tensors if t.escapes and not t.consumers]
        assert len(leaving) == 38
        assert leaving == sorted(leaving)


def test_uses_name_the_output():
    jaxpr, _ = trace(lambda x: (jnp.sin(x), jnp.sin(x) + 1), X)
    found = graphs.uses(jaxpr)
    (sin,) = (e for e in jaxpr.eqns if e.primitive.name == "sin")
    assert found[sin.outvars[0]] == {None, 1}
    assert all(isinstance(v, Var) for v in found)
