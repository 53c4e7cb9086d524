"""The reference of every kernel: the tree evaluated with ``jax.numpy`` over the whole space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap, Space
from jevt_kernels.ops import OPS, compute_dtype, is_float
from jevt_kernels.spec import KernelSpec

_REDUCTIONS: dict[str, Callable[..., jax.Array]] = {
    "sum": jnp.sum,
    "prod": jnp.prod,
    "max": jnp.max,
    "min": jnp.min,
    "and": jnp.all,
    "or": jnp.any,
}


def reference(spec: KernelSpec, *arrays: Any) -> tuple[jax.Array, ...]:
    """Evaluates a kernel without generating it.

    Args:
      spec: the kernel.
      arrays: one array for each of ``spec.inputs``, of its shape and dtype.

    Returns:
      One array for each of ``spec.outputs``. Sums of float16 and bfloat16 are
      float32, as in the kernel.
    """
    types = [(tuple(a.shape), np.dtype(a.dtype)) for a in arrays]
    expected = [(t.shape, t.dtype) for t in spec.inputs]
    if types != expected:
        raise TypeError(f"kernel {spec.name!r}: expected inputs {expected}, got {types}")
    if spec.members:
        return _members(spec, arrays)
    values: list[Any] = []
    outputs: list[jax.Array] = [jnp.zeros(t.shape, t.dtype) for t in spec.outputs]
    for node in spec.tree:
        values.append(_evaluate(node, spec, values, arrays, outputs))
    return tuple(outputs)


def _members(spec: KernelSpec, arrays: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """The outputs of a kernel that runs its tree over several sets of tensors."""
    outputs: dict[int, jax.Array] = {}
    for position, member in enumerate(spec.members):
        results = reference(spec.member(position), *(arrays[i] for i in member.inputs))
        outputs.update(zip(member.outputs, results, strict=True))
    return tuple(outputs[o] for o in range(len(spec.outputs)))


def addresses(index: IndexMap, space: Space) -> np.ndarray:
    """The map's value at every point; size-1 axes where it does not vary."""
    rank = len(space.sizes)
    total = np.full((1,) * rank, index.offset, np.int64)
    for axis, stride in enumerate(index.strides):
        if stride and space.sizes[axis] != 1:
            shape = [1] * rank
            shape[axis] = space.sizes[axis]
            total = total + np.arange(space.sizes[axis], dtype=np.int64).reshape(shape) * stride
    return total


def _evaluate(
    node: visitor.Node,
    spec: KernelSpec,
    values: list[Any],
    arrays: tuple[Any, ...],
    outputs: list[jax.Array],
) -> Any:
    rank = len(spec.space.sizes)
    match node:
        case visitor.Load():
            array = jnp.asarray(arrays[node.input])
            value = array.reshape(-1)[addresses(node.index, spec.space)]
            return value.astype(compute_dtype(np.dtype(array.dtype)))
        case visitor.Constant():
            return jnp.full((1,) * rank, node.value, compute_dtype(node.dtype))
        case visitor.Iota():
            return jnp.asarray(addresses(node.index, spec.space).astype(compute_dtype(node.dtype)))
        case visitor.Compute():
            return _compute(node, spec, values)
        case visitor.Reduce():
            return _reduce(node, spec, values[node.operand])
        case visitor.Store():
            where = addresses(node.index, spec.space)
            value = jnp.broadcast_to(
                values[node.operand], _broadcast_shape(where.shape, values[node.operand].shape)
            )
            flat = (
                outputs[node.output]
                .reshape(-1)
                .at[where]
                .set(value.astype(outputs[node.output].dtype))
            )
            outputs[node.output] = flat.reshape(outputs[node.output].shape)
            return None
        case visitor.Contract():
            return _contract(node, spec, values)
        case visitor.Lookup():
            array = jnp.asarray(arrays[node.input])
            rows = jnp.asarray(values[node.row])
            there = addresses(node.index, spec.space)
            value = array.reshape(-1)[rows * node.stride + there]
            if node.rows is not None:
                value = jnp.where((rows >= 0) & (rows < node.rows), value, 0)
            return value.astype(compute_dtype(np.dtype(array.dtype)))
        case visitor.Segment():
            return _segment(node, spec, values[node.operand], arrays)


def _broadcast_shape(target: tuple[int, ...], source: tuple[int, ...]) -> tuple[int, ...]:
    if jnp.broadcast_shapes(target, source) != target:
        raise ValueError(f"a value of shape {source} does not fit a store of shape {target}")
    return target


def _own_dtype(spec: KernelSpec, position: int) -> np.dtype:
    node = spec.tree[position]
    if isinstance(node, visitor.Load | visitor.Lookup):
        return spec.inputs[node.input].dtype
    assert not isinstance(node, visitor.Store)
    return node.dtype


