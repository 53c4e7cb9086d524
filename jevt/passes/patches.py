"""Convolutions whose windows do not overlap become matrix products of patches. For GPUs.

Purpose: vision transformers begin with a convolution whose stride is its window: each patch of the
image is multiplied by the weights. Of images of three channels cuDNN pads the channels, and its
kernels for that reach a tenth of the GPU's rate: on an H100 the patches of ViT-B/14 and their
weights' gradient took 1.4 ms of a step of 41. As products they are 60 GFLOP, 0.1 ms, and a copy of
the images (calculated, not measured). With S the stride,

    out[b, i, f]  = Σ x[b, i·S + p, c] · w[p, c, f]     over p < S and c
    dw[p, c, f]   = Σ x[b, p + i·S, c] · dy[b, i, f]    over b and i

are products of one matrix of patches [b, i, (p, c)], which is written once and read by both. Its
rows are padded with zeros to multiples of 16 bytes, for tensor cores and descriptors; that padding
is also what keeps kernels from reading the image through the patches' strides, element by element.

Invariant: the same sums, in the same precision, and zeros times zeros.

Left alone: channels that fill 16 bytes, of which cuDNN's convolution needs no copy; padding,
dilation and groups; results whose features are not the innermost axis, which would be transposed in
memory; gradients of images, which nothing asks for as a rule.

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

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.passes._facts import shape_of
from jevt.passes._rules import Graph, rewrite

_FLOATS = frozenset(map(np.dtype, (jnp.bfloat16, np.float16, np.float32)))

#: Bytes of a row of patches are a multiple of this; features that are, too, are left to cuDNN.
_ALIGNED = 16


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Rewrites the convolutions of ``jaxpr`` and of its bodies."""
    return rewrite(jaxpr, {p.conv_general_dilated_p: (_convolution,)})


def _convolution(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    if not _is_plain(eqn):
        return None
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs, out = (shape_of(atom) for atom in (*eqn.invars, *eqn.outvars))
    sizes = [lhs[a] for a in numbers.lhs_spec[2:]]
    windows = [rhs[a] for a in numbers.rhs_spec[2:]]
    counts = [out[a] for a in numbers.out_spec[2:]]
    strides, dilations = eqn.params["window_strides"], eqn.params["rhs_dilation"]
    ones = (1,) * len(sizes)
    if tuple(strides) == tuple(windows) and tuple(dilations) == ones:
        return _forward(eqn, windows, counts, graph)
    fits = all(w * c <= size for w, c, size in zip(windows, counts, sizes, strict=True))
    if tuple(dilations) == tuple(counts) and tuple(strides) == ones and fits:
        return _weights_gradient(eqn, counts, windows, graph)
    return None


def _is_plain(eqn: JaxprEqn) -> bool:
    """Whether this is a convolution of an image as it is, by windows of several elements."""
    params, images = eqn.params, aval(eqn.invars[0])
    types = {np.dtype(aval(atom).dtype) for atom in (*eqn.invars, *eqn.outvars)}
    return (
        len(types) == 1
        and types.issubset(_FLOATS)
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and params.get("out_sharding") is None
        and all(low == 0 and high <= 0 for low, high in params["padding"])
        and all(d == 1 for d in params["lhs_dilation"])
        and images.ndim > 2
        and all(math.prod(shape_of(atom)) > 0 for atom in (*eqn.invars, *eqn.outvars))
    )


def _forward(
    eqn: JaxprEqn, windows: Sequence[int], counts: Sequence[int], graph: Graph
) -> Atom | None:
    """The product of patches and weights."""
    numbers = eqn.params["dimension_numbers"]
    batch, features, *_ = numbers.lhs_spec
    # The result as the product leaves it: batch, patches, features.
    if tuple(numbers.out_spec) != (0, len(numbers.out_spec) - 1, *range(1, len(counts) + 1)):
        return None
    if not _worth_it(eqn.invars[0], features, windows, counts):
        return None
    patches = _patches(eqn.invars[0], batch, features, numbers.lhs_spec[2:], windows, counts, graph)
    # The weights' axes in the order of a row of patches, which is that of the image in memory.
    inner = sorted((features, *numbers.lhs_spec[2:]))
    axis_of = {features: numbers.rhs_spec[1]}
    axis_of |= dict(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True))
    order = [*(axis_of[axis] for axis in inner), numbers.rhs_spec[0]]
    weights = _transposed(eqn.invars[1], order, graph)
    length = math.prod(shape_of(weights)[:-1])
    weights = graph.reshape(weights, (length, shape_of(weights)[-1]))
    weights = _padded(weights, 0, shape_of(patches)[-1] - length, graph)
    last = len(shape_of(patches)) - 1
    return _product(eqn, patches, weights, ((last,), (0,)), graph)


