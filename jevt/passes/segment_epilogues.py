"""Pointwise work on a sum of segments becomes part of its kernel. For CUDA.

Purpose: a graph convolution adds its own rows to the sum, or a bias, and applies an activation. As
a kernel of its own that reads the sum again, which the sum's kernel had on chip.

Invariant: the same values, but that the sum is not rounded before it is used. What is taken in are
pointwise equations on arrays of the sum's shape, each of whose other operands is a number or an
array that does not depend on the sum, perhaps broadcast along rows or columns. Results that others
read are stored, at most ``MAX_RESULTS``. The kernel runs where the last of its operands is made.

    before  { lambda ; a:i32[10] b:i32[2,0] c:i32[50] d:f32[9,4]. let
                e:f32[9,4] = segment_sum a b c d; f:f32[9,4] = add e d
                g:f32[9,4] = max f 0.0 in (g,) }
    after   { lambda ; a:i32[10] b:i32[2,0] c:i32[50] d:f32[9,4]. let
                g:f32[9,4] = fused_segment_sum[epilogue={ lambda ; e:f32[9,4] d:f32[9,4]. let
                    f:f32[9,4] = add e d; g:f32[9,4] = max f 0.0 in (g,) }] a b c d d
              in (g,) }
"""

from __future__ import annotations

import dataclasses

from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Literal, Var

from jevt import _jaxpr
from jevt._jaxpr import Atom
from jevt.lowering import rules
from jevt.lowering.errors import NotFusible
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import map_bodies, once, rebuild
from jevt.primitives.segment_epilogue import Epilogue, along, obstacle
from jevt.primitives.segments import fused_segment_sum_p, segment_sum_p

#: Most results: of an activation, and what its gradient needs of it.
MAX_RESULTS = 2

