"""Products with sparse arrays become gathers, products and scatters that add. For GPUs.

Purpose: JAX keeps products with ``jax.experimental.sparse`` arrays as single equations until it
lowers them, so that no pass sees what they are made of. Written out, a product with a BCOO matrix
is a sum of segments, and the gradient of its elements one product of two rows for each of them.

    bcoo_dot_general(data, [i, j], x)    = scatter_add(0, i, data · x[j])
    bcoo_dot_general_sampled(a, b, [i, j]) = Σ_f a[i, f] · b[j, f]

Invariant: the same values. Elements whose indices lie beyond the array, with which JAX fills up
BCOO arrays, add nothing; their gradient is 0. Where the array's indices are sorted the scatter says
so, and its indices need no sorting. Written out are:

* BCOO times dense, with axes of a batch and dense axes;
* BCSR times dense in the forms that ``segment_sums`` does not take as they are;
* the sampled product of two matrices or vectors, which is the gradient of a matrix's elements;
* the transpose of a BCOO array, which permutes columns of its indices.

What else there is of sparse arrays stays, and is noted: two sparse arrays, and those that are made
dense, of a dense one, or of an unordered one.

    before  { lambda ; a:f32[50] b:i32[50,2] c:f32[9,4]. let
                d:f32[9,4] = bcoo_dot_general[dimension_numbers=(((1,), (0,)), ((), ()))] a b c
              in (d,) }
    after   { lambda ; a:f32[50] b:i32[50,2] c:f32[9,4]. let
                d:i32[50,1] = slice[start_indices=(0, 1) limit_indices=(50, 2)] b
                e:f32[50,4] = gather[FILL_OR_DROP fill_value=0] c d
                f:f32[50,4] = mul (reshape a) e
                g:i32[50,1] = slice[start_indices=(0, 0) limit_indices=(50, 1)] b
                h:f32[9,4] = broadcast_in_dim 0.0; i:f32[9,4] = scatter-add h g f in (i,) }
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import (
    bcoo_dot_general_p,
    bcoo_dot_general_sampled_p,
    bcoo_extract_p,
    bcoo_fromdense_p,
    bcoo_sort_indices_p,
    bcoo_spdot_general_p,
    bcoo_sum_duplicates_p,
    bcoo_todense_p,
    bcoo_transpose_p,
    bcsr_dot_general_p,
    bcsr_extract_p,
    bcsr_fromdense_p,
    bcsr_todense_p,
)
from jax.extend.core import Jaxpr, JaxprEqn, Primitive, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes import inline
from jevt.passes._facts import shape_of
from jevt.passes._remarks import Note, Remarks
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes.segment_sums import is_plain_csr
from jevt_kernels.ops import compute_dtype

type Function = Callable[..., Any]
type Definitions = dict[Var, JaxprEqn]


def run(jaxpr: Jaxpr, note: Note = lambda _: None) -> Jaxpr:
    """Writes out products with sparse arrays, in ``jaxpr`` and in its bodies.

    Args:
      jaxpr: the program.
      note: receives a line for each reason for which some stay.
    """
    stay = Remarks()
    body = once(lambda inner: _run(inner, stay, body))
    result = _run(jaxpr, stay, body)
    stay.tell(note)
    return result


def _run(jaxpr: Jaxpr, stay: Remarks, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    env: dict[Var, Atom] = {}
    eqns: list[JaxprEqn] = []
    definitions: Definitions = {}
    for original in jaxpr.eqns:
        eqn = map_bodies(substitute(env, original), body)
        found = _spelling(eqn)
        if isinstance(found, str):
            stay.add(eqn, eqn.primitive.name, f" stays: {found}")
        start = len(eqns)
        if callable(found):
            env.update(zip(original.outvars, _spliced(found, eqn, eqns, definitions), strict=True))
        else:
            eqns.append(eqn)
        for new in eqns[start:]:
            definitions.update(dict.fromkeys(new.outvars, new))
    return rebuild(jaxpr, eqns, env)


def _spelling(eqn: JaxprEqn) -> Function | str | None:
    """What an equation is written out as, or why it stays; None for others."""
    rule = _SPELLINGS.get(eqn.primitive)
    if rule is None:
        return None
    avals: list[Any] = [a.aval for a in eqn.invars]
    if not all(aval.sharding.mesh.empty for aval in avals):
        return "it runs on a mesh of devices"
    if not all(aval.size for aval in avals):
        return None  # a product of nothing
    return rule(eqn)


def _spliced(
    function: Function, eqn: JaxprEqn, eqns: list[JaxprEqn], definitions: Definitions
) -> list[Atom]:
    """Appends what ``function`` computes of an equation's operands; returns its results.

    Instead of an array of indices the function is given its columns.
    """
    operands: list[Any] = []
    for atom in eqn.invars:
        is_indices = atom is _indices_of(eqn)
        operands.append(_columns(atom, eqn, eqns, definitions) if is_indices else atom)
    flat, tree = jax.tree.flatten(operands)
    with eqn.ctx.manager:
        traced = jax.make_jaxpr(lambda *a: function(*jax.tree.unflatten(tree, a)))(
            *(jax.ShapeDtypeStruct(shape_of(a), a.aval.dtype) for a in flat)
        )
    start = len(eqns)
    flat_jaxpr = inline.run(traced)
    assert not flat_jaxpr.consts, "an implementation that captures arrays"
    results = inline.splice(flat_jaxpr, flat, eqn.source_info.name_stack, eqns)
    for position in range(start, len(eqns)):
        eqns[position] = eqns[position].replace(source_info=eqn.source_info, ctx=eqn.ctx)
    return results


def _indices_of(eqn: JaxprEqn) -> Atom | None:
    """The operand that is BCOO indices ``[…, nse, n_sparse]``."""
    position = {bcoo_dot_general_sampled_p: 2, bcsr_dot_general_p: None}.get(eqn.primitive, 1)
    return None if position is None else eqn.invars[position]


def _columns(
    indices: Atom, like: JaxprEqn, eqns: list[JaxprEqn], definitions: Definitions
) -> list[Atom]:
    """The columns of indices; what they have been stacked of where that is known."""
    shape = shape_of(indices)
    made = definitions.get(indices) if isinstance(indices, Var) else None
    last = len(shape) - 1
    if made is not None and made.primitive.name == "stack" and made.params["axis"] == last:
        return list(made.invars)
    parts = made.invars if made is not None and made.primitive is p.concatenate_p else ()
    stacked = bool(parts) and made is not None and made.params["dimension"] == last
    if stacked and all(shape_of(part)[-1] == 1 for part in parts):
        sources, at = parts, (0,) * len(parts)
    else:
        sources, at = [indices] * shape[-1], tuple(range(shape[-1]))
    columns = []
    for source, column in zip(sources, at, strict=True):
        traced = jax.make_jaxpr(lambda x, c=column: x[..., c])(source.aval)
        columns += inline.splice(inline.run(traced), [source], like.source_info.name_stack, eqns)
    return columns


# What each primitive is: a function of its operands, why it stays, or None.


def _bcoo_dot_general(eqn: JaxprEqn) -> Function | str:
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    indices: Any = eqn.invars[1].aval
    sizes = eqn.params["lhs_spinfo"].shape
    kept = [a for a in range(indices.ndim - 2, len(sizes)) if a not in (*contracted, *batch)]
    longest = max(math.prod(sizes[a] for a in axes) for axes in (contracted, kept))
    if longest > np.iinfo(indices.dtype).max:
        return f"its {longest} positions are too many for indices of type {indices.dtype}"
    return _product(indices.shape, eqn.params)


def _product(indices_shape: tuple[int, ...], params: dict[str, Any]) -> Function:
    (contracted, of_dense), (batch, dense_batch) = params["dimension_numbers"]
    n_batch, n_sparse = len(indices_shape) - 2, indices_shape[-1]
    sizes = params["lhs_spinfo"].shape
    summed = [a for a in contracted if a < n_batch]
    each = [*batch, *(a for a in range(n_batch) if a not in (*batch, *summed))]
    kept = [a for a in range(n_batch, n_batch + n_sparse) if a not in contracted]
    # Indices are sorted by their first column first.
    leading = kept == [n_batch] and not summed
    single = functools.partial(
        _one_product,
        taken=contracted,
        kept=kept,
        sizes=sizes,
        ascends=bool(params["lhs_spinfo"].indices_sorted and leading),
        dtype=params["preferred_element_type"],
    )

    def product(data: Any, columns: Sequence[Any], dense: Any) -> Any:
        first = (*dense_batch, *of_dense)
        dense = dense.transpose(*first, *(a for a in range(dense.ndim) if a not in first))
        order = (*each, *summed, *range(n_batch, data.ndim))
        data = data.transpose(order)
        by_axis = dict(enumerate(columns, n_batch))
        by_axis = {a: c.transpose(order[: n_batch + 1]) for a, c in by_axis.items()}
        if summed:  # what is summed over is as good as an axis of the indices
            own = tuple(sizes[a] for a in summed)
            data = _merged(data, len(each), own)
            count = indices_shape[-2]
            for i, a in enumerate(summed):
                number = jax.lax.broadcasted_iota(columns[0].dtype, (*own, count), i)
                by_axis[a] = number.reshape((1,) * len(each) + number.shape)
            by_axis = {a: _merged(c, len(each), own) for a, c in by_axis.items()}
        axes = tuple(by_axis)

        def of_columns(data: Any, columns: Sequence[Any], dense: Any) -> Any:
            return single(data, dict(zip(axes, columns, strict=True)), dense)

        shared = [a not in batch for a in each]
        batches = [sizes[a] for a in each]
        return _over_batch(of_columns, batches, data, list(by_axis.values()), dense, shared)

    return product


def _merged(array: Any, at: int, sizes: tuple[int, ...]) -> Any:
    """The axes from ``at`` on, which are of these sizes or of one element, and the next as one."""
    full = (*array.shape[:at], *sizes, *array.shape[at + len(sizes) :])
    rest = array.shape[at + len(sizes) + 1 :]
    return jnp.broadcast_to(array, full).reshape(*array.shape[:at], -1, *rest)


def _over_batch(
    function: Function,
    sizes: Sequence[int],
    elements: Any,
    columns: Sequence[Any],
    dense: Any,
    shared: Sequence[bool],
) -> Any:
    """``function`` of each of a batch.

    Args:
      function: of elements, columns of indices, and a dense array.
      sizes: of the batch's axes.
      elements: their leading axes are the batch's, of 1 element where all share the same.
      columns: as the elements.
      dense: its leading axes are those of the batch's that it has.
      shared: for each axis of the batch, whether the dense array has none.
    """
    if not sizes:
        return function(elements, columns, dense)
    size, *rest = sizes
    axes, operands = [], []
    for operand in (elements, *columns):
        same = operand.shape[0] == 1 and size != 1
        axes.append(None if same else 0)
        operands.append(operand[0] if same else operand)

    def inner(elements: Any, dense: Any, *columns: Any) -> Any:
        return _over_batch(function, rest, elements, columns, dense, shared[1:])

    in_axes = (axes[0], None if shared[0] else 0, *axes[1:])
    mapped = jax.vmap(inner, in_axes, axis_size=size)
    return mapped(operands[0], dense, *operands[1:])


def _one_product(
    data: Any,
    columns: dict[int, Any],
    dense: Any,
    *,
    taken: Sequence[int],
    kept: Sequence[int],
    sizes: Sequence[int],
    ascends: bool,
    dtype: Any,
) -> Any:
    """The product of one array, given by columns of axes, and ``[taken …, others …]``."""
    rows, inner = dense, data.reshape(*data.shape, *(1,) * (dense.ndim - len(taken)))
    if taken:
        lengths = [sizes[a] for a in taken]
        table = dense.reshape(math.prod(lengths), *dense.shape[len(taken) :])
        row = _linear([columns[a] for a in taken], lengths)
        rows = table.at[row].get(mode="fill", fill_value=0)
        rows = rows.reshape(rows.shape[0], *(1,) * (data.ndim - 1), *rows.shape[1:])
    dtype = np.result_type(data, dense) if dtype is None else dtype
    terms = inner.astype(dtype) * rows.astype(dtype)
    if not kept:
        return terms.sum(0, dtype=terms.dtype)
    lengths = [sizes[a] for a in kept]
    total = jnp.zeros((math.prod(lengths), *terms.shape[1:]), terms.dtype)
    row = _linear([columns[a] for a in kept], lengths)
    total = total.at[row].add(terms, mode="drop", indices_are_sorted=ascends)
    return total.reshape(*lengths, *terms.shape[1:])


def _linear(columns: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Indices along several axes as one along all; beyond its end where one is beyond its own."""
    if len(columns) == 1:
        return columns[0]
    total = jnp.zeros(columns[0].shape, columns[0].dtype)
    inside = jnp.ones(columns[0].shape, bool)
    for column, size in zip(columns, sizes, strict=True):
        wrapped = jnp.where(column < 0, column + size, column)
        inside &= (wrapped >= 0) & (wrapped < size)
        total = total * size + wrapped
    return jnp.where(inside, total, math.prod(sizes))


