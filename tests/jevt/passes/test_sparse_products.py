"""Products with BCOO and BCSR arrays become sums of segments, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import sums_of_segments as sums
from jax.experimental import sparse
from rewriting import count
from sums_of_segments import EDGES, FEATURES, NODES, draw, ends

from jevt.passes import inline, sparse_products


def matrix(data, indices, **known):
    return sparse.BCOO((data, indices), shape=(NODES, NODES), **known)


def pairs(padding=0, dtype=jnp.int32):
    indices = jnp.stack([ends(seed=2, dtype=dtype), ends(dtype=dtype)], axis=1)
    return jnp.concatenate([indices, jnp.full((padding, 2), NODES, dtype)])


def in_order(padding=0):
    indices = pairs(padding)
    return indices[jnp.lexsort((indices[:, 1], indices[:, 0]))]


def compressed(padding=0):
    """Columns and row pointers of the sorted matrix; padding lies beyond the last row."""
    indices = in_order()
    pointers = jnp.searchsorted(indices[:, 0], jnp.arange(NODES + 1)).astype(jnp.int32)
    return jnp.concatenate([indices[:, 1], jnp.full(padding, NODES, jnp.int32)]), pointers


def found(result):
    count, jaxpr, notes = result
    assert not notes
    assert not [name for name in count if name.startswith(("bcoo", "bcsr"))]
    assert sums.largest_made(jaxpr) < EDGES * FEATURES
    return count["segment_sum"], count["segment_order"], count["row_products"]


@pytest.mark.parametrize(
    "product",
    [
        lambda data, indices, h: matrix(data, indices) @ h,
        lambda data, indices, h: matrix(data, indices).T @ h,
        lambda data, indices, h: (h.T @ matrix(data, indices)).T,
        lambda data, indices, h: sparse.sparsify(jnp.matmul)(matrix(data, indices), h),
        lambda data, indices, h: sparse.sparsify(lambda a, h: jnp.einsum("ij,jf->if", a, h))(
            matrix(data, indices), h
        ),
    ],
)
def test_a_matrix_times_a_matrix(product):
    assert found(sums.check(product, draw(EDGES), pairs(), draw((NODES, FEATURES)))) == (2, 2, 1)


def test_times_a_vector():
    result = sums.check(
        lambda data, indices, x: matrix(data, indices) @ x, draw(EDGES), pairs(), draw(NODES)
    )
    assert found(result) == (2, 2, 1)


@pytest.mark.parametrize("indices", [pairs(9), pairs(9)[::-1]])
def test_padding_adds_nothing_and_gets_no_gradient(indices):
    h = draw((NODES, FEATURES)).at[-1].set(1e30)  # what an index clipped to the array would read
    args = draw(EDGES + 9), indices, h
    result = sums.check(lambda data, i, h: jnp.tanh(matrix(data, i) @ h), *args)
    assert found(result) == (2, 2, 1)


@pytest.mark.parametrize("padding", [0, 9])
def test_sorted_indices_are_not_sorted(padding):
    args = draw(EDGES + padding), in_order(padding), draw((NODES, FEATURES))
    result = sums.check(lambda data, i, h: matrix(data, i, indices_sorted=True) @ h, *args)
    assert found(result) == (2, 1, 1)  # the transposed matrix's
    # The columns of a sorted matrix are not sorted.
    result = sums.check(lambda data, i, h: matrix(data, i, indices_sorted=True).T @ h, *args)
    assert found(result)[1] >= 1


def test_layers_share_the_order_of_a_matrix_made_in_each():
    def network(data, src, dst, h):
        for _ in range(3):
            h = jnp.tanh(matrix(data, jnp.stack([dst, src], axis=1)) @ h)
        return h

    args = draw(EDGES), ends(), ends(seed=2), draw((NODES, FEATURES))
    count, _, _ = sums.check(network, *args)
    assert (count["segment_sum"], count["segment_order"]) == (6, 2)


def test_columns_of_stacked_indices_are_what_was_stacked():
    args = draw(EDGES), ends(), ends(seed=2), draw((NODES, FEATURES))
    for stack in (
        lambda d, s: jnp.stack([d, s], axis=1),
        lambda d, s: jnp.concatenate([d[:, None], s[:, None]], axis=1),
    ):
        count, _, _ = sums.check(lambda w, s, d, h, k=stack: matrix(w, k(d, s)) @ h, *args)
        assert count["slice"] == 0


def test_float64_and_wide_indices():
    with jax.enable_x64(True):
        args = draw(EDGES, jnp.float64), pairs(dtype=jnp.int64)
        args = (*args, draw((NODES, FEATURES), jnp.float64))
        result = sums.check(lambda data, i, h: matrix(data, i) @ h, *args, tolerance=1e-13)
        assert found(result) == (2, 2, 1)


def test_bfloat16():
    args = draw(EDGES, jnp.bfloat16), pairs(), draw((NODES, FEATURES), jnp.bfloat16)
    result = sums.check(lambda data, i, h: matrix(data, i) @ h, *args, tolerance=4e-2)
    assert found(result) == (2, 2, 1)


def test_batches():
    """Of matrices, of dense operands, and of both."""
    shape = (3, NODES, NODES)
    data, dense = draw((3, EDGES)), draw((3, NODES, FEATURES))
    indices = jnp.stack([pairs(), pairs()[::-1], in_order()])

    def batched(data, indices, dense):
        numbers = (((2,), (1,)), ((0,), (0,)))
        lhs = sparse.BCOO((data, indices), shape=shape)
        return sparse.bcoo_dot_general(lhs, dense, dimension_numbers=numbers)

    def shared(data, indices, dense):
        return sparse.BCOO((data, indices), shape=shape) @ dense

    def of_dense(data, indices, dense):
        return jax.vmap(lambda h: matrix(data, indices) @ h)(dense)

    assert found(sums.check(batched, data, indices, dense)) == (2, 2, 1)
    # The gradient of what is shared sums over the batch.
    assert found(sums.check(shared, data, indices, dense[0])) == (2, 2, 1)
    count, _, notes = sums.check(of_dense, data[0], indices[0], dense)
    assert (count["segment_sum"], count["segment_order"], notes) == (2, 2, [])


def test_an_array_of_three_sparse_axes():
    """Summed over one axis or over two."""
    for contracted, of_dense in (((2,), (0,)), ((0, 2), (1, 0))):
        indices = jnp.concatenate([pairs(9), ends((EDGES + 9, 1), high=NODES + 1, seed=3)], axis=1)
        dense = draw([(NODES, FEATURES), (NODES, NODES, FEATURES)][len(contracted) - 1])

        def product(dense, indices, data, numbers=((contracted, of_dense), ((), ()))):
            lhs = sparse.BCOO((jax.lax.stop_gradient(data), indices), shape=(NODES,) * 3)
            return sparse.bcoo_dot_general(lhs, dense, dimension_numbers=numbers)

        count, _, _ = sums.check(product, dense, indices, draw(EDGES + 9))
        assert count["segment_sum"] >= 1
        # What is left has more rows than suit the kernel.
        assert count["segment_sum"] + count["scatter-add"] == 2


def test_several_axes_of_the_dense_operand():
    def product(data, indices, dense):
        numbers = (((1,), (1,)), ((), ()))
        return sparse.bcoo_dot_general(matrix(data, indices), dense, dimension_numbers=numbers)

    count, _, notes = sums.check(product, draw(EDGES), pairs(), draw((2, NODES, 3)))
    assert (count["segment_sum"], count["row_products"], notes) == (2, 1, [])


def test_dense_axes_of_the_sparse_operand():
    def product(data, indices, dense):
        lhs = sparse.BCOO((data, indices), shape=(NODES, NODES, 3))
        numbers = (((1,), (0,)), ((), ()))
        return sparse.bcoo_dot_general(lhs, dense, dimension_numbers=numbers)

    args = draw((EDGES, 3)), pairs(), draw((NODES, FEATURES))
    jaxpr, _ = sums.rewritten(jax.make_jaxpr(product)(*args))
    (got,) = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)
    assert jnp.allclose(got, jax.jit(product)(*args), atol=1e-4)


@pytest.mark.filterwarnings("ignore:bcsr_dot_general")
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("width", [(FEATURES,), ()])
def test_csr_brings_its_bounds(padding, width):
    def product(data, columns, pointers, h):
        return sparse.BCSR((data, columns, pointers), shape=(NODES, NODES)) @ h

    args = draw(EDGES + padding), *compressed(padding), draw((NODES, *width))
    count, _, notes = sums.check(product, *args)
    # Forward nothing is sorted or searched; backward, the columns are.
    assert (count["segment_sum"], count["segment_order"], count["segment_bounds"]) == (2, 1, 1)
    assert (count["row_products"], notes) == (1, [])


@pytest.mark.filterwarnings("ignore:bcsr_dot_general")
def test_csr_in_batches():
    def product(data, columns, pointers, h):
        lhs = sparse.BCSR((data, columns, pointers), shape=(2, NODES, NODES))
        numbers = (((2,), (1,)), ((0,), (0,)))
        return sparse.bcsr_dot_general(lhs, h, dimension_numbers=numbers)

    columns, pointers = (jnp.stack([a, a]) for a in compressed())
    args = draw((2, EDGES)), columns, pointers, draw((2, NODES, FEATURES))
    jaxpr, _ = sums.rewritten(jax.make_jaxpr(product)(*args))
    (got,) = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)
    assert jnp.allclose(got, jax.jit(product)(*args), atol=1e-4)
    assert "segment_sum" in str(jaxpr)


@pytest.mark.parametrize("edges", [0, 1])
def test_no_elements_and_one(edges):
    """Too few for a kernel, and right all the same."""
    args = draw(edges), pairs()[:edges], draw((NODES, FEATURES))
    count, _, _ = sums.check(lambda data, i, h: matrix(data, i) @ h, *args)
    assert count["segment_sum"] == 0


def test_one_row():
    indices = jnp.zeros((EDGES, 2), jnp.int32)

    def product(data, indices, h):
        return sparse.BCOO((data, indices), shape=(1, 1)) @ h

    sums.check(product, draw(EDGES), indices, draw((1, FEATURES)))


def test_inside_a_scan():
    def network(data, indices, h):
        def layer(h, _):
            return jnp.tanh(matrix(data, indices) @ h), None

        return jax.lax.scan(layer, h, length=3)[0]

    _, jaxpr, _ = sums.check(network, draw(EDGES), pairs(), draw((NODES, FEATURES)))
    assert "bcoo" not in str(jaxpr)


@pytest.mark.parametrize(
    ("dtype", "size", "why"),
    [(jnp.int32, 30, "are not those of a matrix"), (jnp.int8, 100, "10000 positions are too many")],
)
def test_what_stays_says_why(dtype, size, why):
    notes = []
    indices = ends((EDGES, 3), dtype=dtype)

    def gradient(data, h):
        lhs = sparse.BCOO((data, indices), shape=(size, size, size))
        numbers = (((1, 2), (0, 1)), ((), ()))
        product = sparse.bcoo_dot_general(lhs, h, dimension_numbers=numbers)
        return jnp.sin(product).sum()

    before = jax.make_jaxpr(jax.grad(gradient))(draw(EDGES), draw((size, size)))
    after = sparse_products.run(before, notes.append)
    assert "bcoo" in str(after)
    assert any("test_sparse_products.py" in n and why in n for n in notes), notes


OTHERS = {
    "dense": (lambda m, h: m.todense() @ h, "bcoo_todense", "a dense array is asked for"),
    "dense, CSR": (
        lambda m, h: sparse.BCSR.from_bcoo(m.sort_indices()).todense() @ h,
        "bcsr_todense",
        "a dense array is asked for",
    ),
    "sorted": (lambda m, h: m.sort_indices() @ h, "bcoo_sort_indices", "done once"),
    "summed": (lambda m, h: m.sum_duplicates(nse=EDGES) @ h, "bcoo_sum_duplicates", "done once"),
    "extracted": (
        lambda m, h: sparse.bcoo_extract(m, h @ h.T).data,
        "bcoo_extract",
        "reads a dense array",
    ),
    "made": (lambda m, h: sparse.BCOO.fromdense(h, nse=20) @ h.T, "bcoo_fromdense", "positions"),
    "of two": (lambda m, h: (m @ m.T).todense(), "bcoo_spdot_general", "both factors are sparse"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_there_is_of_sparse_arrays_stays_and_says_why(name):
    function, primitive, why = OTHERS[name]
    notes = []

    def step(data, indices, h):
        return function(matrix(data, indices), h)

    jaxpr = inline.run(jax.make_jaxpr(step)(draw(EDGES), pairs(), draw((NODES, FEATURES))))
    after = sparse_products.run(jaxpr, notes.append)
    assert count(after, primitive) == count(jaxpr, primitive) > 0
    assert any(n.startswith(primitive) and " stays: " in n and why in n for n in notes), notes


def test_without_sparse_arrays_nothing_changes():
    before = jax.make_jaxpr(lambda x: jnp.tanh(x @ x))(draw((4, 4)))
    assert sparse_products.run(before) is before
