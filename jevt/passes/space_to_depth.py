"""Strided convolutions of images of few channels become those of cells, or products. For GPUs.

Purpose: vision models begin with a strided convolution of three channels: the patches of a vision
transformer, the 7×7 of a ResNet. cuDNN pads the channels, and its kernels for that reach a tenth of
the GPU's rate: on an H100 ViT-B/14's patches and their weights' gradient took 1.4 ms of a step of
41, ResNet-50's first layer 0.8 ms forward of a step of 19. (As they are written here they have not
been timed. ViT's products are 60 GFLOP, 0.1 ms, and a copy of the images.) With stride S, an image
is cut into cells of S by S pixels; S·S·C numbers become the channels of one pixel (space to depth).
A window of K pixels is one of M = ceil(K/S) cells, its weights padded with zeros, and

    out[b, i, f]   = Σ cells[b, i + m, r] · w[m, r, f]      over m < M and r = (p, c), p < S
    dw[m, r, f]    = Σ cells[b, i + m, r] · dy[b, i, f]     over b and i

are a convolution of stride 1 and the gradient of its weights. Where M is 1, windows that do not
overlap, both are matrix products. Cells are written once and read by both. Their channels are
padded to multiples of 16 bytes, for tensor cores and descriptors; that padding is also what keeps
kernels of ours from reading the image through the cells' strides, element by element.

Invariant: the same sums, in the same precision, and zeros times pixels that the window did not
reach: one that is not finite makes those results NaN.

Left alone: channels that fill 16 bytes, of which cuDNN needs no copy; dilation and groups; windows
narrower than the stride; results whose features are not the innermost axis, which would be
transposed in memory; gradients of images, which nothing asks for as a rule.

    before  { lambda ; a:bf16[8,28,28,3] b:bf16[14,14,3,64]. let
                c:bf16[8,2,2,64] = conv_general_dilated[window_strides=(14, 14)] a b in (c,) }
    after   { lambda ; a:bf16[8,28,28,3] b:bf16[14,14,3,64]. let
                d:bf16[8,2,14,2,14,3] = reshape a
                e:bf16[8,2,2,14,14,3] = transpose[permutation=(0, 1, 3, 2, 4, 5)] d
                f:bf16[8,2,2,588] = reshape e
                g:bf16[8,2,2,592] = pad[padding_config=(…, (0, 4, 0))] f 0.0
                h:bf16[588,64] = reshape b
                i:bf16[592,64] = pad[padding_config=((0, 4, 0), …)] h 0.0
                c:bf16[8,2,2,64] = dot_general[dimension_numbers=(([3], [0]), ([], []))] g i
                in (c,) }
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import primitives as p
from jax.lax import ConvDimensionNumbers

from jevt._jaxpr import Atom, aval
from jevt.passes._facts import shape_of
from jevt.passes._rows import transposed
from jevt.passes._rules import Graph, rewrite
from jevt.passes.convolutions import is_plain

#: Bytes of a cell are a multiple of this; features that are, too, are left to cuDNN.
_ALIGNED = 16


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Rewrites the convolutions of ``jaxpr`` and of its bodies."""
    return rewrite(jaxpr, {p.conv_general_dilated_p: (_convolution,)})


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A spatial axis of the images.

    Attributes:
      stride, window: S and K.
      count: positions of the window.
      low: zeros before the first pixel; if negative, pixels that are left out.
    """

    stride: int
    window: int
    count: int
    low: int

    @property
    def reach(self) -> int:
        """Cells of a window."""
        return -(-self.window // self.stride)

    @property
    def cells(self) -> int:
        return self.count + self.reach - 1


@dataclasses.dataclass(frozen=True)
class _Images:
    """The images, and how they are cut.

    Attributes:
      batch, features: axes.
      spatial: the others, with how each is cut, in the order of the convolution.
    """

    batch: int
    features: int
    spatial: Mapping[int, _Axis]

    @property
    def inner(self) -> list[int]:
        """The axes of a cell, in the order of memory."""
        return sorted((self.features, *self.spatial))

    @property
    def is_product(self) -> bool:
        """Whether windows do not overlap."""
        return all(axis.reach == 1 for axis in self.spatial.values())


def _convolution(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    if not _is_plain(eqn):
        return None
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    rhs, out = shape_of(eqn.invars[1]), shape_of(eqn.outvars[0])
    low = [padding[0] for padding in params["padding"]]
    kernel = [rhs[a] for a in numbers.rhs_spec[2:]]
    result = [out[a] for a in numbers.out_spec[2:]]
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    first, second, *places = numbers.lhs_spec
    if all(d == 1 for d in dilations):
        cut = map(_Axis, strides, kernel, result, low)
        images = _Images(first, second, dict(zip(places, cut, strict=True)))
        return _forward(eqn, images, graph) if _worth_it(eqn.invars[0], images) else None
    if all(s == 1 for s in strides):
        # What a convolution calls its batch are the features here, and the other way round.
        cut = map(_Axis, dilations, result, kernel, low)
        images = _Images(second, first, dict(zip(places, cut, strict=True)))
        return _weights_gradient(eqn, images, graph) if _worth_it(eqn.invars[0], images) else None
    return None


def _is_plain(eqn: JaxprEqn) -> bool:
    """Whether this is a convolution of images without groups and without zeros between pixels."""
    images, dtype = aval(eqn.invars[0]), aval(eqn.outvars[0]).dtype
    return (
        is_plain(eqn)
        and images.dtype == dtype
        and dtype != np.float64
        and all(d == 1 for d in eqn.params["lhs_dilation"])
        and images.ndim > 2
    )


def _worth_it(operand: Atom, images: _Images) -> bool:
    """Whether cuDNN would pad the features, and there are more windows than cells in one."""
    itemsize = np.dtype(aval(operand).dtype).itemsize
    padded = shape_of(operand)[images.features] * itemsize % _ALIGNED > 0
    axes = images.spatial.values()
    strided = any(axis.stride > 1 for axis in axes)
    covered = all(axis.stride <= axis.window and axis.reach <= axis.count for axis in axes)
    return padded and strided and covered and any(axis.count > 1 for axis in axes)


def _forward(eqn: JaxprEqn, images: _Images, graph: Graph) -> Atom | None:
    """The convolution, or product, of cells and weights."""
    numbers = eqn.params["dimension_numbers"]
    rank = len(numbers.out_spec)
    last = rank - 1
    # The result as a product leaves it: batch, positions, features.
    if tuple(numbers.out_spec) != (0, last, *range(1, last)):
        return None
    cells = _cells(eqn.invars[0], images, graph)
    weights = _weights(eqn.invars[1], numbers.rhs_spec, images, shape_of(cells)[-1], graph)
    if images.is_product:
        weights = graph.reshape(weights, shape_of(weights)[-2:])
        return _product(eqn, cells, weights, ((last,), (0,)), graph)
    spec = ConvDimensionNumbers(
        (0, last, *range(1, last)), (last, last - 1, *range(last - 1)), (0, last, *range(1, last))
    )
    return _convolved(eqn, cells, weights, spec, graph)


def _weights_gradient(eqn: JaxprEqn, images: _Images, graph: Graph) -> Atom | None:
    """The same of cells and the gradient of the result, in the weights' layout."""
    numbers = eqn.params["dimension_numbers"]
    cells, gradient = _cells(eqn.invars[0], images, graph), eqn.invars[1]
    axes = list(images.spatial.values())
    last = len(axes) + 1
    if images.is_product:
        contracted = (tuple(range(last)), tuple(numbers.rhs_spec[1:]))
        result = _product(eqn, cells, gradient, contracted, graph)
    else:
        spec = ConvDimensionNumbers(
            (last, 0, *range(1, last)),
            numbers.rhs_spec,
            (last - 1, last, *range(last - 1)),
        )
        result = _convolved(eqn, cells, gradient, spec, graph)
    # From [cells of a window, cell, features] to the axes of the weights.
    sizes = [_extent(images, shape_of(eqn.invars[0]), axis) for axis in images.inner]
    length, features = shape_of(result)[-2:]
    reach = [axis.reach for axis in axes]
    result = graph.reshape(result, (*reach, length, features))
    result = _cropped(result, (*reach, math.prod(sizes), features), graph)
    result = graph.reshape(result, (*reach, *sizes, features))
    place = {axis: len(axes) + i for i, axis in enumerate(images.inner)}
    order: list[list[int]] = [[] for _ in numbers.out_spec]
    order[numbers.out_spec[0]] = [place[images.features]]
    order[numbers.out_spec[1]] = [len(shape_of(result)) - 1]
    for i, (axis, target) in enumerate(zip(images.spatial, numbers.out_spec[2:], strict=True)):
        order[target] = [i, place[axis]]
    shape = shape_of(result)
    merged = [math.prod(shape[a] for a in group) for group in order]
    result = transposed(result, [a for group in order for a in group], graph)
    return _cropped(graph.reshape(result, merged), shape_of(eqn.outvars[0]), graph)


