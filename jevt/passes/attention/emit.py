"""A recognised attention as two equations, and what makes their operands."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Primitive, Var, new_jaxpr_eqn
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.lowering.axes import Factor
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph, check_same_mesh
from jevt.passes.attention.arrange import Arrangement, size
from jevt.passes.attention.labels import Use
from jevt.passes.attention.match import Match
from jevt.passes.attention.roles import Part
from jevt.primitives.attention import LOWEST, MASKED, attention_backward_p, attention_p


class Emitter:
    """Writes the forward equation and, later in the program, the backward one.

    Args:
      match: the attention.
      how: the layout of its operands.
      graph: where it is written.
      capability: compute capability of the GPU, 90 for sm_90; 0 where it is all cuDNN's.
    """

    def __init__(self, match: Match, how: Arrangement, graph: Graph, capability: int) -> None:
        self.match = match
        self.how = how
        self.graph = graph
        self.operands: list[Atom] = []
        self.blind: tuple[Atom, list[Factor]] | None = None
        self.results: list[Atom] = []
        self.params = {
            "scale": match.scale,
            "causal": bool(match.causal),
            "layout": how.layout,
        }
        self.capability = capability

    def forward(self) -> None:
        """``out, statistics = attention q k v [bias]``."""
        roles, how = self.match.roles, self.how
        source = self.match.region.program.eqns[self.match.region.score]
        self.graph.place(source)
        self.operands = [
            self._operand(roles.q, how.of_queries(how.width)),
            self._operand(roles.k, how.of_keys(how.width)),
            self._operand(roles.v, how.of_keys(how.value_width)),
            *self._bias(),
        ]
        self.results = self._equation(attention_p, self.operands, self.params, source)
        out = self.results[0]
        if self.match.may_be_blind:
            self.blind = self._blind()
            out = self._mean_where_blind(out, self.operands[2])
        self._result("out", out, how.of_queries(how.value_width))

    def backward(self) -> None:
        """``d_q, d_k, d_v = attention_backward q k v [bias] out statistics d_out``."""
        roles, how = self.match.roles, self.how
        assert roles.d_out is not None
        first = min(position for part, position in roles.results.items() if part != "out")
        source = self.match.region.program.eqns[first]
        self.graph.place(source)
        d_out = self._operand(roles.d_out, how.of_queries(how.value_width))
        out, statistics = self.results
        if self.blind is not None:
            statistics = self._zero_where_blind(statistics)
        operands = [*self.operands, out, statistics, d_out]
        params = self.params | {"capability": self.capability}
        d_q, d_k, d_v = self._equation(attention_backward_p, operands, params, source)
        if self.blind is not None and "d_v" in roles.results:
            aval: Any = d_v.aval
            d_v = self.graph.emit(
                p.add_p, d_v, self.graph.convert(self._through_means(d_out), aval.dtype)
            )
        self._result("d_q", d_q, how.of_queries(how.width))
        self._result("d_k", d_k, how.of_keys(how.width))
        self._result("d_v", d_v, how.of_keys(how.value_width))

    def _equation(
        self,
        primitive: Primitive,
        operands: Sequence[Atom],
        params: dict[str, Any],
        source: JaxprEqn,
    ) -> list[Atom]:
        check_same_mesh(operands)
        avals: list[Any] = [a.aval for a in operands]
        inside_mesh = any(not aval.sharding.mesh.empty for aval in avals)
        with source.ctx.manager if inside_mesh else contextlib.nullcontext():
            types, _ = primitive.abstract_eval(*avals, **params)
        return self._append(primitive, operands, types, dict(params))

    def _append(
        self,
        primitive: Primitive,
        operands: Sequence[Atom],
        types: Sequence[Any],
        params: dict[str, Any],
    ) -> list[Atom]:
        source = self.graph.source
        results = [Var(aval) for aval in types]
        self.graph.add(
            new_jaxpr_eqn(
                list(operands), results, primitive, params, set(), source.source_info, source.ctx
            )
        )
        return list(results)

    def _operand(self, use: Use, axes: Sequence[Sequence[Factor]]) -> Atom:
        array = self._moved(read(self.graph.env, use.root), use.atoms(), axes)
        return self.graph.reshape(array, [size(axis) for axis in axes])

    def _moved(self, array: Atom, have: Sequence[Factor], axes: Sequence[Sequence[Factor]]) -> Atom:
        """An array with one axis a name, in the order of ``axes``; unchanged if it has that."""
        want = [name for axis in axes for name in axis]
        if list(have) == want:
            return array
        array = self.graph.reshape(array, [name.size for name in have])
        permutation = tuple(list(have).index(name) for name in want)
        return self.graph.emit(p.transpose_p, array, permutation=permutation)

    def _result(self, part: Part, value: Atom, axes: Sequence[Sequence[Factor]]) -> None:
        """Puts a result in the place of the product that gave it, and of its transpositions."""
        have = [name for axis in axes for name in axis]
        for position in self.match.replaced(part):
            (out,) = self.match.region.program.eqns[position].outvars
            moved = self._moved(value, have, [self.match.labels.of(out)])
            moved = self.graph.reshape(moved, shape_of(out))
            like: Any = out.aval
            self.graph.env[out] = self.graph.convert(moved, like.dtype)

    def _bias(self) -> list[Atom]:
        """What is added to the scores, as one array ``[1 or B, 1 or N, T, S]`` of q's type."""
        match, how, graph = self.match, self.how, self.graph
        names = {name for value in match.added() for name in match.labels.of(value)}
        if not match.added():
            return []
        batch = how.batch if names.intersection(how.batch) else ()
        heads = (*how.heads, *how.groups)
        heads = heads if names.intersection(heads) else ()
        axes = (batch, heads, how.queries, how.keys)
        q_type: Any = self.operands_type()
        lowest = MASKED.get(np.dtype(q_type.dtype).name, -1e30)
        order = [name for axis in axes for name in axis]
        total: Atom | None = None
        for factor, value in match.biases:
            bias = self._spread(value, order)
            if factor != 1.0:
                bias = graph.mul(bias, self._full(factor, bias))
            total = bias if total is None else graph.emit(p.add_p, total, bias)
        if total is not None:
            total = graph.emit(p.max_p, total, self._full(LOWEST, total))
            total = self.graph.convert(total, q_type.dtype)
        mask = self._mask(order)
        if mask is not None:
            low = self._full(lowest, mask, q_type)
            open_ = self._full(0, mask, q_type) if total is None else total
            total = graph.emit(p.select_n_p, mask, low, open_)
        assert total is not None
        return [graph.reshape(total, [size(axis) for axis in axes])]

    def _mask(self, names: Sequence[Factor]) -> Atom | None:
        """Whether a key is seen, without the causal mask, with one axis a name."""
        mask: Atom | None = None
        for value, seen in self.match.masks:
            part = self._spread(value, names)
            part = part if seen else self.graph.emit(p.not_p, part)
            mask = part if mask is None else self.graph.emit(p.and_p, mask, part)
        return mask

    def _blind(self) -> tuple[Atom, list[Factor]]:
        """Whether a query sees no key, and the names of its axes."""
        graph, how = self.graph, self.how
        named = {name for value, _ in self.match.masks for name in self.match.labels.of(value)}
        if self.match.causal:
            named |= {*how.queries, *how.keys}
        names = [*how.batch, *how.heads, *how.groups, *how.queries, *how.keys]
        names = [name for name in names if name in named]
        sees = self._mask(names)
        assert sees is not None
        if self.match.causal:
            sees = graph.emit(p.and_p, sees, self._up_to(names, sees))
        keys = tuple(i for i, name in enumerate(names) if name in how.keys)
        if keys:
            sees = graph.emit(p.reduce_or_p, sees, axes=keys)
        return graph.emit(p.not_p, sees), [name for name in names if name not in how.keys]

    def _up_to(self, names: Sequence[Factor], like: Atom) -> Atom:
        """The causal mask, with one axis a name."""
        kinds = (self.how.queries, self.how.keys)
        shape = [size(kind) for kind in kinds]
        t, s = (
            self.graph.emit(
                p.iota_p, dtype=np.dtype("int32"), shape=tuple(shape), dimension=i, sharding=None
            )
            for i in (0, 1)
        )
        order = [name for kind in kinds for name in kind]
        mask = self.graph.reshape(self.graph.emit(p.ge_p, t, s), [name.size for name in order])
        return self._like(self._repeated(mask, order, names), like)

    def _mean_where_blind(self, out: Atom, v: Atom) -> Atom:
        """out, but the mean of all values where a query sees none.

        The kernel gives anything finite there: it leaves out what its own causal mask hides, and
        does not see equal scores beneath what a mask adds.
        """
        how = self.how
        axes = how.of_queries(how.value_width)
        mean = self._mean(v, how.of_keys(how.value_width), how.keys, axes)
        aval: Any = out.aval
        return self.graph.emit(
            p.select_n_p, self._blind_like(out), out, self.graph.convert(mean, aval.dtype)
        )

    def _blind_like(self, array: Atom) -> Atom:
        """Whether a query sees no key, repeated to an array like out."""
        assert self.blind is not None
        axes = self.how.of_queries(self.how.value_width)
        order = [name for axis in axes for name in axis]
        return self.graph.reshape(self._repeated(*self.blind, order), shape_of(array))

    def _mean(
        self,
        array: Atom,
        have: Sequence[Sequence[Factor]],
        gone: Sequence[Factor],
        want: Sequence[Sequence[Factor]],
    ) -> Atom:
        """The sum over ``gone`` by the number of keys, in float32, repeated to axes ``want``."""
        names = [name for axis in have for name in axis]
        aval: Any = array.aval
        wide = aval.update(dtype=np.promote_types(aval.dtype, np.float32))
        total = self.graph.reshape(
            self.graph.convert(array, wide.dtype), [name.size for name in names]
        )
        axes = tuple(i for i, name in enumerate(names) if name in gone)
        total = self.graph.emit(p.reduce_sum_p, total, axes=axes, out_sharding=None)
        total = self.graph.mul(total, self._full(1 / size(self.how.keys), total))
        kept = [name for name in names if name not in gone]
        total = self._repeated(total, kept, [name for axis in want for name in axis])
        return self.graph.reshape(total, [size(axis) for axis in want])

    def _zero_where_blind(self, statistics: Atom) -> Atom:
        """The statistics ``[B, N, T]``, but 0 for queries that see no key: they get no weights.

        Their own logarithms are about as large as what a mask adds, and as coarse: the difference
        of the two can be any power's exponent.
        """
        assert self.blind is not None
        how = self.how
        order = [*how.batch, *how.heads, *how.groups, *how.queries]
        mask = self.graph.reshape(self._repeated(*self.blind, order), shape_of(statistics))
        return self.graph.emit(p.select_n_p, mask, statistics, self._full(0, statistics))

    def _through_means(self, d_out: Atom) -> Atom:
        """What queries that see no key, whose out is the mean of the values, give to d_v."""
        how = self.how
        nothing = self._full(0, d_out)
        lost = self.graph.emit(p.select_n_p, self._blind_like(d_out), nothing, d_out)
        axes = how.of_queries(how.value_width)
        return self._mean(lost, axes, (*how.queries, *how.groups), how.of_keys(how.value_width))

    def operands_type(self) -> Any:
        """The type of q."""
        return self.match.roles.q.root.aval

    def _spread(self, value: Var, names: Sequence[Factor]) -> Atom:
        """A value with one axis a name, repeated along those that it lacks."""
        have = self.match.labels.of(value)
        array = self._like(read(self.graph.env, value), self.match.roles.q.root)
        array = self.graph.reshape(array, [name.size for name in have])
        return self._repeated(array, have, names)

    def _repeated(self, array: Atom, have: Sequence[Factor], names: Sequence[Factor]) -> Atom:
        """An array of axes ``have`` with axes ``names``."""
        own = [name for name in names if name in have]
        if own != list(have):
            array = self._moved(array, have, [own])
        places = [names.index(name) for name in own]
        shape = [name.size for name in names]
        return array if own == list(names) else self.graph.broadcast(array, shape, places)

    def _full(self, value: float, like: Atom, dtype: Any = None) -> Atom:
        """A number as an array like another, of its own type or that of the aval ``dtype``."""
        number = self.graph.literal(value, like.aval if dtype is None else dtype)
        return self._like(self.graph.full(number, shape_of(like)), like)

    def _like(self, array: Atom, like: Atom) -> Atom:
        """An array that varies over the mesh axes over which ``like`` varies."""
        missing = internals.manual_axes_of(like.aval) - internals.manual_axes_of(array.aval)
        if not missing:
            return array
        aval: Any = array.aval
        varying = internals.array_like(like.aval, aval.shape, aval.dtype)
        params = {"axes": tuple(sorted(missing))}
        return self._append(internals.pvary_p, [array], [varying], params)[0]
