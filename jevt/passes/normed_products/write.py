"""The equations in the place of a batch norm of a product.

Arrays of W's shape have W's layout: [C, N] or [N, C]. Between what is of W's size and what is of
the product's are barriers, so that the partitioner looks at them apart: nothing is gained by a
kernel that holds both.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import barrier, read, substitute
from jevt.passes._rules import Graph
from jevt.passes.normed_products.match import NormedProduct, side_of
from jevt.passes.raising.write import number

_BFLOAT16, _FLOAT32 = np.dtype(jnp.bfloat16), np.dtype("float32")


class Writer:
    """Writes the statistics of a norm and, later in the program, the gradients."""

    def __init__(self, found: NormedProduct) -> None:
        self._found = found
        self._matrix = _Matrix(found)

    def statistics(self, graph: Graph) -> Atom:
        """The mean; the variance and rstd are put in the place of the program's."""
        eqn, matrix = self._found.statistics, self._matrix
        graph.place(eqn)
        w = matrix.w(graph)
        self._sum_x, covariance = self._moments(graph)
        self._xy = matrix.multiplied(covariance, graph)
        sums = [
            matrix.sum(graph.mul(w, values), graph)
            for values in (matrix.inner(self._sum_x, graph), self._xy)
        ]
        mean, square = (self._over_m(value, graph) for value in _apart(sums, graph))
        variance = graph.emit(p.max_p, square, number(0.0, square, graph))
        shifted = variance
        if eqn.params["epsilon"]:
            epsilon = number(eqn.params["epsilon"], variance, graph)
            shifted = graph.emit(p.add_p, variance, epsilon)
        self._rstd = graph.emit(p.rsqrt_p, shifted, accuracy=None)
        graph.env.update(zip(eqn.outvars, (mean, variance, self._rstd), strict=True))
        return mean

    def _moments(self, graph: Graph) -> tuple[Atom, Atom]:
        """Σ x, [C], and Σ (x - mean)(x - mean)ᵀ, [C, C], over the rows of x."""
        rows = self._found.rows
        x = read(graph.env, self._found.x)
        total = _sum(graph.convert(x, _FLOAT32), rows, graph)
        squares = graph.dot_general(x, x, (rows, rows), _FLOAT32, None)
        total, squares = _apart([total, squares], graph)
        (size,) = shape_of(total)
        outer = graph.mul(graph.reshape(total, (size, 1)), graph.reshape(total, (1, size)))
        return total, graph.emit(p.sub_p, squares, self._over_m(outer, graph))

    def sums(self, graph: Graph) -> Atom:
        """The gradient of y as it was, which no product reads any more, and the norm's sums."""
        found, matrix, eqn = self._found, self._matrix, self._found.gradient
        graph.add(substitute(graph.env, eqn))
        graph.place(eqn)
        g, x = read(graph.env, found.g), read(graph.env, found.x)
        rows = tuple(range(len(shape_of(g)) - 1))
        sum_g = _sum(graph.convert(g, _FLOAT32), rows, graph)
        sides = [(x, found.rows), (g, rows)][:: -1 if matrix.inner_axis else 1]
        (left, right), contracted = zip(*sides, strict=True)
        xg = graph.dot_general(left, right, contracted, _FLOAT32, None)
        xg, self._sum_g, self._xy, rstd = _apart([xg, sum_g, self._xy, self._rstd], graph)
        means = graph.mul(matrix.inner(self._sum_x, graph), matrix.outer(self._sum_g, graph))
        self._xg = graph.emit(p.sub_p, xg, self._over_m(means, graph))
        sum_gc = matrix.sum(graph.mul(matrix.w(graph), self._xg), graph)
        self._scale = rstd
        for scale in found.scales:
            wide = graph.convert(read(graph.env, scale), _FLOAT32)
            self._scale = graph.mul(self._scale, graph.reshape(wide, shape_of(rstd)))
        self._slope = graph.mul(graph.emit(p.square_p, rstd), self._over_m(sum_gc, graph))
        dy, *sums = eqn.outvars
        graph.env.update(zip(sums, (sum_g, sum_gc), strict=True))
        return dy

    def to_w(self, graph: Graph) -> Atom:
        """scale·(Σ (x - mean)g - slope·Σ (x - mean)y), in the layout of the program's product."""
        found, matrix, eqn = self._found, self._matrix, self._found.to_w
        graph.place(eqn)
        along_y = graph.mul(matrix.outer(self._slope, graph), self._xy)
        result = graph.emit(p.sub_p, self._xg, along_y)
        result = graph.mul(matrix.outer(self._scale, graph), result)
        result = graph.convert(result, aval(eqn.outvars[0]).dtype)
        if side_of(eqn, found.x) == matrix.inner_axis:
            return result
        return graph.emit(p.transpose_p, result, permutation=(1, 0))

    def to_x(self, graph: Graph) -> Atom:
        """g·Aᵀ + x·B - a row, with which the sum over all rows is 0.

        A is scale·W, and B is -(slope·W)·Aᵀ, as x·B takes away what g·Aᵀ has along y; so B is
        made of A as it is rounded, and in two parts.
        """
        found, matrix, eqn = self._found, self._matrix, self._found.to_x
        graph.place(eqn)
        w = matrix.w(graph)
        a = _rounded(graph.mul(w, matrix.outer(self._scale, graph)), graph)
        narrow = graph.convert(a, _BFLOAT16)
        weights = graph.emit(p.neg_p, graph.mul(w, matrix.outer(self._slope, graph)))
        weights = graph.convert(weights, _BFLOAT16)
        axis = (matrix.outer_axis,)
        factors = _sides(matrix.inner_axis, narrow, weights)
        parts = _parts(graph.dot_general(*factors, (axis, axis), _FLOAT32, None), 2, graph)
        means = [
            _sum(graph.mul(values, matrix.outer(total, graph)), axis, graph)
            for values, total in (
                (a, self._sum_g),
                (graph.emit(p.add_p, *parts), self._sum_x),
            )
        ]
        row = self._over_m(graph.emit(p.add_p, *means), graph)
        high, low = (graph.convert(part, _BFLOAT16) for part in parts)
        narrow, high, low, row = _apart([narrow, high, low, row], graph)
        side = side_of(eqn, found.w)
        of_g = eqn.params["dimension_numbers"][0]
        # The matrix is read in the direction in which W is, so that one kernel takes all three.
        of_x = _sides(side, axis, found.contracted[:1])
        g, x = read(graph.env, found.g), read(graph.env, found.x)
        total, *others = (
            graph.dot_general(*_sides(side, factor, values), contracted, _FLOAT32, None)
            for factor, values, contracted in ((narrow, g, of_g), (high, x, of_x), (low, x, of_x))
        )
        for other in others:
            total = graph.emit(p.add_p, total, other)
        shape = [1] * len(shape_of(total))
        shape[0 if side == 0 else -1] = shape_of(row)[0]
        total = graph.emit(p.sub_p, total, graph.reshape(row, shape))
        return graph.convert(total, aval(eqn.outvars[0]).dtype)

    def _over_m(self, values: Atom, graph: Graph) -> Atom:
        return graph.emit(p.div_p, values, number(self._found.sizes[0], values, graph))


