"""Rewriting by rules: one walk in program order, in which each equation meets its primitive's
rules.

A rule looks at an equation and at what its operands were computed by, and returns what stands for
the result, or None. Operands come before their readers, so they are in their final form when a
rule sees them, and equations that a rule emits go through the rules themselves before anything
reads them: one walk ends at the fixed point, in time linear in the number of equations, as long as
each rule looks at a bounded neighbourhood and makes its equation simpler. Nothing is ever removed
here; what has lost its readers is left to dead-code elimination.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.core import ShapedArray
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Literal, Primitive, Var, new_jaxpr_eqn
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import Atom
from jevt.passes._knowledge import Knowledge
from jevt.passes._rewrite import barrier, map_bodies, once, read, rebuild, substitute

type Rule = Callable[[JaxprEqn, Graph], Atom | None]
type Rules = Mapping[Primitive, Sequence[Rule]]


class Abandon(Exception):
    """A rule finds midway that it does not apply; what it has emitted is dropped."""


def merged(*tables: Rules) -> dict[Primitive, tuple[Rule, ...]]:
    """One table of several; rules of earlier tables are tried first."""
    result: dict[Primitive, tuple[Rule, ...]] = {}
    for table in tables:
        for primitive, rules in table.items():
            result[primitive] = (*result.get(primitive, ()), *rules)
    return result


def rewrite(jaxpr: Jaxpr, rules: Rules) -> Jaxpr:
    """Applies ``rules`` to ``jaxpr`` and, each within itself, to its bodies."""
    body = once(lambda inner: _rewrite(inner, rules, body))
    return _rewrite(jaxpr, rules, body)


def _rewrite(jaxpr: Jaxpr, rules: Rules, body: Callable[[Jaxpr], Jaxpr]) -> Jaxpr:
    graph = Graph(jaxpr, rules)
    for eqn in jaxpr.eqns:
        graph.add(map_bodies(substitute(graph.env, eqn), body))
    return rebuild(jaxpr, graph.eqns, graph.env)


class Graph(Knowledge):
    """What a rule may ask and do: the equations so far.

    Attributes:
      eqns: the equations of the result, in order.
      env: variables of the original that something else stands for.
    """

    def __init__(self, jaxpr: Jaxpr, rules: Rules) -> None:
        super().__init__()
        self.eqns: list[JaxprEqn] = []
        self.env: dict[Var, Atom] = {}
        self._rules = rules
        self._outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
        self._readers = _count_readers(jaxpr)
        self._source: JaxprEqn | None = None  # gives emitted equations their place and settings

    # Asking, beside what is known of values

    def is_output(self, var: Var) -> bool:
        return var in self._outputs

    def readers(self, atom: Atom) -> int:
        """Number of operands and outputs that a variable of the original is; 1 for a new one."""
        return self._readers.get(atom, 1) if isinstance(atom, Var) else 0

    # Doing

    def emit(self, primitive: Primitive, *operands: Atom, **params: Any) -> Atom:
        """The result of a new equation in place of the one being rewritten.

        Raises:
          Abandon: the operands differ in the mesh axes over which they vary.
        """
        source = self.source
        check_same_mesh(operands)
        avals: list[Any] = [a.aval for a in operands]
        inside_mesh = any(not aval.sharding.mesh.empty for aval in avals)
        with contextlib.ExitStack() as stack:
            if inside_mesh:
                stack.enter_context(source.ctx.manager)
            if any(map(internals.manual_axes_of, avals)):
                stack.enter_context(internals.keeping_manual_axes())
            aval, effects = primitive.abstract_eval(*avals, **params)
        assert not effects
        out = Var(aval)
        eqn = new_jaxpr_eqn(
            list(operands), [out], primitive, params, set(), source.source_info, source.ctx
        )
        self.add(eqn)
        return read(self.env, out)

    def place(self, source: JaxprEqn) -> None:
        """Gives equations that are emitted outside of a rule the place and settings of another."""
        self._source = source

    @property
    def source(self) -> JaxprEqn:
        """The equation whose place and settings emitted ones have."""
        assert self._source is not None
        return self._source

    def literal(self, value: object, like: Any) -> Literal:
        """A scalar literal of the dtype of the aval ``like``."""
        dtype = np.dtype(like.dtype)
        return Literal(np.asarray(value, dtype)[()], ShapedArray((), dtype))

    def mul(self, x: Atom, y: Atom) -> Atom:
        return self.emit(p.mul_p, x, y, out_dtype=None)

    def full(self, value: Literal, shape: Sequence[int]) -> Atom:
        """An array of one number."""
        if not shape:
            return value
        return self.emit(
            p.broadcast_in_dim_p, value, shape=tuple(shape), broadcast_dimensions=(), sharding=None
        )

    def reshape(self, atom: Atom, shape: Sequence[int]) -> Atom:
        aval: Any = atom.aval
        if aval.shape == tuple(shape):
            return atom
        return self.emit(p.reshape_p, atom, new_sizes=tuple(shape), dimensions=None, sharding=None)

    def convert(self, atom: Atom, dtype: Any) -> Atom:
        """``atom`` in a type."""
        aval: Any = atom.aval
        if aval.dtype == dtype:
            return atom
        return self.emit(
            p.convert_element_type_p,
            atom,
            new_dtype=np.dtype(dtype),
            weak_type=False,
            sharding=None,
        )

    def dot_general(
        self,
        lhs: Atom,
        rhs: Atom,
        contracted: Sequence[Sequence[int]],
        dtype: Any,
        precision: Any,
    ) -> Atom:
        """A product without batch axes, whose result is of ``dtype``."""
        left, right = map(tuple, contracted)
        return self.emit(
            p.dot_general_p,
            lhs,
            rhs,
            dimension_numbers=((left, right), ((), ())),
            precision=precision,
            preferred_element_type=np.dtype(dtype),
            out_sharding=None,
        )

    def broadcast(self, atom: Atom, shape: Sequence[int], dimensions: Sequence[int]) -> Atom:
        """``atom``, whose axis i becomes axis ``dimensions[i]`` of an array of this shape."""
        return self.emit(
            p.broadcast_in_dim_p,
            atom,
            shape=tuple(shape),
            broadcast_dimensions=tuple(dimensions),
            sharding=None,
        )

    def barrier(self, atom: Atom) -> Atom:
        """The same value; XLA does not look through to what computes it."""
        eqn = barrier([atom], self.source)
        self.add(eqn)
        return eqn.outvars[0]

    def add(self, eqn: JaxprEqn) -> None:
        """Appends the equation, or what its rules make of it."""
        rules = self._rules.get(eqn.primitive, ())
        if _is_mixed(eqn):
            self.eqns.append(eqn)
            return
        if rules and len(eqn.outvars) == 1 and not isinstance(eqn.outvars[0], DropVar):
            outer, self._source = self._source, eqn
            for rule in rules:
                if self._try(rule, eqn):
                    self._source = outer
                    return
            self._source = outer
        self.eqns.append(eqn)
        if len(eqn.outvars) == 1:
            self.note(eqn)

    def _try(self, rule: Rule, eqn: JaxprEqn) -> bool:
        mark = len(self.eqns)
        out = eqn.outvars[0]
        try:
            result = rule(eqn, self)
        except Abandon:
            result = None
        if result is None or not self._may_replace(out, result):
            for dropped in self.eqns[mark:]:
                self.forget(dropped)
            del self.eqns[mark:]
            return False
        self.env[out] = result
        return True

    def _may_replace(self, out: Var, result: Atom) -> bool:
        want: Any = out.aval
        have: Any = result.aval
        if want == have:
            return True
        # A weak type matters to whoever traces on, that is, at the border only.
        return not self.is_output(out) and want.strip_weak_type() == have.strip_weak_type()


def check_same_mesh(operands: Sequence[Atom]) -> None:
    """Raises :class:`Abandon` for operands that one equation does not take together."""
    if not on_same_mesh(operands):
        raise Abandon


def on_same_mesh(operands: Sequence[Atom]) -> bool:
    """Whether one equation takes operands together that is not the user's.

    Under automatic or explicit sharding, and between values that vary over different axes of a
    ``shard_map``, an equation that is not the user's may need casts or shardings that only JAX's
    own functions choose.
    """
    meshes = {_mesh(a.aval) for a in operands}
    return len(meshes) <= 1 and all(is_empty for _, is_empty in meshes)


def _mesh(aval: Any) -> tuple[frozenset[Any], bool]:
    varying = internals.manual_axes_of(aval)
    spec = getattr(aval.sharding, "spec", ())
    return varying, all(entry is None for entry in spec)


def _is_mixed(eqn: JaxprEqn) -> bool:
    # A product whose result has a type of its own is not what the rules know as a product.
    return eqn.params.get("out_dtype") is not None


def _count_readers(jaxpr: Jaxpr) -> dict[Var, int]:
    counts: dict[Var, int] = {}
    for eqn in jaxpr.eqns:
        for atom in eqn.invars:
            if isinstance(atom, Var):
                counts[atom] = counts.get(atom, 0) + 1
    for atom in jaxpr.outvars:
        if isinstance(atom, Var):
            counts[atom] = counts.get(atom, 0) + 1
    return counts
