"""Where the rows are in a value, and what an equation is on some of them.

Rows are the tokens: axes that follow one another, in the order of memory, with as many positions
together as there are rows. Reshaped, they may be one axis or several. A rule says of a primitive
where the rows are in a result if they are somewhere in an operand, the other way round, and which
equation computes the same with the rows as one axis of another length. It exists where each row of
the result depends on the same row of the operands only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, override

import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.passes._facts import kind, shape_of
from jevt.passes.attention.operations import POINTWISE
from jevt.primitives.softmax import softmax_gradient_p, softmax_statistics_p

#: First axis of the rows, and the one after their last; the outer two are longer than 1.
type Span = tuple[int, int]

#: A primitive and its parameters.
type Call = tuple[Primitive, dict[str, Any]]


class Unfit(Exception):
    """The rows of a result are not those of an operand."""


def merged(shape: Sequence[int], span: Span, rows: int) -> tuple[int, ...]:
    """The shape with ``rows`` rows, as one axis."""
    return (*shape[: span[0]], rows, *shape[span[1] :])


def extent(shape: Sequence[int], span: Span) -> int:
    """The number of rows."""
    return math.prod(shape[slice(*span)])


def trimmed(shape: Sequence[int], first: int, end: int) -> Span | None:
    """The span of these axes, None if there are no two rows."""
    long = [axis for axis in range(first, end) if shape[axis] != 1]
    return (long[0], long[-1] + 1) if long else None


def moved(axis: int, span: Span | None) -> int:
    """Where an axis is once the rows are one."""
    if span is None or axis < span[0]:
        return axis
    return span[0] if axis < span[1] else axis - (span[1] - span[0] - 1)


def _moved(axes: Iterable[int], span: Span | None) -> tuple[int, ...]:
    """Where axes are once the rows are one, each once."""
    return tuple(dict.fromkeys(moved(int(axis), span) for axis in axes))


def _consecutive(axes: Sequence[int]) -> Span | None:
    """The span of axes that follow one another."""
    first, end = axes[0], axes[0] + len(axes)
    return (first, end) if list(axes) == list(range(first, end)) else None


def _together(axes: Sequence[int]) -> Span:
    """The span of axes; raises Unfit if they do not follow one another."""
    span = _consecutive(axes)
    if span is None:
        raise Unfit
    return span


class Rule:
    """What a primitive does with rows; this one: element by element."""

    def result(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        """Where the rows are in the results if operand ``index`` has them at ``span``."""
        have, out = shape_of(eqn.invars[index]), shape_of(eqn.outvars[0])
        return span if have[slice(*span)] == out[slice(*span)] else None

    def operand(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        """Where they are in operand ``index`` if the results have them at ``span``; None: nowhere.

        Raises:
          Unfit: some rows of the result are one of the operand, or the equation has no rows.
        """
        have, out = shape_of(eqn.invars[index]), shape_of(eqn.outvars[0])
        if not have:
            return None
        if have[slice(*span)] == out[slice(*span)]:
            return span
        if extent(have, span) == 1:
            return None
        raise Unfit

    def placed(self, eqn: JaxprEqn, index: int, span: Span) -> tuple[int, ...]:
        """The shape that an operand without rows gets: an axis for the rows, where it has any."""
        shape = shape_of(eqn.invars[index])
        return merged(shape, span, 1) if shape else ()

    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        """The equation with ``rows`` rows.

        Args:
          eqn: the equation.
          spans: where the rows are in the operands.
          span: where they are in the results.
          rows: how many there are to be.
        """
        del spans, span, rows
        return eqn.primitive, eqn.params


class _Placing(Rule):
    """``broadcast_in_dim``."""

    @override
    def result(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        places = _consecutive(list(map(int, eqn.params["broadcast_dimensions"][slice(*span)])))
        have, out = shape_of(eqn.invars[index]), shape_of(eqn.outvars[0])
        return places if places and have[slice(*span)] == out[slice(*places)] else None

    @override
    def operand(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        have = shape_of(eqn.invars[index])
        inside = self._inside(eqn, span)
        count = math.prod(have[axis] for axis in inside)
        if count == 1:
            return None
        if count != extent(shape_of(eqn.outvars[0]), span):
            raise Unfit
        return trimmed(have, inside[0], inside[-1] + 1)

    @override
    def placed(self, eqn: JaxprEqn, index: int, span: Span) -> tuple[int, ...]:
        inside = self._inside(eqn, span)
        return tuple(n for a, n in enumerate(shape_of(eqn.invars[index])) if a not in inside)

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        assert span is not None
        places = list(map(int, eqn.params["broadcast_dimensions"]))
        if spans[0] is None:
            inside = self._inside(eqn, span)
            places = [place for axis, place in enumerate(places) if axis not in inside]
        kept = [place for axis, place in enumerate(places) if not _is_inner(axis, spans[0])]
        shape = merged(shape_of(eqn.outvars[0]), span, rows)
        dimensions = tuple(moved(place, span) for place in kept)
        return eqn.primitive, {**eqn.params, "shape": shape, "broadcast_dimensions": dimensions}

    def _inside(self, eqn: JaxprEqn, span: Span) -> list[int]:
        places = eqn.params["broadcast_dimensions"]
        return [axis for axis, place in enumerate(places) if span[0] <= place < span[1]]


def _is_inner(axis: int, span: Span | None) -> bool:
    """Whether an axis is one of the rows', but not their first."""
    return span is not None and span[0] < axis < span[1]


