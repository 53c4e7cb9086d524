"""Canonical forms of views: renaming positions is at most one equation, as late as possible.

* ``squeeze``, and a ``broadcast_in_dim`` or ``transpose`` that only adds, drops or moves axes of
  size 1, is ``reshape``.
* Two ``reshape``, two ``transpose``, two ``broadcast_in_dim`` are one; a broadcast looks through
  axes of size 1 that a ``reshape`` has added.
* A pointwise function of views that are all the same is the view of the function:
  ``f(B(x), B(y), c) = B(f(x, y, c))`` for B a broadcast, or a reshape that adds axes of size 1.
  What is computed once a row is so computed on an array of rows, and broadcast where it meets the
  whole array.
* Views of ``iota`` along one axis are an ``iota``.

All of these move values and change none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Literal, Primitive, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind, shape_of
from jevt.passes._rules import Abandon, Graph, Rules
from jevt.passes.fold_constants import element

# Element by element, on operands of one shape or scalars.
POINTWISE: frozenset[Primitive] = frozenset(
    {
        *(p.abs_p, p.add_p, p.and_p, p.cbrt_p, p.ceil_p, p.clamp_p, p.convert_element_type_p),
        *(p.cos_p, p.div_p, p.eq_p, p.erf_p, p.erfc_p, p.exp_p, p.exp2_p, p.expm1_p, p.floor_p),
        *(p.ge_p, p.gt_p, p.integer_pow_p, p.is_finite_p, p.le_p, p.log_p, p.log1p_p),
        *(p.logistic_p, p.lt_p, p.max_p, p.min_p, p.mul_p, p.ne_p, p.neg_p, p.not_p, p.or_p),
        *(p.pow_p, p.rem_p, p.round_p, p.rsqrt_p, p.select_n_p, p.sign_p, p.sin_p, p.sqrt_p),
        *(p.square_p, p.sub_p, p.tan_p, p.tanh_p, p.xor_p),
    }
)

# … that take scalars beside arrays.
_BROADCASTING: frozenset[Primitive] = frozenset(
    {
        *(p.add_p, p.sub_p, p.mul_p, p.div_p, p.rem_p, p.max_p, p.min_p, p.pow_p, p.and_p),
        *(p.or_p, p.xor_p, p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p),
    }
)

# Where a scalar stands for an array, which operands it may be.
_SCALAR_OPERANDS: dict[Primitive, range] = {p.select_n_p: range(1), p.clamp_p: range(0)}


def without_units(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of the axes that have more than one element."""
    return tuple(size for size in shape if size != 1)