def _bcsr_dot_general(eqn: JaxprEqn) -> Function | str | None:
    if is_plain_csr(eqn):
        return None
    edges = shape_of(eqn.invars[1])
    product = _product((*edges, 2), eqn.params)

    def csr(data: Any, indices: Any, indptr: Any, dense: Any) -> Any:
        count = indices.shape[-1]
        positions = jnp.arange(count, dtype=indptr.dtype)
        search = functools.partial(
            jnp.searchsorted, v=positions, side="right", method="scan_unrolled"
        )
        for _ in edges[:-1]:
            search = jax.vmap(search)
        return product(data, [(search(indptr) - 1).astype(indices.dtype), indices], dense)

    return csr


def _sampled(eqn: JaxprEqn) -> Function | str:
    a, b, indices = eqn.invars
    (of_a, of_b), (batch, batch_b) = eqn.params["dimension_numbers"]
    free_a, free_b = (
        [i for i in range(len(shape_of(x))) if i not in (*contracted, *batched)]
        for x, contracted, batched in ((a, of_a, batch), (b, of_b, batch_b))
    )
    n_batch, n_sparse = len(shape_of(indices)) - 2, shape_of(indices)[-1]
    own = n_batch - len(batch)  # axes of the batch that only the first operand has
    if n_sparse != 2 or own < 0 or (len(free_a), len(free_b)) != (own + 1, 1):
        return "its indices are not those of a matrix"
    sizes = [shape_of(a)[i] for i in (*batch, *free_a[:own])]
    shared = [i >= len(batch) for i in range(n_batch)]
    wide = compute_dtype(np.result_type(a.aval, b.aval))  # type: ignore[arg-type]

    def one(a: Any, columns: Sequence[Any], b: Any) -> Any:
        rows = (
            x.at[column].get(mode="fill", fill_value=0).astype(wide)
            for x, column in zip((a, b), columns, strict=True)
        )
        product = functools.reduce(jnp.multiply, rows)
        return product.sum(tuple(range(1, product.ndim)))

    def sampled(a: Any, b: Any, columns: Sequence[Any]) -> Any:
        a = a.transpose(*batch, *free_a, *of_a)
        result = _over_batch(one, sizes, a, columns, b.transpose(*batch_b, *free_b, *of_b), shared)
        return result.astype(np.result_type(a, b))

    return sampled