class _Matrix:
    """Arithmetic on arrays of W's shape, and on one value for each column of x or of y.

    Attributes:
      inner_axis: the axis of W along which x is multiplied.
      outer_axis: the other one.
    """

    def __init__(self, found: NormedProduct) -> None:
        self.inner_axis = found.contracted[1]
        self.outer_axis = 1 - self.inner_axis
        self._found = found

    def narrow(self, graph: Graph) -> Atom:
        """W in bfloat16."""
        return read(graph.env, self._found.w)

    def w(self, graph: Graph) -> Atom:
        """W in float32."""
        return graph.convert(self.narrow(graph), _FLOAT32)

    def sum(self, values: Atom, graph: Graph) -> Atom:
        """A value for each column of y: the sum along the inner axis."""
        return _sum(values, (self.inner_axis,), graph)

    def inner(self, values: Atom, graph: Graph) -> Atom:
        """Values along the inner axis."""
        return _along(values, self.inner_axis, graph)

    def outer(self, values: Atom, graph: Graph) -> Atom:
        """Values along the outer axis."""
        return _along(values, self.outer_axis, graph)

    def multiplied(self, square: Atom, graph: Graph) -> Atom:
        """square·W of a symmetric float32 matrix [C, C], in three products of 16 bits each."""
        total, *others = (
            self._product(graph.convert(part, _BFLOAT16), graph)
            for part in _parts(square, 3, graph)
        )
        for other in others:
            total = graph.emit(p.add_p, total, other)
        return total

    def _product(self, square: Atom, graph: Graph) -> Atom:
        operands = _sides(self.inner_axis, square, self.narrow(graph))
        return graph.dot_general(*operands, ((1,), (0,)), _FLOAT32, None)


def _sides[T](side: int, first: T, second: T) -> tuple[T, T]:
    """Two operands of a product, the first one on this side."""
    return (first, second) if side == 0 else (second, first)


def _along(values: Atom, axis: int, graph: Graph) -> Atom:
    """Values along one axis of two."""
    (size,) = shape_of(values)
    return graph.reshape(values, (size, 1) if axis == 0 else (1, size))


def _sum(values: Atom, axes: tuple[int, ...], graph: Graph) -> Atom:
    return graph.emit(p.reduce_sum_p, values, axes=axes, out_sharding=None)


def _rounded(values: Atom, graph: Graph) -> Atom:
    """float32 values as bfloat16 has them; compilers drop a cast there and back."""
    return graph.emit(p.reduce_precision_p, values, exponent_bits=8, mantissa_bits=7)


def _parts(values: Atom, number: int, graph: Graph) -> list[Atom]:
    """Arrays of numbers that bfloat16 has, each adding 8 bits of float32 values to the sum."""
    parts = [_rounded(values, graph)]
    while len(parts) < number:
        values = graph.emit(p.sub_p, values, parts[-1])
        parts.append(_rounded(values, graph))
    return parts


def _apart(values: Sequence[Atom], graph: Graph) -> list[Atom]:
    """The same values, beyond a barrier."""
    eqn = barrier(values, graph.source)
    graph.add(eqn)
    return list(eqn.outvars)
