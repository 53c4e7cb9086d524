"""The equations in the place of convolutions that are merged."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph
from jevt.passes.merged_convolutions.match import Extents, Merged


class Writer:
    """What is emitted in the place of each of the convolutions, which are in a row."""

    def __init__(self, merged: Merged) -> None:
        self._merged = merged
        self._numbers = merged.eqns[0].params["dimension_numbers"]
        self._whole: Atom | None = None

    def write(self, eqn: JaxprEqn, graph: Graph) -> Atom:
        """The result of one of them, a slice of the whole, which the first of them emits."""
        if self._whole is None:
            self._whole = self._convolution(graph)
        graph.place(eqn)
        shape = shape_of(self._whole)
        starts, limits = [0] * len(shape), list(shape)
        axis, number = self._numbers.out_spec[1], self._merged.eqns.index(eqn)
        starts[axis] = sum(self._merged.features[:number])
        limits[axis] = starts[axis] + self._merged.features[number]
        if not self._merged.widens:
            lengths = Extents.of(eqn).results
            places = zip(self._numbers.out_spec[2:], self._merged.offsets(eqn), strict=True)
            for (axis, start), length in zip(places, lengths, strict=True):
                starts[axis], limits[axis] = start, start + length
        return graph.emit(
            p.slice_p,
            self._whole,
            start_indices=tuple(starts),
            limit_indices=tuple(limits),
            strides=None,
        )

    def _convolution(self, graph: Graph) -> Atom:
        first = self._merged.eqns[0]
        filters = [self._filters(eqn, graph) for eqn in self._merged.eqns]
        graph.place(first)
        filters_ = graph.emit(p.concatenate_p, *filters, dimension=self._numbers.rhs_spec[0])
        params = {**first.params, "padding": self._merged.padding}
        lhs = read(graph.env, self._merged.lhs)
        return graph.emit(p.conv_general_dilated_p, lhs, filters_, **params)

    def _filters(self, eqn: JaxprEqn, graph: Graph) -> Atom:
        """Its filters, with zeros around them where the window is wider."""
        graph.place(eqn)
        filters = read(graph.env, eqn.invars[1])
        extents = self._merged.extents
        if Extents.of(eqn).windows == extents.windows:
            return filters
        config = [(0, 0, 0)] * len(shape_of(filters))
        axes: Sequence[int] = self._numbers.rhs_spec[2:]
        for i, (axis, start) in enumerate(zip(axes, self._merged.offsets(eqn), strict=True)):
            rest = extents.windows[i] - start - shape_of(filters)[axis]
            config[axis] = (start, rest, 0)
        zero = graph.literal(0, aval(filters))
        return graph.emit(p.pad_p, filters, zero, padding_config=tuple(config))