def _transpose(eqn: JaxprEqn) -> Function | str:
    indices = eqn.invars[1]
    rank = len(eqn.params["spinfo"].shape)
    n_batch, n_sparse = len(shape_of(indices)) - 2, shape_of(indices)[-1]
    permutation = eqn.params["permutation"]
    moved = [i for i, a in enumerate(permutation) if i != a]
    if any(not n_batch <= i < n_batch + n_sparse for i in moved):
        return f"it moves axes {permutation} of {rank} that are not sparse"
    own = [a - n_batch for a in permutation[n_batch : n_batch + n_sparse]]
    return lambda data, columns: (data, jnp.stack([columns[i] for i in own], axis=-1))


def _stays(reason: str) -> Callable[[JaxprEqn], str]:
    return lambda eqn: reason


_DENSE = "a dense array is asked for; a product with the sparse one would be a sum of segments"
_OF_DENSE = "it reads a dense array at the sparse one's positions, two numbers an element"
_MADE = "it makes positions of a dense array"
_ORDERED = "it orders positions; outside of the step that is done once"

_SPELLINGS: dict[Primitive, Callable[[JaxprEqn], Function | str | None]] = {
    bcoo_dot_general_p: _bcoo_dot_general,
    bcoo_dot_general_sampled_p: _sampled,
    bcoo_transpose_p: _transpose,
    bcsr_dot_general_p: _bcsr_dot_general,
    bcoo_spdot_general_p: _stays("both factors are sparse; with a dense one it would be a sum"),
    **dict.fromkeys((bcoo_todense_p, bcsr_todense_p), _stays(_DENSE)),
    **dict.fromkeys((bcoo_extract_p, bcsr_extract_p), _stays(_OF_DENSE)),
    **dict.fromkeys((bcoo_fromdense_p, bcsr_fromdense_p), _stays(_MADE)),
    **dict.fromkeys((bcoo_sort_indices_p, bcoo_sum_duplicates_p), _stays(_ORDERED)),
}