class _View(Rule):
    """``reshape`` and ``squeeze``."""

    @override
    def result(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        if eqn.params.get("dimensions") is not None and eqn.primitive is p.reshape_p:
            return None
        return _relocated(shape_of(eqn.invars[index]), span, shape_of(eqn.outvars[0]))

    @override
    def operand(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        have = _relocated(shape_of(eqn.outvars[0]), span, shape_of(eqn.invars[index]))
        if have is None or self.result(eqn, index, have) != span:
            raise Unfit
        return have

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        assert span is not None
        shape = merged(shape_of(eqn.outvars[0]), span, rows)
        return p.reshape_p, {"new_sizes": shape, "dimensions": None, "sharding": None}


def _relocated(shape: Sequence[int], span: Span, other: Sequence[int]) -> Span | None:
    """Where the rows are in another shape of the same elements."""
    before, rows = math.prod(shape[: span[0]]), extent(shape, span)
    for first in range(len(other)):
        if math.prod(other[:first]) == before:
            for end in range(first + 1, len(other) + 1):
                if math.prod(other[first:end]) == rows:
                    return trimmed(other, first, end)
    return None


class _Transposition(Rule):
    """``transpose``."""

    @override
    def result(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        order = list(eqn.params["permutation"])
        return _consecutive([order.index(axis) for axis in range(*span)])

    @override
    def operand(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        return _together(eqn.params["permutation"][slice(*span)])

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        return eqn.primitive, {"permutation": _moved(eqn.params["permutation"], spans[0])}


class _Reduction(Rule):
    """Sums, maxima and the like along axes that are none of the rows'."""

    @override
    def result(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        kept = self._kept(eqn)
        if any(axis not in kept for axis in range(*span)):
            return None
        first = kept.index(span[0])
        return first, first + span[1] - span[0]

    @override
    def operand(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        return _together(self._kept(eqn)[slice(*span)])

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        return eqn.primitive, {**eqn.params, "axes": _moved(eqn.params["axes"], spans[0])}

    def _kept(self, eqn: JaxprEqn) -> list[int]:
        rank = len(shape_of(eqn.invars[0]))
        return [axis for axis in range(rank) if axis not in eqn.params["axes"]]


class _SoftmaxGradient(Rule):
    """``softmax_gradient``, of x, two numbers a row, and a cotangent like x."""

    @override
    def result(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        kept = [a for a in range(len(shape_of(eqn.invars[0]))) if a not in eqn.params["axes"]]
        if index in (1, 2):
            return _consecutive(kept[slice(*span)])
        return span if all(axis in kept for axis in range(*span)) else None

    @override
    def operand(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        axes = eqn.params["axes"]
        if any(axis in axes for axis in range(*span)):
            raise Unfit
        before = sum(axis < span[0] for axis in axes) if index in (1, 2) else 0
        return span[0] - before, span[1] - before

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        return eqn.primitive, {**eqn.params, "axes": _moved(eqn.params["axes"], span)}


class _Positions(Rule):
    """``iota`` along another axis than the rows'."""

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        assert span is not None
        shape = merged(shape_of(eqn.outvars[0]), span, rows)
        dimension = moved(eqn.params["dimension"], span)
        return eqn.primitive, {**eqn.params, "shape": shape, "dimension": dimension}


class _Slice(Rule):
    """``slice`` of whole rows' axes."""

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        assert span is not None
        params = dict(eqn.params)
        params["start_indices"] = merged(params["start_indices"], span, 0)
        params["limit_indices"] = merged(params["limit_indices"], span, rows)
        if params["strides"] is not None:
            params["strides"] = merged(params["strides"], span, 1)
        return eqn.primitive, params


class _Padding(Rule):
    """``pad`` of other axes than the rows'."""

    @override
    def placed(self, eqn: JaxprEqn, index: int, span: Span) -> tuple[int, ...]:
        return shape_of(eqn.invars[index])

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        assert span is not None
        config = list(eqn.params["padding_config"])
        config[slice(*span)] = [(0, 0, 0)]
        return eqn.primitive, {**eqn.params, "padding_config": tuple(config)}


class _Along(Rule):
    """What works along one axis, which is none of the rows'.

    Args:
      key: the parameter that names the axis.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    @override
    def result(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        return None if span[0] <= eqn.params[self.key] < span[1] else span

    @override
    def operand(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        if span[0] <= eqn.params[self.key] < span[1]:
            raise Unfit
        return span

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        return eqn.primitive, {**eqn.params, self.key: moved(eqn.params[self.key], span)}


class _Product(Rule):
    """``dot_general`` of rows with what has none."""

    @override
    def result(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        contracted, batch = eqn.params["dimension_numbers"]
        taken = {*contracted[index], *batch[index]}
        if any(axis in taken for axis in range(*span)):
            return None
        first = sum(axis not in taken for axis in range(span[0]))
        first += len(batch[0])
        if index == 1:
            first += self._free(eqn, 0)
        return first, first + span[1] - span[0]

    @override
    def operand(self, eqn: JaxprEqn, index: int, span: Span) -> Span | None:
        contracted, batch = eqn.params["dimension_numbers"]
        first = len(batch[0]) + (self._free(eqn, 0) if index == 1 else 0)
        own = range(first, first + self._free(eqn, index))
        inside = [axis in own for axis in range(*span)]
        if not any(inside):
            return None
        taken = {*contracted[index], *batch[index]}
        rank = len(shape_of(eqn.invars[index]))
        free = [axis for axis in range(rank) if axis not in taken]
        if not all(inside):
            raise Unfit
        return _together([free[axis - first] for axis in range(*span)])

    @override
    def placed(self, eqn: JaxprEqn, index: int, span: Span) -> tuple[int, ...]:
        return shape_of(eqn.invars[index])

    @override
    def call(
        self, eqn: JaxprEqn, spans: Sequence[Span | None], span: Span | None, rows: int
    ) -> Call:
        numbers = tuple(
            tuple(_moved(axes, own) for axes, own in zip(pair, spans, strict=True))
            for pair in eqn.params["dimension_numbers"]
        )
        return eqn.primitive, {**eqn.params, "dimension_numbers": numbers}

    def _free(self, eqn: JaxprEqn, index: int) -> int:
        contracted, batch = eqn.params["dimension_numbers"]
        return len(shape_of(eqn.invars[index])) - len(contracted[index]) - len(batch[index])


#: Element by element, whatever is broadcast.
ELEMENTWISE = frozenset(
    {
        *POINTWISE,
        *(p.convert_element_type_p, p.integer_pow_p, p.xor_p, p.rem_p, p.clamp_p),
        *(p.erf_p, p.erfc_p, p.erf_inv_p, p.floor_p, p.ceil_p, p.round_p),
        *(p.sin_p, p.cos_p, p.cbrt_p),
    }
)

#: By primitive. What is not here has no rows.
RULES: Mapping[Primitive, Rule] = {
    **dict.fromkeys(ELEMENTWISE, Rule()),
    **dict.fromkeys(
        (
            *(p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p),
            *(p.reduce_and_p, p.reduce_or_p, p.argmax_p, p.argmin_p, softmax_statistics_p),
        ),
        _Reduction(),
    ),
    p.broadcast_in_dim_p: _Placing(),
    p.reshape_p: _View(),
    p.squeeze_p: _View(),
    p.transpose_p: _Transposition(),
    softmax_gradient_p: _SoftmaxGradient(),
    p.iota_p: _Positions(),
    p.slice_p: _Slice(),
    p.pad_p: _Padding(),
    p.concatenate_p: _Along("dimension"),
    p.top_k_p: _Along("axis"),
    p.dot_general_p: _Product(),
}


def is_row_by_row(eqn: JaxprEqn, span: Span) -> bool:
    """Whether an equation that has a rule has these rows in its results."""
    axes = range(*span)
    if eqn.primitive is p.iota_p:
        return eqn.params["dimension"] not in axes
    if eqn.primitive is p.slice_p:
        (operand,), params = eqn.invars, eqn.params
        strides = params["strides"] or (1,) * len(shape_of(operand))
        return all(
            (params["start_indices"][a], params["limit_indices"][a], strides[a])
            == (0, shape_of(operand)[a], 1)
            for a in axes
        )
    if eqn.primitive is p.pad_p:
        return all(not any(eqn.params["padding_config"][a]) for a in axes)
    return True


def closes(eqn: JaxprEqn, spans: Sequence[Span | None]) -> bool:
    """Whether an equation sums over all rows of its operands: a gradient of weights, or a sum.

    Args:
      eqn: the equation.
      spans: where the rows are in its operands.
    """
    if eqn.primitive is p.reduce_sum_p:
        return spans[0] is not None and set(range(*spans[0])) <= set(eqn.params["axes"])
    if eqn.primitive is not p.dot_general_p or spans[0] is None or spans[1] is None:
        return False
    contracted, _ = eqn.params["dimension_numbers"]
    pairs = list(zip(*contracted, strict=True))
    rows = list(zip(range(*spans[0]), range(*spans[1]), strict=False))
    return len(rows) == spans[0][1] - spans[0][0] == spans[1][1] - spans[1][0] and all(
        pair in pairs for pair in rows
    )


def closing_operand(eqn: JaxprEqn, index: int, span: Span, other: int) -> Span | None:
    """Where the rows are in operand ``other`` if a product contracts those of operand ``index``."""
    if other == index or eqn.primitive is not p.dot_general_p:
        return span if other == index else None
    contracted, _ = eqn.params["dimension_numbers"]
    partner = dict(zip(contracted[index], contracted[other], strict=True))
    if any(axis not in partner for axis in range(*span)):
        return None
    return _consecutive([partner[axis] for axis in range(*span)])


def closing_call(
    eqn: JaxprEqn, spans: Sequence[Span | None], dtype: np.dtype[Any]
) -> tuple[Call, np.dtype[Any]]:
    """Such an equation of some rows, and the type of its result: ``dtype`` where that can be.

    The operand of a sum has to be in that type.
    """
    primitive, params = RULES[eqn.primitive].call(eqn, spans, None, 0)
    if eqn.primitive is p.dot_general_p:
        if _names_types(params["precision"]):
            own: np.dtype[Any] = np.dtype(aval(eqn.outvars[0]).dtype)
            return (primitive, params), own
        params = {**params, "preferred_element_type": dtype}
    return (primitive, params), dtype


def _names_types(precision: Any) -> bool:
    """Whether a product's precision names the types of its operands and of its result."""
    return isinstance(precision, (lax.DotAlgorithm, lax.DotAlgorithmPreset))


def accumulator(atom: Atom) -> np.dtype[Any]:
    """The type in which sums of chunks add up: float32 for what is narrower."""
    dtype: np.dtype[Any] = np.dtype(aval(atom).dtype)
    return np.dtype("float32") if kind(aval(atom)) == "f" and dtype.itemsize < 4 else dtype