def _compute(node: visitor.Compute, spec: KernelSpec, values: list[Any]) -> Any:
    op = OPS[node.op]
    args = [values[o] for o in node.operands]
    if node.op == "bitcast":
        stored = args[0].astype(_own_dtype(spec, node.operands[0]))
        return lax.bitcast_convert_type(stored, node.dtype).astype(compute_dtype(node.dtype))
    if node.op == "is_finite":
        return lax.is_finite(args[0].astype(_own_dtype(spec, node.operands[0])))
    if node.op == "integer_pow":
        exponent = spec.tree[node.operands[1]]
        assert isinstance(exponent, visitor.Constant)
        return lax.integer_pow(args[0], int(exponent.value))
    result = op.reference(*args, dtype=node.dtype) if op.needs_dtype else op.reference(*args)
    return result[node.result] if op.results > 1 else result


def _reduce(node: visitor.Reduce, spec: KernelSpec, value: Any) -> Any:
    axes = spec.space.tile_axis(node.over).axes
    shape = list(value.shape)
    for axis in axes:
        shape[axis] = spec.space.sizes[axis]
    full = jnp.broadcast_to(value, shape)
    dtype = compute_dtype(node.dtype)
    if node.op in ("sum", "prod"):
        return _REDUCTIONS[node.op](full, axis=axes, keepdims=True, dtype=dtype)
    return _REDUCTIONS[node.op](full, axis=axes, keepdims=True).astype(dtype)


def _contract(node: visitor.Contract, spec: KernelSpec, values: list[Any]) -> Any:
    space = spec.space
    contracted = space.tile_axis(node.over).axes
    operands, labels = [], []
    for position in (node.lhs, node.rhs):
        value = values[position].astype(_own_dtype(spec, position))
        if not is_float(node.dtype):
            # As exact; of int8 itself, JAX 0.11.2 gave twice the product on an H200.
            value = value.astype(node.dtype)
        shape = tuple(
            space.sizes[axis] if axis in contracted else size
            for axis, size in enumerate(value.shape)
        )
        kept = [axis for axis, size in enumerate(shape) if size != 1]
        operands.append(jnp.broadcast_to(value, shape).reshape([shape[axis] for axis in kept]))
        labels.append(kept)
    free = sorted({*labels[0], *labels[1]} - {*contracted})
    product = jnp.einsum(
        operands[0],
        labels[0],
        operands[1],
        labels[1],
        free,
        precision=visitor.PRECISIONS[node.precision],
        preferred_element_type=node.dtype,
    )
    return product.reshape([n if axis in free else 1 for axis, n in enumerate(space.sizes)])


def _segment(node: visitor.Segment, spec: KernelSpec, value: Any, arrays: tuple[Any, ...]) -> Any:
    (row,), (edge,) = (spec.space.tile_axis(name).axes for name in ("row", node.over))
    sizes = spec.space.sizes
    shape = list(value.shape)
    shape[edge] = sizes[edge]
    edges = jnp.moveaxis(jnp.broadcast_to(value, shape), edge, 0).astype(node.dtype)
    bounds = jnp.asarray(arrays[node.bounds])
    firsts, lasts = bounds if bounds.ndim == 2 else (bounds[:-1], bounds[1:])
    positions = jnp.arange(sizes[edge])
    begins = jnp.where(lasts > firsts, firsts, sizes[edge])  # what is dropped owns nothing
    marks = jnp.zeros(sizes[edge], int).at[begins].set(jnp.arange(1, sizes[row] + 1), mode="drop")
    owner = lax.cummax(marks) - 1
    owner = jnp.where((owner >= 0) & (positions < lasts[owner]), owner, sizes[row])
    if node.blocks is None:
        totals = _totals(edges, owner, sizes[row])
    else:
        length, sums = node.length, jnp.asarray(arrays[node.blocks])
        low, high = (firsts + length - 1) // length, lasts // length
        block = positions // length
        summed = (low[owner] <= block) & (block < high[owner]) & (owner < sizes[row])
        totals = _totals(edges, jnp.where(summed, sizes[row], owner), sizes[row])
        starts = jnp.arange(sums.shape[0]) * length
        owner = jnp.where(summed[starts], owner[starts], sizes[row])
        totals += _totals(sums.reshape(-1, *edges.shape[1:]), owner, sizes[row])
    totals = jnp.expand_dims(totals, edge + 1)  # the edge axis again, of one element
    return jnp.moveaxis(totals, 0, row + (row > edge)).squeeze(row + (row <= edge))


def _totals(terms: Any, owner: Any, rows: int) -> Any:
    return jax.ops.segment_sum(terms, owner, num_segments=rows + 1)[:-1]
