"""Sums of whole tensors that are added up: one launch for many, and the additions apart.

The norm of all gradients is a sum of each gradient's squares, and a chain that adds up these sums:

    s0 = sum(g0²);  s1 = sum(g1²);  t1 = s0 + s1;  s2 = sum(g2²);  t2 = t1 + s2;  …;  sqrt(tn)

To the integer program each sum is a launch, and an addition in its kernel is a launch saved, so
that it would make of this one long chain of kernels, a tensor each. But sums that do the same take
two launches for all (:mod:`.horizontal`), and what has one element only is a few kernels of XLA's
if it is apart. So a number that is made, by numbers alone, of many sums is no link to them
(:mod:`.components`), and like a matrix product it separates what is before it from what is behind
(:mod:`.recompute`). Where sums do the same, each costs its part of the common launches
(:func:`launches_us`) beside what it reads; a matrix product's kernel that sums up its result, or
that of a kernel which makes the tensor, competes with that.

What is made of few sums and read by more than numbers stays linked to them: as a trust ratio of
LAMB's, which belongs to its tensors, or the norm of each tensor, which is a result of the program.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from jax.extend.core import Var

from jevt._jaxpr import aval
from jevt.partition.graph import Node, Reading, elements

#: A number is made of many sums if of more than so many.
_MANY = 6

#: Launches of many sums that do the same, and how many of these one pair of launches takes.
_LAUNCHES, _TOGETHER = 2, 400


@dataclasses.dataclass(frozen=True)
class Totals:
    """The sums of a graph that may share launches, and what adds up many of them.

    Attributes:
      alike: for each node that is such a sum and makes nothing else, how many there are that do the
        same.
      collectors: nodes of one element that are no link to the sums that they are made of.
    """

    alike: Mapping[int, int]
    collectors: frozenset[int]


def find(graph: Reading) -> Totals:
    """The sums of whole tensors, if they are many, and what is made of many."""
    sums = [n for n, node in enumerate(graph.nodes) if _reduces_all(node)]
    if len(sums) <= _MANY:
        return Totals({}, frozenset())
    readers = _Readers(graph)
    made_of = _made_of(graph, sums, readers)
    own = _own(made_of, readers)
    collectors: set[int] = set()
    for node in sorted(made_of.keys() - own, reverse=True):
        if made_of[node].bit_count() > _MANY or not collectors.isdisjoint(readers.of(node)):
            collectors.add(node)
    held = _held(graph, {*sums, *made_of} - collectors, readers)
    alone = [n for n in sums if n not in held and readers.number(n)]
    what = {n: _what(graph, graph.nodes[n]) for n in alone}
    counts = collections.Counter(what.values())
    return Totals({n: counts[what[n]] for n in alone}, frozenset(collectors))


def launches_us(launch_us: float, alike: int) -> float:
    """A sum's part of the launches that it shares with all that do the same.

    Args:
      launch_us: of a kernel of ours.
      alike: how many sums do the same, itself included.
    """
    return min(1, _LAUNCHES / min(alike, _TOGETHER)) * launch_us


class _Readers:
    """Who reads what the nodes of a graph make."""

    def __init__(self, graph: Reading) -> None:
        self.graph = graph
        self.owner = {p: n for n, node in enumerate(graph.nodes) for p in node.eqns}

    def made(self, node: int) -> list[Var]:
        """What a node makes for others."""
        eqns = self.graph.nodes[node].eqns
        made = (v for p in eqns for v in self.graph.jaxpr.eqns[p].outvars)
        inside = set(eqns)
        return [v for v in made if not self.graph.uses.get(v, inside) <= inside]

    def of(self, node: int) -> set[int | None]:
        """Its readers; None stands for the program's output."""
        found = {p for v in self.made(node) for p in self.graph.uses[v]}
        return {None if p is None else self.owner[p] for p in found} - {node}

    def number(self, node: int) -> bool:
        """Whether a node makes nothing but numbers."""
        return all(elements(v.aval) <= 1 for v in self.made(node))


def _reduces_all(node: Node) -> bool:
    return node.kind == "reduction" and 1 < node.size == node.cols and not node.ends


def _made_of(graph: Reading, sums: Sequence[int], readers: _Readers) -> dict[int, int]:
    """For each node of one element that is made of sums, by such nodes alone, a bit for each."""
    bits = {node: 1 << bit for bit, node in enumerate(sums)}
    result: dict[int, int] = {}
    for index in range(len(graph.nodes)):  # in an executable order
        found = bits.get(index, result.get(index, 0))
        for reader in readers.of(index) if found else ():
            if reader is not None and reader not in bits:
                target = graph.nodes[reader]
                if target.size <= 1 and not target.opaque:
                    result[reader] = result.get(reader, 0) | found
    return result


def _own(made_of: Mapping[int, int], readers: _Readers) -> set[int]:
    """The nodes that make a number of few sums, for more than numbers to read."""
    result: set[int] = set()
    for node in sorted(made_of, reverse=True):
        found = readers.of(node)
        read = not found.issubset(made_of) or not result.isdisjoint(found)
        if read and made_of[node].bit_count() <= _MANY:
            result.add(node)
    return result


def _held(graph: Reading, numbers: set[int], readers: _Readers) -> set[int]:
    """Those of which a number is made that a tensor's kernel reads."""
    result: set[int] = set()
    for node in sorted(numbers, reverse=True):
        for reader in readers.of(node):
            tensor = reader is not None and graph.nodes[reader].size > 1
            if reader in result or (tensor and reader not in numbers):
                result.add(node)
    return result


def _what(graph: Reading, node: Node) -> tuple[object, ...]:
    """Equal for nodes that do the same, whatever the shapes."""
    eqns = (graph.jaxpr.eqns[p] for p in node.eqns)
    return tuple((e.primitive.name, *(aval(v).dtype.name for v in e.outvars)) for e in eqns)
