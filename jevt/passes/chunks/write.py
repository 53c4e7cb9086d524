"""The loop over chunks of rows in the place of a region.

    before  z = h · w;  …;  dz = …;  dh = dz · wᵀ;  dw = hᵀ · dz
    after   dw, dh = scan(zeros, chunks of h) of
                z = h · w;  …;  dz = …;  dh = dz · wᵀ;  dw = dw + hᵀ · dz
            dw = convert dw

Rows that are left over after whole chunks run in the same equations behind the loop, and continue
its sums.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt import _jaxpr
from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph
from jevt.passes.chunks.region import Region
from jevt.passes.chunks.rows import RULES, Call, Span, accumulator, closing_call, merged
from jevt.passes.raising.write import number


def write(region: Region, rows: int, graph: Graph) -> None:
    """Adds the loop to ``graph``, and what stands for the region's results.

    Args:
      region: what runs in it.
      rows: of a chunk.
      graph: has what the region reads.
    """
    _Loop(region, rows, graph).write()


class _Loop:
    """One region as a loop."""

    def __init__(self, region: Region, chunk: int, graph: Graph) -> None:
        self.region = region
        self.eqns = region.program.eqns
        self.graph = graph
        self.chunk = chunk
        self.count, self.rest = divmod(region.head.rows, chunk)
        leaves = list(region.leaves())
        self.wholes = [var for var, span in leaves if span is None]
        self.leaves = [(var, span) for var, span in leaves if span is not None]
        self.sums = [self.eqns[at].outvars[0] for at in region.sums]
        spans = {v: s for at, s in region.results.items() for v in self.eqns[at].outvars}
        self.results = [(var, spans[var]) for var in region.rowed]

    def write(self) -> None:
        graph = self.graph
        graph.place(self.region.head.eqn)
        wholes = [read(graph.env, var) for var in self.wholes]
        leaves = [self._front(read(graph.env, var), span) for var, span in self.leaves]
        sums = [_zeros(var, graph) for var in self.sums]
        sums, results = self._scan(wholes, sums, leaves)
        if self.rest:
            last = [self._part(leaf, self.count * self.chunk, None) for leaf in leaves]
            known = dict(zip(self.wholes, wholes, strict=True))
            sums, ends = self._chunk(graph, known, sums, last, self.rest)
            graph.place(self.region.head.eqn)
            results = [
                graph.emit(p.concatenate_p, *pair, dimension=0)
                for pair in zip(results, ends, strict=True)
            ]
        for var, total in zip(self.sums, sums, strict=True):
            self._stand_for(var, total)
        for (var, span), result in zip(self.results, results, strict=True):
            placed = _transposed(result, _back(shape_of(result), span), graph)
            self._stand_for(var, graph.reshape(placed, shape_of(var)))

    def _stand_for(self, var: Var, atom: Atom) -> None:
        aval: Any = var.aval
        value = self.graph.convert(atom, aval.dtype)
        if aval.weak_type and var in self.region.program.outputs:
            params = {"new_dtype": aval.dtype, "weak_type": True, "sharding": None}
            value = self.graph.emit(p.convert_element_type_p, value, **params)
        self.graph.env[var] = value

    def _front(self, atom: Atom, span: Span) -> Atom:
        """A value with its rows as the first axis."""
        shape = merged(shape_of(atom), span, self.region.head.rows)
        value = self.graph.reshape(atom, shape)
        return _transposed(value, _to_front(shape, span), self.graph)

    def _part(self, atom: Atom, start: int, end: int | None) -> Atom:
        """Some rows of a value that has them in front."""
        shape = shape_of(atom)
        end = shape[0] if end is None else end
        if (start, end) == (0, shape[0]):
            return atom
        starts = (start, *(0 for _ in shape[1:]))
        limits = (end, *shape[1:])
        return self.graph.emit(
            p.slice_p, atom, start_indices=starts, limit_indices=limits, strides=None
        )

    def _scan(
        self, wholes: Sequence[Atom], sums: Sequence[Atom], leaves: Sequence[Atom]
    ) -> tuple[list[Atom], list[Atom]]:
        """The sums and, with rows in front, the results of the whole chunks."""
        graph, source = self.graph, self.region.head.eqn
        inputs: list[Atom] = []
        for leaf in leaves:
            part = self._part(leaf, 0, self.count * self.chunk)
            inputs.append(graph.reshape(part, (self.count, self.chunk, *shape_of(part)[1:])))
        known = {var: Var(atom.aval) for var, atom in zip(self.wholes, wholes, strict=True)}
        carry = [Var(atom.aval) for atom in sums]
        rows = [Var(_like(a, shape_of(a)[1:])) for a in inputs]
        body = Graph(_jaxpr.make([], [], []), {})
        new_sums, results = self._chunk(body, known, carry, rows, self.chunk)
        jaxpr = _jaxpr.make([*known.values(), *carry, *rows], [*new_sums, *results], body.eqns)
        outvars = [
            *(Var(atom.aval) for atom in sums),
            *(Var(_like(a, (self.count, *shape_of(a)))) for a in results),
        ]
        loop = _template()
        loop = loop.replace(
            params={**loop.params, "length": self.count},
            source_info=source.source_info,
            ctx=source.ctx,
        )
        counts = (len(wholes), len(sums), len(inputs))
        operands = [*wholes, *sums, *inputs]
        graph.add(internals.scan_like(loop, jaxpr, operands, counts, outvars))
        flat: list[Atom] = [
            graph.reshape(v, (self.count * self.chunk, *shape_of(v)[2:]))
            for v in outvars[len(sums) :]
        ]
        return list(outvars[: len(sums)]), flat

    def _chunk(
        self,
        graph: Graph,
        wholes: Mapping[Var, Atom],
        sums: Sequence[Atom],
        leaves: Sequence[Atom],
        rows: int,
    ) -> tuple[list[Atom], list[Atom]]:
        """Adds the region's equations on some rows.

        Args:
          graph: where.
          wholes: what stands for what is read as a whole.
          sums: of the rows before.
          leaves: these rows of what is read by rows, in front.
          rows: how many.

        Returns:
          The sums, and these rows of the results, in front.
        """
        region = self.region
        graph.place(region.head.eqn)
        values: dict[tuple[Var, Span | None], Atom] = {(v, None): a for v, a in wholes.items()}
        for (var, place), leaf in zip(self.leaves, leaves, strict=True):
            values[var, place] = _transposed(leaf, _back(shape_of(leaf), place), graph)
        totals = dict(zip(region.sums, sums, strict=True))
        for at in region.inside:
            eqn, spans, span = self.eqns[at], region.spans[at], region.results.get(at)
            graph.place(eqn)
            operands = [
                atom if isinstance(atom, Literal) else values[atom, where]
                for atom, where in zip(eqn.invars, spans, strict=True)
            ]
            if span is None:
                totals[at] = _added(totals[at], eqn, spans, operands, graph)
                continue
            rule = RULES[eqn.primitive]
            for index, where in enumerate(spans):
                if where is None:
                    placed = rule.placed(eqn, index, span)
                    operands[index] = graph.reshape(operands[index], placed)
            call = rule.call(eqn, spans, span, rows)
            outvars = [Var(_like(v, merged(shape_of(v), span, rows))) for v in eqn.outvars]
            _emit(graph, eqn, call, operands, outvars)
            values.update({(v, span): new for v, new in zip(eqn.outvars, outvars, strict=True)})
        graph.place(region.head.eqn)
        results = [
            _transposed(
                values[var, place], _to_front(merged(shape_of(var), place, 1), place), graph
            )
            for var, place in self.results
        ]
        return [totals[at] for at in region.sums], results


def _added(
    total: Atom,
    eqn: JaxprEqn,
    spans: Sequence[Span | None],
    operands: Sequence[Atom],
    graph: Graph,
) -> Atom:
    """A sum over rows, with that of more rows added."""
    dtype = accumulator(eqn.outvars[0])
    call, made = closing_call(eqn, spans, dtype)
    if eqn.primitive is p.reduce_sum_p:
        operands = [graph.convert(atom, dtype) for atom in operands]
    out = Var(_like(eqn.outvars[0], shape_of(eqn.outvars[0]), made))
    _emit(graph, eqn, call, operands, [out])
    return graph.emit(p.add_p, total, graph.convert(out, dtype))


def _emit(
    graph: Graph, eqn: JaxprEqn, call: Call, operands: Sequence[Atom], outvars: Sequence[Var]
) -> None:
    primitive, params = call
    graph.add(
        eqn.replace(
            primitive=primitive, params=params, invars=list(operands), outvars=list(outvars)
        )
    )


def _zeros(var: Var, graph: Graph) -> Atom:
    """Zeros in the type in which a value is added up."""
    like = Var(_like(var, (), accumulator(var)))
    zero = number(0.0, like, graph)
    if not shape_of(var):
        return zero
    return graph.broadcast(zero, shape_of(var), ())


def _like(atom: Atom, shape: Sequence[int], dtype: Any = None) -> Any:
    """The type of an atom, with another shape and, perhaps, another dtype."""
    aval: Any = atom.aval
    return internals.array_like(aval, tuple(shape), aval.dtype if dtype is None else dtype)


def _to_front(shape: Sequence[int], span: Span) -> tuple[int, ...]:
    """The permutation that brings rows, one axis, to the front."""
    return span[0], *(axis for axis in range(len(shape)) if axis != span[0])


def _back(shape: Sequence[int], span: Span) -> tuple[int, ...]:
    """The permutation that brings rows from the front to their place."""
    first = span[0]
    return (*range(1, first + 1), 0, *range(first + 1, len(shape)))


def _transposed(atom: Atom, permutation: Sequence[int], graph: Graph) -> Atom:
    if list(permutation) == sorted(permutation):
        return atom
    return graph.emit(p.transpose_p, atom, permutation=tuple(permutation))


@functools.cache
def _template() -> JaxprEqn:
    """A ``scan``."""

    def loop(x: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, part: (carry, part), jnp.float32(0), x)

    jaxpr = jax.make_jaxpr(loop)(jax.ShapeDtypeStruct((1,), np.dtype("float32")))
    return next(eqn for eqn in jaxpr.eqns if eqn.primitive is p.scan_p)
