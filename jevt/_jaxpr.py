"""Small tools on jaxprs that passes, partitioner and lowering share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jevt_kernels import compat

type Atom = Var | Literal


def aval(atom: Atom) -> ShapedArray:
    """The type of an atom that is known to be an array."""
    return cast(ShapedArray, atom.aval)


def subjaxprs(eqn: JaxprEqn) -> Iterator[tuple[str, int, Jaxpr]]:
    """The jaxprs among an equation's parameters, as (parameter, position in it, jaxpr)."""
    for key in sorted(eqn.params):
        value = eqn.params[key]
        for position, item in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
            if isinstance(item, Jaxpr):
                yield key, position, item


def map_subjaxprs(eqn: JaxprEqn, function: Callable[[Jaxpr], Jaxpr]) -> JaxprEqn:
    """The equation with ``function`` applied to each of its jaxprs; itself if nothing changed."""
    changed: dict[str, Any] = {}
    for key, value in sorted(eqn.params.items()):  # in the order of `subjaxprs`
        if isinstance(value, Jaxpr):
            new: Any = function(value)
            if new is not value:
                changed[key] = new
        elif isinstance(value, (tuple, list)) and any(isinstance(v, Jaxpr) for v in value):
            new = type(value)(function(v) if isinstance(v, Jaxpr) else v for v in value)
            if any(a is not b for a, b in zip(new, value, strict=True)):
                changed[key] = new
    return eqn.replace(params={**eqn.params, **changed}) if changed else eqn


def extract(jaxpr: Jaxpr, positions: Sequence[int]) -> Jaxpr:
    """The equations at ``positions`` as a jaxpr of their own.

    Its invars are the variables that the equations read and do not define, in order of first use;
    its outvars the variables that others need, in order of definition.
    """
    chosen = set(positions)
    eqns = [jaxpr.eqns[p] for p in sorted(chosen)]
    defined = {v for e in eqns for v in e.outvars}
    inputs: dict[Var, None] = {}
    for eqn in eqns:
        for atom in eqn.invars:
            if isinstance(atom, Var) and atom not in defined:
                inputs.setdefault(atom)
    needed = {v for v in jaxpr.outvars if isinstance(v, Var)}
    for position, eqn in enumerate(jaxpr.eqns):
        if position not in chosen:
            needed.update(v for v in eqn.invars if isinstance(v, Var))
    outputs = [v for e in eqns for v in e.outvars if v in needed]
    return make(list(inputs), outputs, eqns)


def together(parts: Sequence[Jaxpr]) -> Jaxpr:
    """The equations of parts that do not read each other's results; what they share, once."""
    return make(
        list(dict.fromkeys(v for part in parts for v in part.invars)),
        [v for part in parts for v in part.outvars],
        [eqn for part in parts for eqn in part.eqns],
    )


def make(invars: Sequence[Var], outvars: Sequence[Atom], eqns: Iterable[JaxprEqn]) -> Jaxpr:
    """A jaxpr without constants, its effects joined from its equations."""
    return compat.make_jaxpr(list(invars), list(outvars), list(eqns))
