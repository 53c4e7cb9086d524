"""Convolutions that are matrix products become ``dot_general``. For GPUs.

Purpose: 36 of ResNet-50's 53 convolutions have a window of 1×1, and so do their gradients. To XLA a
convolution is a call of cuDNN, to the partitioner nothing that shares a kernel. A matrix product
has cuBLAS (assumed to be as fast: no GPU has compared them), or takes its epilogue along:
BatchNorm's statistics are sums over its rows. A convolution is
``out[b, o, f] = Σ x[b, o·stride + j·dilation - low, c] · w[f, j, c]``
over j and c. It is a product where along each spatial axis

* the window has one element: o is a free axis of the left operand, after a slice if it is strided;
* or the output has one element: j is contracted, after a slice if it is dilated. Gradients of
  weights are such;
* or the window has one element and the input is dilated by zeros (the gradient of a strided input):
  the product is that of the input without zeros, and its result is what is dilated. With no more
  zeros than the dilation's, that is a ``select_n`` of a broadcast, which kernels and XLA fuse into
  whatever reads it.

Invariant: the same sums, in the same precision. A weight that is infinite or NaN gives 0 where it
would meet a zero of the dilation only.

Left alone, because the product would move more bytes than cuDNN does:

* products whose operands or result would have to be transposed in memory first. The free axes of an
  operand must be neighbours, the contracted ones too, and the result's axes must be theirs, in
  their order. So channels last (NHWC), or first of all, qualify; NCHW does for one image or one
  pixel only;
* windows of one element with padding: the borders would be a second pass over the result;
* groups of features or of the batch, whose axis would be a product's batch and lies between the
  others.

And types other than bfloat16, float16, float32 and float64.

Nothing is gained where no groups become kernels (on CPUs, with ``backend="xla"``, under automatic
partitioning), and XLA would then copy a strided input, which cuDNN reads in place: the pass is not
run there.

    before  { lambda ; a:bf16[8,14,14,64] b:bf16[1,1,64,32]. let
                c:bf16[8,7,7,32] = conv_general_dilated[window_strides=(2, 2)] a b in (c,) }
    after   { lambda ; a:bf16[8,14,14,64] b:bf16[1,1,64,32]. let
                d:bf16[8,7,7,64] = slice[limit_indices=(8, 13, 13, 64) strides=(1, 2, 2, 1)] a
                e:bf16[64,32] = reshape b
                c:bf16[8,7,7,32] = dot_general[dimension_numbers=(([3], [0]), ([], []))] d e
                in (c,) }
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph, rewrite

#: What an axis is: "b", "f", "c", or a spatial one's position.
type Name = str | int

_FLOATS = frozenset(map(np.dtype, (jnp.bfloat16, np.float16, np.float32, np.float64)))


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Rewrites the convolutions of ``jaxpr`` and of its bodies."""
    return rewrite(jaxpr, {p.conv_general_dilated_p: (_convolution,)})


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An operand or the result: where the product's axes are, in the order of memory."""

    axes: Mapping[Name, int]
    shape: Sequence[int]

    @property
    def long(self) -> list[Name]:
        """The axes but those of one element, whose place in memory says nothing."""
        return [name for name, axis in self.axes.items() if self.shape[axis] != 1]


@dataclasses.dataclass(frozen=True)
class _Spatial:
    """What becomes of a spatial axis.

    Attributes:
      contracted: it is; otherwise it is free.
      taken: start, limit and step of the slice of the input.
      padding: low, high and interior zeros of the result.
    """

    contracted: bool
    taken: tuple[int, int, int]
    padding: tuple[int, int, int] = (0, 0, 0)


