"""Keys under which equal pieces of a program are solved and built once."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jevt.partition import order
from jevt.partition.graph import Graph
from jevt.partition.reach import Reach, bits


class Keys:
    """Makes keys; remembers each equation's part, as an equation is asked about many times."""

    def __init__(self) -> None:
        # The equation is kept beside its part so that its id stays its own.
        self._known: dict[int, tuple[JaxprEqn, Hashable]] = {}

    def key(self, jaxpr: Jaxpr) -> Hashable:
        """Equal for jaxprs that differ in nothing but the names of their variables.

        Twenty-four equal layers have equal keys, so they are solved once.
        """
        number: dict[Var, int] = {}

        def atom(value: Any) -> int:
            return -1 if isinstance(value, Literal) else number.setdefault(value, len(number))

        for var in (*jaxpr.constvars, *jaxpr.invars):
            atom(var)
        eqns = tuple(
            (self._equation(eqn), tuple(map(atom, eqn.invars)), tuple(map(atom, eqn.outvars)))
            for eqn in jaxpr.eqns
        )
        ends = tuple(_literal(v) if isinstance(v, Literal) else atom(v) for v in jaxpr.outvars)
        return tuple(_aval(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)), eqns, ends

    def _equation(self, eqn: JaxprEqn) -> Hashable:
        """What of an equation does not depend on the names of variables."""
        known = self._known.get(id(eqn))
        if known is not None:
            return known[1]
        part = (
            eqn.primitive,
            tuple(_literal(v) if isinstance(v, Literal) else _aval(v.aval) for v in eqn.invars),
            tuple(_aval(v.aval) for v in eqn.outvars),
            tuple((name, self._parameter(value)) for name, value in sorted(eqn.params.items())),
        )
        self._known[id(eqn)] = (eqn, part)
        return part

    def _parameter(self, value: Any) -> Hashable:
        if isinstance(value, Jaxpr):
            return self.key(value)
        if isinstance(value, (tuple, list)):
            return tuple(map(self._parameter, value))
        try:
            hash(value)
        except TypeError:
            return repr(value)
        return type(value).__name__, value


def arranged(graph: Graph, reach: Reach, part: Sequence[int]) -> list[int]:
    """The nodes of a component in an executable order that does not depend on the program's.

    Equal layers are not always traced, or rewritten, in the same order. Nodes are told apart by
    what they compute, from what and for what (colour refinement in three steps); those that are not
    keep the program's order, and may then miss being recognised as equal.
    """
    if len(part) == 1:
        return list(part)
    inside = {node: position for position, node in enumerate(part)}
    tensors, eqns = graph.tensors, graph.jaxpr.eqns
    before: dict[int, str] = {}
    for n in part:
        operands = (tensors[t] for t in graph.reads[n])
        made = (f"{before.get(t.producer, '')} {t.nbytes}" for t in operands)  # type: ignore[arg-type]
        kind = (_signature(eqns[p]) for p in graph.nodes[n].eqns)
        before[n] = _digest(*sorted(kind), *sorted(made))
    after: dict[int, str] = {}
    for n in reversed(part):
        uses = []
        for tensor in map(tensors.__getitem__, graph.writes[n]):
            here = sorted(after[c] for c in tensor.consumers if c in inside)
            leaves = tensor.escapes or len(here) < len(tensor.consumers)
            uses.append(_digest(str(leaves), *here))
        after[n] = _digest(before[n], *sorted(uses))
    colour: dict[int, str] = {}
    for n in part:
        given = (t for t in map(tensors.__getitem__, graph.reads[n]) if t.producer not in inside)
        shared = (sorted(after[c] for c in _among(t.consumers, inside)) for t in given)
        colour[n] = _digest(after[n], *sorted(map(str, shared)))
    mask = sum(1 << n for n in part)  # paths through other components count too
    successors = [[inside[s] for s in bits(reach.below[n] & mask & ~(1 << n))] for n in part]
    ranked = sorted(part, key=lambda n: (colour[n], n))
    rank = {n: index for index, n in enumerate(ranked)}
    result = order.executable([rank[n] for n in part], successors)
    assert result is not None, "a part of an acyclic graph is acyclic"
    return [part[index] for index in result]


def equations(graph: Graph, part: Sequence[int]) -> list[int]:
    """Positions of the equations of a component's nodes, node by node.

    Within a node, in an executable order by what they compute, like :func:`arranged`.
    """
    result: list[int] = []
    for node in part:
        positions = graph.nodes[node].eqns
        index = {v: i for i, p in enumerate(positions) for v in graph.jaxpr.eqns[p].outvars}
        successors: list[list[int]] = [[] for _ in positions]
        for i, p in enumerate(positions):
            read = {
                index[v] for v in graph.jaxpr.eqns[p].invars if isinstance(v, Var) and v in index
            }
            for before in read:
                successors[before].append(i)
        names = [(_signature(graph.jaxpr.eqns[p]), i) for i, p in enumerate(positions)]
        rank = {name: r for r, name in enumerate(sorted(names))}
        ranks = order.executable([rank[name] for name in names], successors)
        assert ranks is not None, "a jaxpr is acyclic"
        result += [positions[i] for i in ranks]
    return result


def _among(nodes: Sequence[int], inside: Mapping[int, int]) -> list[int]:
    """Those of ``nodes`` that are inside; the readers of a learning rate are many."""
    if len(nodes) <= len(inside):
        return [n for n in nodes if n in inside]
    found = set(nodes)
    return [n for n in inside if n in found]


def _digest(*parts: str) -> str:
    """Not ``hash``, which differs from process to process and with it the order."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()


def _signature(eqn: JaxprEqn) -> str:
    plain = {k: v for k, v in eqn.params.items() if isinstance(v, (int, float, str, tuple))}
    operands = [
        str(v) if isinstance(v, Literal) else getattr(v.aval, "shape", ()) for v in eqn.invars
    ]
    return f"{eqn.primitive.name} {operands} {sorted(plain.items())}"


def _literal(literal: Literal) -> Hashable:
    """Values as printed, because 0.0 and -0.0, 1 and True compare equal, and NaN to nothing."""
    value = np.asarray(literal.val)
    return repr(value.item() if value.ndim == 0 else value.tolist()), _aval(literal.aval)


def _aval(aval: Any) -> Hashable:
    dtype = getattr(aval, "dtype", None)
    return (
        getattr(aval, "shape", None),
        str(aval) if dtype is None else dtype,
        getattr(aval, "weak_type", None),
    )
