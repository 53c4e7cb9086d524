"""Loops over layers: a step forward and the same step backward as one program, and back.

Differentiating a ``scan`` gives two. The first leaves at every step what the second reads at that
step, among it scores and probabilities. Here one step of both is put together, so that an attention
is seen as a whole, and taken apart again: the second loop then reads what the new equations need.

    before  (out, e, p) = scan[{ … e = exp s; p = div e (sum e); o = p·v … in (o, e, p) }] …
            d_in        = scan[{ … d_s from e, p, d_out·vᵀ … }, reverse] … e p
    after   (out, q, o, l) = scan[{ … (o, l) = attention q k v … in (o, q, o, l) }] …
            d_in           = scan[{ … attention_backward q k v o l d_out … }, reverse] … q o l

What the second loop computes from no array that changes from step to step is computed there again,
rather than kept for every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt import _jaxpr
from jevt._jaxpr import Atom
from jevt.passes import cse
from jevt.passes._rewrite import read
from jevt.passes.attention.region import Program
from jevt.passes.fold_constants import FOLDABLE

#: Longest computation that the second loop repeats.
MAX_EQUATIONS = 16


@dataclasses.dataclass(frozen=True)
class Joint:
    """One step of two loops.

    Attributes:
      first, second: their positions.
      jaxpr: the step: inputs of the first body, then those of the second that it does not leave;
        results of the first that somebody else reads, then those of the second.
      length: number of equations of the first body, which stand before the others.
      kept: positions of the first body's results that are among the results.
      own: positions of the second body's inputs that are among the inputs.
    """

    first: int
    second: int
    jaxpr: Jaxpr
    length: int
    kept: tuple[int, ...]
    own: tuple[int, ...]


def joints(program: Program) -> Iterator[Joint]:
    """The pairs of loops of a program that can be put together; no loop is in two."""
    taken: set[int] = set()
    for second, eqn in enumerate(program.eqns):
        if eqn.primitive is not p.scan_p:
            continue
        constants, carry, _ = internals.scan_operands(eqn)
        for operand in eqn.invars[constants + carry :]:
            first = program.maker.get(operand) if isinstance(operand, Var) else None
            if first is None or first in taken or second in taken:
                continue
            if _is_pair(program.eqns[first], eqn):
                taken |= {first, second}
                yield _join(program, first, second)


def _is_pair(first: JaxprEqn, second: JaxprEqn) -> bool:
    if first.primitive is not p.scan_p or first.effects or second.effects:
        return False
    if first.params["jaxpr"].consts or second.params["jaxpr"].consts:
        return False
    same: bool = first.params["length"] == second.params["length"]
    return same


def _join(program: Program, first: int, second: int) -> Joint:
    a, b = program.eqns[first], program.eqns[second]
    body_a: Jaxpr = a.params["jaxpr"]
    body_b: Jaxpr = b.params["jaxpr"]
    constants_a, carry_a, _ = internals.scan_operands(a)
    constants, carry, _ = internals.scan_operands(b)
    shared = {
        operand: inner
        for operand, inner in zip(a.invars[:constants_a], body_a.invars, strict=False)
        if isinstance(operand, Var)
    }
    left = dict(zip(a.outvars[carry_a:], body_a.outvars[carry_a:], strict=True))
    env: dict[Var, Atom] = {}
    own: list[int] = []
    for i, (operand, inner) in enumerate(zip(b.invars, body_b.invars, strict=True)):
        if i >= constants + carry and isinstance(operand, Var) and operand in left:
            env[inner] = left[operand]
        elif i < constants and isinstance(operand, Var) and operand in shared:
            env[inner] = shared[operand]
        else:
            env[inner] = Var(inner.aval)
            own.append(i)
    eqns = [*body_a.eqns, *_renamed(body_b.eqns, env)]
    kept = [
        i
        for i, var in enumerate(a.outvars)
        if i < carry_a
        or var in program.outputs
        or any(reader != second for reader in program.readers.get(var, ()))
    ]
    inputs = [v for i in own if isinstance(v := env[body_b.invars[i]], Var)]
    outputs = [*(body_a.outvars[i] for i in kept), *(read(env, v) for v in body_b.outvars)]
    made = {v for eqn in body_a.eqns for v in eqn.outvars}
    jaxpr = cse.run(_jaxpr.make([*body_a.invars, *inputs], outputs, eqns))
    length = sum(not made.isdisjoint(eqn.outvars) for eqn in jaxpr.eqns)
    return Joint(first, second, jaxpr, length, tuple(kept), tuple(own))


def _renamed(eqns: Sequence[JaxprEqn], env: dict[Var, Atom]) -> Iterator[JaxprEqn]:
    """Equations with operands from ``env`` and new results, which are added to it."""
    for eqn in eqns:
        outvars = [v if isinstance(v, DropVar) else Var(v.aval) for v in eqn.outvars]
        yield eqn.replace(invars=[read(env, v) for v in eqn.invars], outvars=outvars)
        env.update(zip(eqn.outvars, outvars, strict=True))


def split(program: Program, joint: Joint, jaxpr: Jaxpr, length: int) -> tuple[JaxprEqn, JaxprEqn]:
    """The two loops whose step is ``jaxpr``, the first ``length`` equations being the first's."""
    return _Split(program, joint, jaxpr, length).loops()