def _convolution(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    lhs, rhs = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    if not is_plain(eqn):
        return None
    found = [_spatial(eqn, position) for position in range(len(numbers.out_spec) - 2)]
    spatial = [s for s in found if s is not None]
    if len(spatial) < len(found):
        return None
    taken = [(0, size, 1) for size in shape_of(lhs)]
    undilated, paddings = list(shape_of(eqn.outvars[0])), [(0, 0, 0)] * len(numbers.out_spec)
    for s, source, target in zip(spatial, numbers.lhs_spec[2:], numbers.out_spec[2:], strict=True):
        taken[source], paddings[target] = s.taken, s.padding
        undilated[target] = 1 if s.contracted else len(range(*s.taken))
    # Axes by what they are: "b", "f" and "c" for batch, output and input features, or numbers.
    contracted = [n for n, s in enumerate(spatial) if s.contracted]
    left = _Operand(_axes(numbers.lhs_spec, "b", "c"), [len(range(*t)) for t in taken])
    right = _Operand(_axes(numbers.rhs_spec, "f", "c", contracted), shape_of(rhs))
    free = [n for n, s in enumerate(spatial) if not s.contracted]
    order = _order(left, right, _Operand(_axes(numbers.out_spec, "b", "f", free), undilated))
    if order is None:
        return None
    weights = graph.reshape(_unreversed(rhs, graph), [right.shape[a] for a in right.axes.values()])
    sides = [(left, _slice(lhs, taken, graph)), (right, weights)]
    product = _product(eqn, [sides[i] for i in order], order, graph)
    return _pad(graph.reshape(product, undilated), paddings, graph)


def is_plain(eqn: JaxprEqn) -> bool:
    """Whether this is a convolution of floating-point numbers, without groups."""
    types = {np.dtype(aval(atom).dtype) for atom in eqn.invars}
    return (
        len(types) == 1
        and types.issubset(_FLOATS)
        and eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1
        and eqn.params.get("out_sharding") is None
        and all(math.prod(shape_of(atom)) > 0 for atom in (*eqn.invars, *eqn.outvars))
    )


def _spatial(eqn: JaxprEqn, position: int) -> _Spatial | None:
    """The part of the ``position``-th spatial axis in a product, None if there is none."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    size = shape_of(eqn.invars[0])[numbers.lhs_spec[2 + position]]
    window = shape_of(eqn.invars[1])[numbers.rhs_spec[2 + position]]
    count = shape_of(eqn.outvars[0])[numbers.out_spec[2 + position]]
    low, high = params["padding"][position]
    stride = params["window_strides"][position]
    zeros = params["lhs_dilation"][position] - 1
    if zeros and size > 1:
        if window > 1 or stride > 1:
            return None
        return _Spatial(False, (0, size, 1), (low, high, zeros))
    if window > 1 and count > 1:
        return None
    contracted = window > 1
    steps = params["rhs_dilation"][position] if contracted else stride
    start, last = -low, -low + ((window if contracted else count) - 1) * steps
    if start < 0 or last >= size:
        return None
    return _Spatial(contracted, (start, last + 1, steps))


def _axes(
    spec: Sequence[int], first: Name, second: Name, spatial: Sequence[int] | None = None
) -> dict[Name, int]:
    """The axes that an array has in the product, in the order of memory."""
    axes: dict[Name, int] = {first: spec[0], second: spec[1]}
    chosen = range(len(spec) - 2) if spatial is None else spatial
    axes |= {position: spec[2 + position] for position in chosen}
    return dict(sorted(axes.items(), key=lambda item: item[1]))


def _order(left: _Operand, right: _Operand, result: _Operand) -> tuple[int, int] | None:
    """Which operand is the product's first, 0 or 1, and which the second.

    None if one of them, or the result, would have to be transposed.
    """
    free: list[list[Name]] = []
    shared: list[list[Name]] = []
    for own, other in ((left, right), (right, left)):
        shared.append([name for name in own.long if name in other.axes])
        free.append([name for name in own.long if name not in other.axes])
        if own.long not in (shared[-1] + free[-1], free[-1] + shared[-1]):
            return None
    if shared[0] == shared[1]:
        for first, second in ((0, 1), (1, 0)):
            if result.long == free[first] + free[second]:
                return first, second
    return None


def _product(
    eqn: JaxprEqn,
    sides: Sequence[tuple[_Operand, Atom]],
    order: tuple[int, int],
    graph: Graph,
) -> Atom:
    (first, a), (second, b) = sides
    shared = [name for name in first.axes if name in second.axes]
    contracted = [list(map(list(side.axes).index, shared)) for side in (first, second)]
    precision = eqn.params["precision"]
    if isinstance(precision, tuple):
        precision = tuple(precision[i] for i in order)
    return graph.dot_general(a, b, contracted, aval(eqn.outvars[0]).dtype, precision)


def _slice(operand: Atom, taken: Sequence[tuple[int, int, int]], graph: Graph) -> Atom:
    if all(bounds == (0, size, 1) for bounds, size in zip(taken, shape_of(operand), strict=True)):
        return operand
    starts, limits, steps = zip(*taken, strict=True)
    return graph.emit(p.slice_p, operand, start_indices=starts, limit_indices=limits, strides=steps)


def _unreversed(weights: Atom, graph: Graph) -> Atom:
    """The weights without a reversal of axes that have one element."""
    rev = graph.definition(weights, p.rev_p)
    if rev is None or any(shape_of(weights)[axis] > 1 for axis in rev.params["dimensions"]):
        return weights
    return rev.invars[0]


def _pad(operand: Atom, paddings: Sequence[tuple[int, int, int]], graph: Graph) -> Atom:
    """The operand with zeros around and between its elements."""
    padded = [axis for axis, padding in enumerate(paddings) if any(padding)]
    if not padded:
        return operand
    if all(paddings[axis] == (0, paddings[axis][2], paddings[axis][2]) for axis in padded):
        return _spread(operand, [paddings[axis][2] + 1 for axis in padded], padded, graph)
    zero = graph.literal(0, operand.aval)
    return graph.emit(p.pad_p, operand, zero, padding_config=tuple(paddings))


def _spread(operand: Atom, blocks: Sequence[int], axes: Sequence[int], graph: Graph) -> Atom:
    """The operand with each element at the first place of a block along ``axes``, zeros elsewhere.

    A broadcast along axes of the blocks' sizes, of which only the first element is taken.
    """
    shape = shape_of(operand)
    split: list[int] = []
    places, inner = [], []
    for axis, size in enumerate(shape):
        places.append(len(split))
        split.append(size)
        if axis in axes:
            inner.append(len(split))
            split.append(blocks[axes.index(axis)])
    index = np.dtype("int32")
    first: Atom | None = None
    for position in range(len(blocks)):
        number = graph.emit(
            p.iota_p, dtype=index, shape=tuple(blocks), dimension=position, sharding=None
        )
        is_first = graph.emit(p.eq_p, number, graph.literal(0, number.aval))
        first = is_first if first is None else graph.emit(p.and_p, first, is_first)
    assert first is not None
    zeros = graph.full(graph.literal(0, operand.aval), split)
    spread = graph.emit(
        p.select_n_p,
        graph.broadcast(first, split, inner),
        zeros,
        graph.broadcast(operand, split, places),
    )
    whole = [size * dict(zip(axes, blocks, strict=True)).get(a, 1) for a, size in enumerate(shape)]
    return graph.reshape(spread, whole)
