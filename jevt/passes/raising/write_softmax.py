"""The composite equations in the place of a softmax that was found, and what its rows give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.extend.core import Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph
from jevt.passes.raising.logsumexp_gradients import Multiple
from jevt.passes.raising.rows import along, exponential, of_row
from jevt.passes.raising.softmax_gradients import SoftmaxGradient
from jevt.passes.raising.softmaxes import Softmax
from jevt.passes.raising.write import cast, composite, summed
from jevt.primitives.softmax import softmax_gradient_p, softmax_statistics_p


class SoftmaxWriter:
    """Writes a softmax's statistics, what the program has of them, and later its gradient."""

    def __init__(self, softmax: Softmax, gradient: SoftmaxGradient | None, graph: Graph) -> None:
        self.softmax = softmax
        self.gradient = gradient
        self.graph = graph
        self.x: Atom = softmax.x
        self.maximum: Atom = softmax.total
        self.total: Atom = softmax.total

    def statistics(self) -> None:
        softmax, graph = self.softmax, self.graph
        source = softmax.program.eqns[softmax.program.maker[softmax.total]]
        graph.place(source)
        x = read(graph.env, softmax.x)
        aval: Any = x.aval
        self.x = graph.convert(x, np.promote_types(aval.dtype, np.float32))
        self.maximum, self.total = composite(
            graph,
            source,
            softmax_statistics_p,
            [self.x],
            axes=softmax.axes,
            guarded=softmax.guarded,
        )

    def result(self, var: Var) -> None:
        """Writes a value of the program that the statistics give."""
        graph = self.graph
        graph.place(self.softmax.program.eqns[self.softmax.program.maker[var]])
        value = FORMS[self.softmax.results[var]](self)
        graph.env[var] = cast(graph.reshape(value, shape_of(var)), var, graph)

    def sum(self) -> None:
        """Writes the gradient and the sum in which it ends."""
        gradient, graph = self.gradient, self.graph
        assert gradient is not None
        graph.place(gradient.source)
        g = graph.reshape(read(graph.env, gradient.g), shape_of(self.x))
        (dx,) = composite(
            graph,
            gradient.source,
            softmax_gradient_p,
            [self.x, self.maximum, self.total, g],
            axes=self.softmax.axes,
        )
        graph.env[gradient.sum.root] = summed(gradient.sum, dx, graph)

    def multiple(self, multiple: Multiple) -> None:
        """Writes a product of the softmax and a number a row."""
        graph = self.graph
        graph.place(self.softmax.program.eqns[self.softmax.program.maker[multiple.value]])
        k = of_row(read(graph.env, multiple.k), self.total, graph)
        row = self.along(graph.emit(p.div_p, k, self.total))
        value = graph.reshape(graph.mul(row, self.exponential()), shape_of(multiple.value))
        graph.env[multiple.value] = cast(value, multiple.value, graph)

    def along(self, row: Atom) -> Atom:
        return along(row, self.x, self.softmax.axes, self.graph)

    def logarithm(self) -> Atom:
        return self.graph.emit(p.log_p, self.total, accuracy=None)

    def exponential(self) -> Atom:
        return exponential(self.x, self.maximum, self.softmax.axes, self.graph)

    def softmax_(self) -> Atom:
        return self.graph.emit(p.div_p, self.exponential(), self.along(self.total))

    def log_softmax(self) -> Atom:
        shifted = self.graph.emit(p.sub_p, self.x, self.along(self.maximum))
        return self.graph.emit(p.sub_p, shifted, self.along(self.logarithm()))

    def logsumexp(self) -> Atom:
        return self.graph.emit(p.add_p, self.logarithm(), self.maximum)


#: What writes each of the values that x and the statistics give.
FORMS: Mapping[str, Callable[[SoftmaxWriter], Atom]] = {
    "maximum": lambda writer: writer.maximum,
    "total": lambda writer: writer.total,
    "exponential": SoftmaxWriter.exponential,
    "softmax": SoftmaxWriter.softmax_,
    "log_softmax": SoftmaxWriter.log_softmax,
    "logsumexp": SoftmaxWriter.logsumexp,
}
