"""Batch norms of matrix products, found: the product, its statistics and its gradients.

y = x·W ─▶ float32 ─┬▶ norm_statistics ─▶ mean, variance, rstd
                    ├▶ what is normalised, one equation that reads y
                    └▶ norm_gradient(…, g) ─▶ 16 bits ─┬▶ dX = dy·Wᵀ
                                                       └▶ dW = xᵀ·dy
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.passes._facts import shape_of
from jevt.passes._ranges import free_axes
from jevt.passes._readers import Readers, has_known_cost
from jevt.passes._rules import on_same_mesh
from jevt.primitives.norms import norm_gradient_p, norm_statistics_p, varies

_BFLOAT16, _FLOAT32 = np.dtype(jnp.bfloat16), np.dtype("float32")

#: Equations that normalise begin with one of these.
_NORMALISING = frozenset({p.sub_p, p.mul_p})


@dataclasses.dataclass(frozen=True)
class NormedProduct:
    """A product, a batch norm over its rows, and the gradients of both.

    Attributes:
      product: y = x·W; x has one contracted axis, W two axes, both are bfloat16.
      statistics: of y in float32.
      gradient: of the norm.
      g: the cotangent that the gradient reads, in bfloat16, of y's shape.
      to_x: the gradient with respect to x, a product of dy and W.
      to_w: that with respect to W, a product of x and dy.
    """

    product: JaxprEqn
    statistics: JaxprEqn
    gradient: JaxprEqn
    g: Atom
    to_x: JaxprEqn
    to_w: JaxprEqn

    @property
    def x(self) -> Atom:
        return self.product.invars[0]

    @property
    def w(self) -> Atom:
        return self.product.invars[1]

    @property
    def contracted(self) -> tuple[int, int]:
        """The axes of x and of W along which they are multiplied."""
        ((x,), (w,)), _ = self.product.params["dimension_numbers"]
        return int(x), int(w)

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes of x that are rows."""
        return tuple(free_axes(self.product, 0))

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns of x and columns of y."""
        inner = shape_of(self.x)[self.contracted[0]]
        return math.prod(shape_of(self.x)) // inner, inner, shape_of(self.w)[1 - self.contracted[1]]

    @property
    def scales(self) -> list[Atom]:
        """What the normalised y is multiplied with: a number a column, with axes of one."""
        return list(self.gradient.invars[4:])


def find(jaxpr: Jaxpr, readers: Readers) -> Iterator[NormedProduct]:
    """The batch norms of products of a jaxpr, its bodies left aside."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is norm_statistics_p:
            found = _found(eqn, readers)
            if found is not None:
                yield found


def _found(statistics: JaxprEqn, readers: Readers) -> NormedProduct | None:
    (wide,) = statistics.invars
    product = _product(wide, readers)
    if product is None or not _is_over_rows(statistics, len(shape_of(wide))):
        return None
    assert isinstance(wide, Var)
    gradient = _gradient(wide, statistics, readers)
    if gradient is None:
        return None
    g = _before_cast(gradient.invars[3], readers)
    pair = _products_of(gradient.outvars[0], product, readers)
    if g is None or pair is None:
        return None
    found = NormedProduct(product, statistics, gradient, g, *pair)
    return found if on_same_mesh([found.x, found.w, g, *found.scales]) else None


def _product(wide: Atom, readers: Readers) -> JaxprEqn | None:
    """The product whose result, perhaps in 16 bits first, is a value that nobody else reads."""
    if aval(wide).dtype != _FLOAT32:
        return None
    maker = readers.maker(wide)
    if maker is not None and maker.primitive is p.convert_element_type_p:
        (narrow,) = maker.invars
        if not isinstance(narrow, Var) or not _is_read_by(narrow, 1, readers):
            return None
        maker = readers.maker(narrow)
    return maker if maker is not None and _is_plain(maker) else None


def _is_plain(eqn: JaxprEqn) -> bool:
    """Whether this is a product of rows and a matrix, both bfloat16."""
    if eqn.primitive is not p.dot_general_p or not has_known_cost(eqn):
        return False
    contracted, batch = eqn.params["dimension_numbers"]
    return (
        len(contracted[0]) == 1
        and not batch[0]
        and len(shape_of(eqn.invars[1])) == 2
        and all(isinstance(a, Var) and aval(a).dtype == _BFLOAT16 for a in eqn.invars)
    )