#: Most equations of an epilogue.
MAX_EQUATIONS = 16


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Attaches epilogues to the sums of ``jaxpr`` and of its bodies."""
    body = once(run)
    eqns = [map_bodies(eqn, body) for eqn in jaxpr.eqns]
    program = _Program(jaxpr, eqns)
    for position, eqn in enumerate(eqns):
        if eqn.primitive is segment_sum_p:
            program.fuse(position)
    result: list[JaxprEqn] = []
    for i, eqn in enumerate(eqns):
        result += [] if i in program.moved else [eqn]
        result += program.inserted.get(i, ())
    return rebuild(jaxpr, result, {})


@dataclasses.dataclass
class _Group:
    """A sum's epilogue while it grows.

    Attributes:
      values: the sum and what is computed from it.
      equations: positions of the equations taken in.
      extras: what else they read.
      views: broadcasts of extras, which are repeated inside.
    """

    values: dict[Var, None]
    equations: list[int]
    extras: dict[Var, None]
    views: dict[Var, JaxprEqn]


class _Program:
    """Equations, where variables are made, and who reads them.

    Attributes:
      inserted: new equations, by the position after which they come.
      moved: for equations that have become part of another, that one's place.
      views: the equations that are views of a row, a column or a number, by their results.
    """

    def __init__(self, jaxpr: Jaxpr, eqns: list[JaxprEqn]) -> None:
        self.eqns = eqns
        self.inserted: dict[int, list[JaxprEqn]] = {}
        self.moved: dict[int, int] = {}
        self.made = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
        self.views = {eqn.outvars[0]: eqn for eqn in eqns if along(eqn) is not None}
        self.outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
        self.readers: dict[Var, list[int]] = {}
        for i, eqn in enumerate(eqns):
            for atom in eqn.invars:
                if isinstance(atom, Var):
                    self.readers.setdefault(atom, []).append(i)

    def fuse(self, position: int) -> None:
        """Replaces the sum at ``position`` and its epilogue, if it has one."""
        total = self.eqns[position].outvars[0]
        group = _Group({total: None}, [], {}, {})
        todo = sorted(set(self.readers.get(total, ())))
        best: list[int] = []
        while todo and len(group.equations) < MAX_EQUATIONS:
            at = todo.pop(0)
            if at in self.moved or at in group.equations or not self._take(at, group):
                continue
            found = {r for v in self.eqns[at].outvars for r in self.readers.get(v, ())}
            todo = sorted({*todo, *found})
            if self._place(position, group) is not None:
                best = list(group.equations)
        if not best:
            return
        group = _Group({total: None}, [], {}, {})  # the longest one that is possible
        for at in best:
            self._take(at, group)
        place = self._place(position, group)
        fused = self._fused(position, group)
        if place is None or fused is None:
            return
        self.inserted.setdefault(place, []).append(fused)
        self.moved.update(dict.fromkeys((position, *group.equations), place))
        self.made.update(dict.fromkeys(fused.outvars, place))

    def _place(self, position: int, group: _Group) -> int | None:
        """After which equation the kernel can run; None if nowhere, or with too many results."""
        results = self._results(group)
        if not 0 < len(results) <= MAX_RESULTS:
            return None
        place = max((position, *(self.made.get(v, -1) for v in group.extras)))
        inside = {position, *group.equations}
        readers = (r for v in results for r in self.readers.get(v, ()) if r not in inside)
        # What depends on the sum in a way that is not part of the group is one of these.
        return place if all(self.moved.get(r, r) > place for r in readers) else None

    def _take(self, at: int, group: _Group) -> bool:
        """Takes an equation in if it is pointwise work on what there is."""
        eqn = self.eqns[at]
        shape = shape_of(next(iter(group.values)))
        if any(isinstance(v, DropVar) or shape_of(v) != shape for v in eqn.outvars):
            return False
        try:
            if rules.classify(eqn).kind != "pointwise":
                return False
        except NotFusible:
            return False
        extras: list[Var] = []
        views: list[JaxprEqn] = []
        for atom in eqn.invars:
            if isinstance(atom, Literal) or atom in group.values:
                continue
            source = self._source(atom, shape)
            if source is None or source in group.values:
                return False
            extras.append(source)
            if source is not atom:
                views.append(self.views[atom])
        group.equations.append(at)
        group.values.update(dict.fromkeys(eqn.outvars))
        group.extras.update(dict.fromkeys(extras))
        group.views.update({view.outvars[0]: view for view in views})
        return True

    def _source(self, atom: Var, shape: tuple[int, ...]) -> Var | None:
        """The array that an operand is, or that it is a broadcast of."""
        own = shape_of(atom)
        fits = not own or own in (shape, (1, shape[1]), (shape[0], 1), (1, 1))
        if not fits:
            return None
        view = self.views.get(atom)
        inner = view.invars[0] if view is not None else atom
        return inner if isinstance(inner, Var) else atom

    def _results(self, group: _Group) -> list[Var]:
        """What others read of a group's values."""
        inside = set(group.equations)
        return [
            v
            for v in group.values
            if v in self.outputs or any(r not in inside for r in self.readers.get(v, ()))
        ]

    def _fused(self, position: int, group: _Group) -> JaxprEqn | None:
        eqn = self.eqns[position]
        (total,) = eqn.outvars
        results = self._results(group)
        env: dict[Var, Var] = {}

        def inner(var: Var) -> Var:
            return env.setdefault(var, Var(var.aval))

        def operand(atom: Atom) -> Atom:
            return inner(atom) if isinstance(atom, Var) else atom

        positions = sorted(group.equations)
        inside = [*group.views.values(), *(self.eqns[i] for i in positions)]
        invars = [inner(total), *(inner(v) for v in group.extras)]
        equations = [
            e.replace(invars=[operand(a) for a in e.invars], outvars=[inner(v) for v in e.outvars])
            for e in inside
        ]
        epilogue = _jaxpr.make(invars, [inner(v) for v in results], equations)
        types = [a.aval for a in eqn.invars]
        params = {key: eqn.params[key] for key in ("dtype", "fills")}
        if obstacle(types, epilogue, **params):
            return None
        return eqn.replace(
            primitive=fused_segment_sum_p,
            invars=[*eqn.invars, *group.extras],
            outvars=results,
            params={**eqn.params, "epilogue": Epilogue.of(epilogue)},
        )