class _Split:
    """Taking a step apart."""

    def __init__(self, program: Program, joint: Joint, jaxpr: Jaxpr, length: int) -> None:
        self.a, self.b = program.eqns[joint.first], program.eqns[joint.second]
        self.joint = joint
        self.jaxpr = jaxpr
        self.before, after = jaxpr.eqns[:length], jaxpr.eqns[length:]
        self.inputs = jaxpr.invars[: len(self.a.invars)]
        self.results = jaxpr.outvars[len(joint.kept) :]
        self.after = _live(after, self.results)
        self.constants, self.carry, _ = internals.scan_operands(self.a)
        self.maker = {v: eqn for eqn in self.before for v in eqn.outvars}
        self.order = {v: i for i, eqn in enumerate(self.before) for v in eqn.outvars}

    def loops(self) -> tuple[JaxprEqn, JaxprEqn]:
        env: dict[Var, Atom] = {}
        repeated: list[JaxprEqn] = []
        shared: dict[Var, Var] = {}  # constants of the first loop, in the second
        swept: dict[Var, Var] = {}  # its inputs by step
        residuals: dict[Var, Var] = {}  # what it leaves
        known = {**self.maker, **dict.fromkeys(self.inputs)}
        for var in _read_by(self.after, self.results):
            if var not in known:
                continue
            cone = self._constant(var)
            if cone is not None:
                for constant in _read_by(cone, [var]):
                    if constant in self.inputs and constant not in shared:
                        shared[constant] = Var(constant.aval)
                        env[constant] = shared[constant]
                repeated += _renamed([eqn for eqn in cone if eqn.outvars[0] not in env], env)
            else:
                place = swept if var in self.inputs[self.constants + self.carry :] else residuals
                place[var] = Var(var.aval)
                env[var] = place[var]
        first, left = self._first(list(residuals))
        return first, self._second(env, repeated, shared, swept, residuals, left)

    def _constant(self, var: Var) -> list[JaxprEqn] | None:
        """The equations that give a value which is the same at every step, None if there are none.

        None at all for a constant of the loop itself.
        """
        found: dict[Var, JaxprEqn] = {}
        stack: list[Atom] = [var]
        while stack:
            atom = stack.pop()
            if isinstance(atom, Literal) or atom in found:
                continue
            eqn = self.maker.get(atom)
            if eqn is None:
                if atom in self.inputs[: self.constants]:
                    continue
                return None
            if eqn.primitive not in FOLDABLE or len(found) >= MAX_EQUATIONS:
                return None
            found[atom] = eqn
            stack.extend(eqn.invars)
        return [found[v] for v in sorted(found, key=self.order.__getitem__)]

    def _first(self, residuals: Sequence[Var]) -> tuple[JaxprEqn, list[Var]]:
        """The first loop, and what it leaves of ``residuals``, step by step."""
        length = self.a.params["length"]
        outvars = [self.a.outvars[i] for i in self.joint.kept]
        results = [*self.jaxpr.outvars[: len(outvars)], *residuals]
        left = [
            Var(internals.array_like(v.aval, (length, *_shape(v)), _dtype(v))) for v in residuals
        ]
        body = _jaxpr.make(self.inputs, results, self.before)
        counts = internals.scan_operands(self.a)
        eqn = internals.scan_like(self.a, body, self.a.invars, counts, [*outvars, *left])
        return eqn, left

    def _second(
        self,
        env: dict[Var, Atom],
        repeated: Sequence[JaxprEqn],
        shared: Mapping[Var, Var],
        swept: Mapping[Var, Var],
        residuals: Mapping[Var, Var],
        left: Sequence[Var],
    ) -> JaxprEqn:
        constants, carry, _ = internals.scan_operands(self.b)
        own = dict(zip(self.joint.own, self.jaxpr.invars[len(self.a.invars) :], strict=True))
        outer = dict(zip(self.inputs, self.a.invars, strict=True))
        groups: list[list[tuple[Var, Atom]]] = [
            [(own[i], self.b.invars[i]) for i in own if i < constants],
            [(own[i], self.b.invars[i]) for i in own if constants <= i < constants + carry],
            [(own[i], self.b.invars[i]) for i in own if i >= constants + carry],
        ]
        groups[0] += [(inner, outer[var]) for var, inner in shared.items()]
        groups[2] += [(inner, outer[var]) for var, inner in swept.items()]
        groups[2] += list(zip(residuals.values(), left, strict=True))
        results = [read(env, atom) for atom in self.results]
        eqns = [eqn.replace(invars=[read(env, atom) for atom in eqn.invars]) for eqn in self.after]
        body = _jaxpr.make(
            [inner for group in groups for inner, _ in group],
            [read(env, atom) for atom in results],
            [*repeated, *eqns],
        )
        operands = [atom for group in groups for _, atom in group]
        counts = (len(groups[0]), len(groups[1]), len(groups[2]))
        return internals.scan_like(self.b, body, operands, counts, self.b.outvars)


def _live(eqns: Sequence[JaxprEqn], results: Sequence[Atom]) -> list[JaxprEqn]:
    """The equations that the results need."""
    needed = {atom for atom in results if isinstance(atom, Var)}
    live: list[JaxprEqn] = []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars):
            live.append(eqn)
            needed.update(a for a in eqn.invars if isinstance(a, Var))
    return live[::-1]


def _read_by(eqns: Sequence[JaxprEqn], results: Sequence[Atom]) -> list[Var]:
    """The variables that equations and results read, in order."""
    atoms = [a for eqn in eqns for a in eqn.invars] + list(results)
    return list(dict.fromkeys(a for a in atoms if isinstance(a, Var)))


def _shape(var: Var) -> tuple[int, ...]:
    shape: tuple[int, ...] = _jaxpr.aval(var).shape
    return shape


def _dtype(var: Var) -> object:
    return _jaxpr.aval(var).dtype