def _is_over_rows(norm: JaxprEqn, rank: int) -> bool:
    """Whether a norm runs over all axes but the last, around a mean, in one pass."""
    params = norm.params
    return params["axes"] == tuple(range(rank - 1)) and params["centred"] and not params["two_pass"]


def _gradient(wide: Var, statistics: JaxprEqn, readers: Readers) -> JaxprEqn | None:
    """The norm's gradient, where nothing but it and what is normalised reads y beside."""
    others = [eqn for eqn in readers.of(wide) if eqn is not statistics]
    gradients = [eqn for eqn in others if eqn.primitive is norm_gradient_p]
    rest = [eqn for eqn in others if eqn.primitive is not norm_gradient_p]
    if len(gradients) != 1 or len(rest) != 1 or not _is_read_by(wide, 3, readers):
        return None
    (gradient,), (normalised,) = gradients, rest
    mean, _, rstd = statistics.outvars
    rank, params = len(shape_of(wide)), gradient.params
    if (
        gradient.invars[:3] == [wide, mean, rstd]
        and _is_over_rows(gradient, rank)
        and params["summed"] == params["axes"]
        and not any(varies(shape_of(a), params["axes"]) for a in gradient.invars[4:])
        and normalised.primitive in _NORMALISING
        and all(a is wide or _is_a_row(a, wide, readers) for a in normalised.invars)
    ):
        return gradient
    return None


def _is_a_row(atom: Atom, wide: Var, readers: Readers) -> bool:
    """Whether a value, broadcast perhaps, has a number a column."""
    maker = readers.maker(atom)
    if maker is not None and maker.primitive is p.broadcast_in_dim_p:
        atom = maker.invars[0]
    return math.prod(shape_of(atom)) <= shape_of(wide)[-1]


def _before_cast(wide: Atom, readers: Readers) -> Atom | None:
    """What is cast to a value, in bfloat16."""
    maker = readers.maker(wide)
    if maker is None or maker.primitive is not p.convert_element_type_p:
        return None
    (narrow,) = maker.invars
    return narrow if aval(narrow).dtype == _BFLOAT16 else None


def _products_of(
    gradient: Var, product: JaxprEqn, readers: Readers
) -> tuple[JaxprEqn, JaxprEqn] | None:
    """The gradients with respect to x and W, if nothing else reads that of y."""
    if not _is_read_by(gradient, 1, readers):
        return None
    (cast,) = readers.of(gradient)
    if cast.primitive is not p.convert_element_type_p or not _is_read_by(
        cast.outvars[0], 2, readers
    ):
        return None
    (narrow,) = cast.outvars
    first, second = readers.of(narrow)
    for to_x, to_w in ((first, second), (second, first)):
        if _is_to_x(to_x, narrow, product) and _is_to_w(to_w, narrow, product):
            return to_x, to_w
    return None


def _is_to_x(eqn: JaxprEqn, dy: Var, product: JaxprEqn) -> bool:
    w, last = product.invars[1], len(shape_of(dy)) - 1
    (own,) = free_axes(product, 1)
    return _multiplies(eqn, dy, w) == [(last, own)]


def _is_to_w(eqn: JaxprEqn, dy: Var, product: JaxprEqn) -> bool:
    return _multiplies(eqn, dy, product.invars[0]) == list(enumerate(free_axes(product, 0)))


def _multiplies(eqn: JaxprEqn, dy: Var, other: Atom) -> list[tuple[int, int]]:
    """The axes along which an equation multiplies two values, in dy's order, if it does."""
    if eqn.primitive is not p.dot_general_p or not _is_unsharded(eqn):
        return []
    contracted, batch = eqn.params["dimension_numbers"]
    side = side_of(eqn, dy)
    if batch[0] or eqn.invars[1 - side] is not other:
        return []
    return sorted(zip(contracted[side], contracted[1 - side], strict=True))


def _is_unsharded(product: JaxprEqn) -> bool:
    """Whether nothing is asked of a result's sharding; in a ``shard_map``, gradients say so."""
    sharding = product.params.get("out_sharding")
    return sharding is None or all(entry is None for entry in sharding.spec)


def side_of(product: JaxprEqn, operand: Atom) -> int:
    """Which operand of a product a value is."""
    return next(i for i, a in enumerate(product.invars) if a is operand)


def _is_read_by(var: Var, count: int, readers: Readers) -> bool:
    """Whether so many equations read a value, and it is no output."""
    return not readers.is_output(var) and len(readers.of(var)) == count