def _extent(images: _Images, shape: Sequence[int], axis: int) -> int:
    """Of a cell along an axis."""
    return images.spatial[axis].stride if axis in images.spatial else shape[axis]


def _cells(operand: Atom, images: _Images, graph: Graph) -> Atom:
    """Cells ``[batch, cells along each spatial axis, numbers of a cell]``, padded."""
    shape = shape_of(operand)
    paddings = [(0, 0, 0)] * len(shape)
    for place, axis in images.spatial.items():
        paddings[place] = (axis.low, axis.cells * axis.stride - shape[place] - axis.low, 0)
    cut = {place: (axis.cells, axis.stride) for place, axis in images.spatial.items()}
    outer = [images.batch, *images.spatial]
    rows = _cut(_padded(operand, paddings, graph), cut, outer, images.inner, graph)
    length = math.prod(shape_of(rows)[len(outer) :])
    rows = graph.reshape(rows, (*shape_of(rows)[: len(outer)], length))
    itemsize = np.dtype(aval(rows).dtype).itemsize
    return _lengthened(rows, -1, length + -length * itemsize % _ALIGNED // itemsize, graph)


def _weights(
    operand: Atom, spec: Sequence[int], images: _Images, length: int, graph: Graph
) -> Atom:
    """Weights ``[cells of a window along each spatial axis, numbers of a cell, features]``."""
    shape = shape_of(operand)
    paddings = [(0, 0, 0)] * len(shape)
    axis_of = {images.features: spec[1]}
    cut: dict[int, tuple[int, int]] = {}
    for place, (image, axis) in zip(spec[2:], images.spatial.items(), strict=True):
        axis_of[image] = place
        cut[place] = axis.reach, axis.stride
        paddings[place] = (0, axis.reach * axis.stride - shape[place], 0)
    inner = [*(axis_of[axis] for axis in images.inner), spec[0]]
    rows = _cut(_padded(operand, paddings, graph), cut, spec[2:], inner, graph)
    *sizes, features = shape_of(rows)
    reach = sizes[: len(cut)]
    rows = graph.reshape(rows, (*reach, math.prod(sizes[len(cut) :]), features))
    return _lengthened(rows, -2, length, graph)


def _cut(
    operand: Atom,
    cut: Mapping[int, tuple[int, int]],
    outer: Sequence[int],
    inner: Sequence[int],
    graph: Graph,
) -> Atom:
    """The operand with some axes cut in two: the first part of these is outer, the other inner."""
    split: list[int] = []
    first: list[int] = []
    last: list[int] = []
    for place, size in enumerate(shape_of(operand)):
        first.append(len(split))
        split += cut.get(place, (size,))
        last.append(len(split) - 1)
    order = [*(first[place] for place in outer), *(last[place] for place in inner)]
    return transposed(graph.reshape(operand, split), order, graph)


def _padded(operand: Atom, paddings: Sequence[tuple[int, int, int]], graph: Graph) -> Atom:
    """The operand with zeros around it, or without what is cut off."""
    if not any(map(any, paddings)):
        return operand
    zero = graph.literal(0, aval(operand))
    return graph.emit(p.pad_p, operand, zero, padding_config=tuple(paddings))


def _lengthened(operand: Atom, axis: int, length: int, graph: Graph) -> Atom:
    """The operand with zeros behind an axis; an equation even where these are none."""
    config = [(0, 0, 0)] * len(shape_of(operand))
    config[axis] = (0, length - shape_of(operand)[axis], 0)
    zero = graph.literal(0, aval(operand))
    return graph.emit(p.pad_p, operand, zero, padding_config=tuple(config))


def _cropped(operand: Atom, shape: Sequence[int], graph: Graph) -> Atom:
    if tuple(shape) == tuple(shape_of(operand)):
        return operand
    starts = (0,) * len(shape)
    return graph.emit(
        p.slice_p, operand, start_indices=starts, limit_indices=tuple(shape), strides=None
    )


def _product(
    eqn: JaxprEqn, left: Atom, right: Atom, contracted: Sequence[Sequence[int]], graph: Graph
) -> Atom:
    dtype = aval(eqn.outvars[0]).dtype
    return graph.dot_general(left, right, contracted, dtype, eqn.params["precision"])


def _convolved(
    eqn: JaxprEqn, left: Atom, right: Atom, numbers: ConvDimensionNumbers, graph: Graph
) -> Atom:
    ones = (1,) * (len(numbers.out_spec) - 2)
    params: dict[str, Any] = {
        **eqn.params,
        "dimension_numbers": numbers,
        "window_strides": ones,
        "rhs_dilation": ones,
        "padding": ((0, 0),) * len(ones),
    }
    return graph.emit(p.conv_general_dilated_p, left, right, **params)