def _weights_gradient(
    eqn: JaxprEqn, windows: Sequence[int], counts: Sequence[int], graph: Graph
) -> Atom | None:
    """The product of patches and the gradient of the result, along batch and patches."""
    numbers = eqn.params["dimension_numbers"]
    # What a convolution calls its batch are the image's features here, and the other way round.
    features, batch, *spatial = numbers.lhs_spec
    if not _worth_it(eqn.invars[0], features, windows, counts):
        return None
    patches = _patches(eqn.invars[0], batch, features, spatial, windows, counts, graph)
    outer = tuple(range(len(spatial) + 1))
    contracted = (outer, (numbers.rhs_spec[1], *numbers.rhs_spec[2:]))
    product = _product(eqn, patches, eqn.invars[1], contracted, graph)
    # From (row of a patch, features of the result) to the axes of the weights.
    size = dict(zip(spatial, windows, strict=True))
    size[features] = shape_of(eqn.invars[0])[features]
    inner = sorted((features, *spatial))
    length, results = math.prod(size.values()), shape_of(product)[-1]
    if shape_of(product)[0] > length:
        product = graph.emit(
            p.slice_p, product, start_indices=(0, 0), limit_indices=(length, results), strides=None
        )
    product = graph.reshape(product, (*(size[axis] for axis in inner), results))
    target = {features: numbers.out_spec[0]}
    target |= dict(zip(spatial, numbers.out_spec[2:], strict=True))
    places = [*(target[axis] for axis in inner), numbers.out_spec[1]]
    return _transposed(product, [places.index(axis) for axis in range(len(places))], graph)


def _worth_it(images: Atom, features: int, windows: Sequence[int], counts: Sequence[int]) -> bool:
    """Whether cuDNN would pad the features of many patches."""
    itemsize = np.dtype(aval(images).dtype).itemsize
    padded = shape_of(images)[features] * itemsize % _ALIGNED > 0
    return padded and math.prod(windows) > 1 and math.prod(counts) > 1


def _patches(
    images: Atom,
    batch: int,
    features: int,
    spatial: Sequence[int],
    windows: Sequence[int],
    counts: Sequence[int],
    graph: Graph,
) -> Atom:
    """Patches ``[batch, patches along each spatial axis, row]``, the rows padded."""
    shape = shape_of(images)
    window, count = (dict(zip(spatial, each, strict=True)) for each in (windows, counts))
    used = [window[a] * count[a] if a in window else size for a, size in enumerate(shape)]
    if used != list(shape):
        images = graph.emit(
            p.slice_p,
            images,
            start_indices=(0,) * len(used),
            limit_indices=tuple(used),
            strides=None,
        )
    split: list[int] = []
    outer: dict[int, int] = {}
    inner: dict[int, int] = {}
    for axis, size in enumerate(used):
        if axis in window:
            outer[axis] = len(split)
            split.append(count[axis])
        if axis != batch:
            inner[axis] = len(split)
            split.append(window.get(axis, size))
        else:
            outer[axis] = len(split)
            split.append(size)
    order = [outer[a] for a in (batch, *spatial)] + [inner[a] for a in sorted(inner)]
    rows = _transposed(graph.reshape(images, split), order, graph)
    length = math.prod(split[inner[a]] for a in inner)
    rows = graph.reshape(rows, (used[batch], *counts, length))
    itemsize = np.dtype(aval(rows).dtype).itemsize
    return _padded(rows, len(counts) + 1, -length * itemsize % _ALIGNED // itemsize, graph)


def _transposed(operand: Atom, order: Sequence[int], graph: Graph) -> Atom:
    if list(order) == sorted(order):
        return operand
    return graph.emit(p.transpose_p, operand, permutation=tuple(order))


def _padded(operand: Atom, axis: int, more: int, graph: Graph) -> Atom:
    """The operand with zeros behind an axis; an equation even where these are none."""
    config = [(0, 0, 0)] * len(shape_of(operand))
    config[axis] = (0, more, 0)
    zero = graph.literal(0, aval(operand))
    return graph.emit(p.pad_p, operand, zero, padding_config=tuple(config))


def _product(
    eqn: JaxprEqn,
    left: Atom,
    right: Atom,
    contracted: tuple[Sequence[int], Sequence[int]],
    graph: Graph,
) -> Atom:
    return graph.emit(
        p.dot_general_p,
        left,
        right,
        dimension_numbers=(tuple(map(tuple, contracted)), ((), ())),
        precision=eqn.params["precision"],
        preferred_element_type=np.dtype(aval(eqn.outvars[0]).dtype),
        out_sharding=None,
    )