def _reshape(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``reshape (reshape x) = reshape x``; of its own shape, x; of a uniform array, a broadcast."""
    (x,), shape = eqn.invars, eqn.params["new_sizes"]
    if eqn.params["dimensions"] is not None or eqn.params["sharding"] is not None:
        return None
    if shape_of(x) == shape:
        return x
    inner = graph.definition(x)
    if inner is None or inner.params.get("sharding") is not None:
        return None
    if inner.primitive is p.reshape_p and inner.params["dimensions"] is None:
        return graph.reshape(inner.invars[0], shape)
    if isinstance(inner.invars[0] if inner.invars else None, Literal):
        value = graph.uniform(x)
        return None if value is None else graph.full(value, shape)
    if inner.primitive is p.broadcast_in_dim_p and without_units(shape) == without_units(
        shape_of(x)
    ):
        return _reshaped_broadcast(inner, shape, graph)
    return None


def _reshaped_broadcast(inner: JaxprEqn, shape: tuple[int, ...], graph: Graph) -> Atom | None:
    """The broadcast ``inner`` with axes of size 1 added and dropped."""
    (x,) = inner.invars
    old = inner.params["shape"]
    renamed = dict(zip(_non_units(old), _non_units(shape), strict=True))
    dimensions = inner.params["broadcast_dimensions"]
    kept = [i for i, d in enumerate(dimensions) if d in renamed]
    source = graph.reshape(x, [shape_of(x)[i] for i in kept])
    return graph.broadcast(source, shape, [renamed[dimensions[i]] for i in kept])


def _non_units(shape: Sequence[int]) -> list[int]:
    return [axis for axis, size in enumerate(shape) if size != 1]


def _squeeze(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    return graph.reshape(eqn.invars[0], shape_of(eqn.outvars[0]))


def _transpose(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``transpose (transpose x) = transpose x``; one that moves axes of size 1 is a reshape."""
    (x,), permutation = eqn.invars, eqn.params["permutation"]
    moved = [axis for axis in permutation if shape_of(x)[axis] != 1]
    if moved == sorted(moved):
        return graph.reshape(x, shape_of(eqn.outvars[0]))
    inner = graph.definition(x)
    if inner is None:
        return None
    if inner.primitive is p.transpose_p:
        first = inner.params["permutation"]
        return graph.emit(
            p.transpose_p, inner.invars[0], permutation=tuple(first[axis] for axis in permutation)
        )
    if (value := graph.uniform(x)) is not None:
        return graph.full(value, shape_of(eqn.outvars[0]))
    if inner.primitive is p.broadcast_in_dim_p and inner.params.get("sharding") is None:
        # As long as the operand's own axes keep their order.
        position = {axis: new for new, axis in enumerate(permutation)}
        dimensions = [position[d] for d in inner.params["broadcast_dimensions"]]
        if dimensions == sorted(dimensions):
            return graph.broadcast(inner.invars[0], shape_of(eqn.outvars[0]), dimensions)
    return None


def _broadcast(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A broadcast that adds only axes of size 1 is a reshape; others look through views."""
    (x, *dynamic), shape = eqn.invars, eqn.params["shape"]
    dimensions = tuple(map(int, eqn.params["broadcast_dimensions"]))
    if dynamic or eqn.params["sharding"] is not None or isinstance(x, Literal):
        return None
    if without_units(shape) == without_units(shape_of(x)):
        return graph.reshape(x, shape)
    if (value := graph.uniform(x)) is not None:
        return graph.full(value, shape)
    inner = graph.definition(x)
    if inner is None or inner.params.get("sharding") is not None:
        return None
    if inner.primitive is p.broadcast_in_dim_p:
        through = [dimensions[int(d)] for d in inner.params["broadcast_dimensions"]]
        return graph.broadcast(inner.invars[0], shape, through)
    if inner.primitive is p.reshape_p and inner.params["dimensions"] is None:
        (source,) = inner.invars
        if without_units(shape_of(source)) != without_units(shape_of(x)):
            return None
        through = [dimensions[axis] for axis in _non_units(shape_of(x))]
        return _broadcast_source(source, shape, through, graph)
    return None


def _broadcast_source(
    source: Atom, shape: Sequence[int], through: Sequence[int], graph: Graph
) -> Atom | None:
    """``source``, whose axes of more than one element become the axes ``through``.

    None if an axis of size 1 of ``source`` finds no place between its neighbours.
    """
    targets = iter(through)
    places: list[int] = []
    free = 0
    for size in shape_of(source):
        place = free if size == 1 else next(targets)
        if place < free:
            return None
        places.append(place)
        free = place + 1
    return graph.broadcast(source, shape, places) if free <= len(shape) else None


def _iota(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A view of an ``iota`` whose axis survives is an ``iota``."""
    inner = graph.definition(eqn.invars[0], p.iota_p)
    if inner is None or inner.params["sharding"] is not None or len(inner.invars) > 0:
        return None
    if eqn.params.get("sharding") is not None:
        return None
    old, new = inner.params["shape"], shape_of(eqn.outvars[0])
    dimension: int = inner.params["dimension"]
    if eqn.primitive is p.broadcast_in_dim_p:
        target = int(eqn.params["broadcast_dimensions"][dimension])
        if new[target] != old[dimension]:
            return None
        dimension = target
    elif without_units(old) == without_units(new) and old[dimension] != 1:
        dimension = _non_units(new)[_non_units(old).index(dimension)]
    else:
        return None
    return graph.emit(p.iota_p, **{**inner.params, "shape": new, "dimension": dimension})


def _scalars(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """Scalars for uniform operands, as long as one operand has the result's shape."""
    shape = shape_of(eqn.outvars[0])
    uniform = [graph.uniform(a) if isinstance(a, Var) and shape_of(a) else None for a in eqn.invars]
    rest = [a for a, value in zip(eqn.invars, uniform, strict=True) if value is None]
    if len(rest) == len(uniform) or not any(shape_of(a) == shape for a in rest):
        return None
    operands = [a if v is None else v for a, v in zip(eqn.invars, uniform, strict=True)]
    return graph.emit(eqn.primitive, *operands, **eqn.params)


def sink(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``f(B(x), B(y), c) = B(f(x, y, c))`` for one view B and constants c."""
    shape = shape_of(eqn.outvars[0])
    view: JaxprEqn | None = None
    operands: list[tuple[Atom, bool]] = []  # and whether it is seen through the view
    for atom in eqn.invars:
        if shape_of(atom) == () and shape != ():
            operands.append((atom, False))
            continue
        if shape_of(atom) != shape:
            return None
        if (value := graph.uniform(atom)) is not None and isinstance(atom, Var):
            operands.append((value, False))
            continue
        inner = graph.definition(atom)
        if (
            inner is None
            or not _is_expansion(inner)
            or (view is not None and not _alike(inner, view))
        ):
            return None
        view = view or inner
        operands.append((inner.invars[0], True))
    if view is None:
        return _of_uniform(eqn, [atom for atom, _ in operands], graph) if operands else None
    small = shape_of(view.invars[0])
    result = graph.emit(eqn.primitive, *_fitted(eqn, operands, small, graph), **eqn.params)
    return graph.emit(view.primitive, result, **view.params)


def _of_uniform(eqn: JaxprEqn, scalars: Sequence[Atom], graph: Graph) -> Atom | None:
    """A function of uniform arrays, as the broadcast of the function of their numbers."""
    shape = shape_of(eqn.outvars[0])
    literals = [a for a in scalars if isinstance(a, Literal)]
    if not shape or len(literals) < len(scalars):
        return None
    number = element(eqn, literals) or graph.emit(eqn.primitive, *scalars, **eqn.params)
    return graph.broadcast(number, shape, ())


def _fitted(
    eqn: JaxprEqn, operands: Sequence[tuple[Atom, bool]], shape: Sequence[int], graph: Graph
) -> list[Atom]:
    """Operands of the function on the smaller shape; scalars are spread where it takes none."""
    scalars = _SCALAR_OPERANDS.get(eqn.primitive)
    result: list[Atom] = []
    for i, (atom, is_seen) in enumerate(operands):
        if is_seen or not shape or scalars is None or i in scalars:
            result.append(atom)
        elif isinstance(atom, Literal):
            result.append(graph.full(atom, shape))
        else:
            raise Abandon
    return result


def _is_expansion(eqn: JaxprEqn) -> bool:
    """Whether the equation repeats its operand or adds axes of size 1, and no more."""
    if eqn.params.get("sharding") is not None or not eqn.invars:
        return False
    source, result = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if eqn.primitive is p.broadcast_in_dim_p:
        return len(eqn.invars) == 1 and math.prod(source) > 0
    if eqn.primitive is not p.reshape_p or eqn.params["dimensions"] is not None:
        return False
    return len(result) > len(source) and without_units(source) == without_units(result)


def _alike(eqn: JaxprEqn, other: JaxprEqn) -> bool:
    return (
        eqn.primitive is other.primitive
        and shape_of(eqn.invars[0]) == shape_of(other.invars[0])
        and tuple(map(int, eqn.params.get("broadcast_dimensions", ())))
        == tuple(map(int, other.params.get("broadcast_dimensions", ())))
    )


def _copy(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """A copy that does not leave the program: XLA decides where values live."""
    out = eqn.outvars[0]
    return None if graph.is_output(out) or not kind(out.aval) else eqn.invars[0]


def _transposed_dot(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``(A·B)ᵀ = Bᵀ·Aᵀ``: a product with its operands exchanged is written as it is wanted.

    The gradient of a weight is such a product. Where the untransposed one has other readers, it
    stays.
    """
    (x,), permutation = eqn.invars, eqn.params["permutation"]
    dot = graph.definition(x, p.dot_general_p)
    if dot is None or graph.readers(x) != 1 or not _is_symmetric(dot.params):
        return None
    (left, right), (left_batch, right_batch) = dot.params["dimension_numbers"]
    a, b = dot.invars
    batch = len(left_batch)
    left_free = len(shape_of(a)) - batch - len(left)
    rank = len(permutation)
    swapped = (*range(batch), *range(batch + left_free, rank), *range(batch, batch + left_free))
    if tuple(permutation) != swapped:
        return None
    numbers = ((right, left), (right_batch, left_batch))
    return graph.emit(p.dot_general_p, b, a, **{**dot.params, "dimension_numbers": numbers})


def _is_symmetric(params: Mapping[str, Any]) -> bool:
    """Whether nothing but its dimension numbers tells a product's operands apart."""
    precision = params.get("precision")
    is_one = precision is None or (isinstance(precision, tuple) and len(set(precision)) == 1)
    return is_one and params.get("out_sharding") is None


RULES: Rules = {
    p.reshape_p: (_reshape, _iota),
    p.squeeze_p: (_squeeze,),
    p.transpose_p: (_transpose, _transposed_dot),
    p.broadcast_in_dim_p: (_broadcast, _iota),
    p.copy_p: (_copy,),
    **{f: (_scalars, sink) if f in _BROADCASTING else (sink,) for f in POINTWISE},
}
