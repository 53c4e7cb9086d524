"""What nodes of a graph cost, in the terms of :class:`~.problem.Problem`.

The times of :mod:`.cost`, :mod:`.fusions` and :mod:`.products` are functions of a group's
equations. Here they are taken apart into what each node adds, so that the integer program can put
them together for any group.

What is not taken apart, and so told only of the finished groups (:mod:`.targets`): that XLA can run
a group as several kernels in a way that is no other partition, further passes over rows that do not
fit on chip, slices that are read twice, and that sums of few columns leave fewer parts where the
kernel holds whole rows. And cuBLAS takes only whole nodes along: a bias that :mod:`.contract` has
joined to what follows is not offered to it. That costs nothing but reading the bias: what follows
is a kernel in any case, and reads the product's result with the bias or without.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from jax.extend.core import Var

from jevt._context import Context, Device
from jevt.partition import copies, cost, fusions, products, targets, totals
from jevt.partition.graph import Graph, Node, Reading, nbytes
from jevt.partition.problem import Launches, Problem, Product, Traffic, Work

#: By how much of a launch a call of cuBLAS may be dearer with its epilogue than alone.
_FOLDED = 0.5

#: Arithmetic of less than so much of a launch is not counted: few groups are then bound by it, and
#: those of short vectors are not.
_LEAST = 0.01

#: Microseconds of the smallest unit, and units of a component's traffic and products beyond which a
#: larger one is taken: CP-SAT 9.15 presolves programs to wrong optima with numbers beyond 31 bits.
_UNIT, _UNITS = 1e-3, 1 << 26


@dataclasses.dataclass(frozen=True)
class Times:
    """What a node adds to the time of its group, see ``Work``; in microseconds."""

    ours: float = 0.0
    xla: float = 0.0
    more: float = 0.0
    sums: bool = False
    parts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rows: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """A matrix product, see ``Product``; in nodes of the graph and microseconds."""

    mainloop: float
    moved: int
    calls: tuple[tuple[tuple[int, ...], float], ...]


@dataclasses.dataclass(frozen=True)
class Prices:
    """What the nodes of a graph cost.

    Attributes:
      device: sets what bytes and launches cost.
      chooses: whether XLA's kernels are candidates.
      times: for each node.
      products: the matrix products, by node.
      chained: for each node, those that read what it reduces.
      copies: nodes of which several groups may have a copy.
      exposed: see ``Launches``.
      launches_us: for nodes that share launches with others if they are alone, their part of these.
    """

    device: Device
    chooses: bool
    times: Sequence[Times]
    products: Mapping[int, Call]
    chained: Mapping[int, Sequence[int]]
    copies: frozenset[int]
    exposed: int
    launches_us: Mapping[int, float]

    def unit(self, part: Sequence[int], tensors: Sequence[Traffic]) -> float:
        """Microseconds of a component's unit of time."""
        moved = sum(t.nbytes + sum(t.read_bytes) for t in tensors) / self.device.bytes_per_us
        loops = sum(self.products[n].mainloop for n in part if n in self.products)
        return max(_UNIT, (moved + loops + sum(self.times[n].xla for n in part)) / _UNITS)

    def launches(self, unit: float) -> Launches:
        """What launches cost."""
        device = self.device
        xla = round(device.xla_launch_us / unit)
        ours = round(device.triton_launch_us / unit)
        return Launches(ours, xla if self.chooses else None, xla, self.exposed)

    def shared(
        self, problem: Problem, part: Sequence[int], unit: float
    ) -> list[tuple[tuple[int, ...], int]]:
        """The times of nodes that share launches with others if each is a group by itself."""
        return [
            ((at,), max(problem.traffic([at])[0], problem.works[at].ours) + round(us / unit))
            for at, node in enumerate(part)
            if (us := self.launches_us.get(node)) is not None
        ]

    def moving(self, tensors: Sequence[Traffic], unit: float) -> tuple[Traffic, ...]:
        """Tensors by the time that they take to move, no less than 1."""
        return tuple(
            dataclasses.replace(
                tensor,
                nbytes=self._moving(tensor.nbytes, unit),
                read_bytes=tuple(self._moving(amount, unit) for amount in tensor.read_bytes),
            )
            for tensor in tensors
        )

    def _moving(self, amount: int, unit: float) -> int:
        return math.ceil(amount / (self.device.bytes_per_us * unit))

    def within(
        self, part: Sequence[int], unit: float
    ) -> tuple[tuple[Work, ...], tuple[Product, ...]]:
        """The works and products of a component, in local nodes."""
        local = {node: index for index, node in enumerate(part)}
        works, found = [], []
        for node in part:
            t = self.times[node]
            short, long, beside = (math.ceil(us / unit) for us in t.parts)  # a launch hangs on it
            least = _LEAST * self.device.xla_launch_us
            ours, xla = (round(us / unit) if us > least else 0 for us in (t.ours, t.xla))
            more = round(t.more / unit)
            works.append(Work(ours, xla, more, t.sums, (short, long, beside), t.rows))
            if (product := self.products.get(node)) is not None:
                calls = tuple(
                    (tuple(sorted(local[n] for n in nodes)), round(us / unit))
                    for nodes, us in product.calls
                    if all(n in local for n in nodes)
                )
                tiles = round(product.mainloop / unit)
                found.append(Product(local[node], tiles, self._moving(product.moved, unit), calls))
        return tuple(works), tuple(found)


def prices(graph: Graph, single: Graph, context: Context) -> Prices:
    """The prices of a graph's nodes.

    Args:
      graph: nodes of one equation and more.
      single: the same program with one node for each equation.
      context: whether XLA's kernels are candidates, and on which device.
    """
    device, chooses = context.device, targets.chooses(context)
    times = [
        Times() if node.opaque else _times(graph, single, node, device) for node in graph.nodes
    ]
    found = {
        index: _product(graph, single, index, context)
        for index, node in enumerate(graph.nodes)
        if node.kind == "contraction"
    }
    chained = _chained(graph, single)
    # A compilation that measures tries what may be slower, as `targets` does with the groups.
    exposed = round(100 * device.exposed_epilogue / targets.unsure(context))
    alone = device.xla_launch_us if chooses else device.triton_launch_us
    launches_us = {
        node: us
        for node, alike in totals.find(graph).alike.items()
        if (us := totals.launches_us(device.triton_launch_us, alike)) < alone
    }
    again = copies.candidates(graph)
    return Prices(device, chooses, times, found, chained, again, exposed, launches_us)


def unproven_us(graph: Graph, single: Reading, device: Device) -> float:
    """By how much a partition may be cheaper that has some leaves elsewhere (:mod:`.absorb`)."""
    total = 0.0
    for eqns in itertools.chain.from_iterable(node.unproven for node in graph.nodes):
        reduces = any(single.nodes[p].kind == "reduction" for p in eqns)
        leaf = Node(eqns, "reduction" if reduces else "pointwise")
        times = _times(graph, single, leaf, device)
        total += device.triton_launch_us + times.ours + times.more + max(times.parts)
    return total


def _times(graph: Graph, single: Reading, node: Node, device: Device) -> Times:
    eqns = [graph.jaxpr.eqns[p] for p in node.eqns if single.nodes[p].kind != "contraction"]
    ours = cost.arithmetic_us(eqns, device)
    xla = cost.arithmetic_us(eqns, device, fusions.OPERATIONS)
    if node.kind != "reduction":
        return Times(ours, xla)
    reducing = [p for p in node.eqns if single.nodes[p].kind == "reduction"]
    along = [graph.jaxpr.eqns[p] for p in reducing if single.nodes[p].ends]
    jaxpr = graph.extract(node.eqns)
    at = {p: i for i, p in enumerate(node.eqns)}
    kernels = fusions.kernels(jaxpr, {at[p] for p in reducing})
    slower = (cost.narrow_columns(along) - 1) * cost.predict_us(jaxpr, device)
    short, long = (
        sum(cost.parts_bytes(e, whole) for e in along) / device.bytes_per_us + slower
        for whole in (False, True)
    )
    long = max(short, long)  # a larger group costs no less
    beside = sum(products.parts_bytes(graph.jaxpr.eqns[p]) for p in reducing)
    parts = short, long, beside / device.bytes_per_us
    more = max(0, kernels - 1) * device.xla_launch_us
    return Times(ours, xla, more, bool(along), parts, len(reducing) > len(along))


def _chained(graph: Graph, single: Reading) -> dict[int, list[int]]:
    """For each node, those that read what it reduces."""
    result: dict[int, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        if node.kind != "reduction":
            continue
        reduced: set[Var] = set()
        for p in node.eqns:
            eqn = graph.jaxpr.eqns[p]
            inside = single.nodes[p].kind == "reduction" and not single.nodes[p].ends
            if inside or any(v in reduced for v in eqn.invars if isinstance(v, Var)):
                reduced.update(eqn.outvars)
        for tensor in map(graph.tensors.__getitem__, graph.writes[index]):
            if tensor.var in reduced:
                readers = (c for c in tensor.consumers if not graph.nodes[c].opaque)
                result.setdefault(index, []).extend(readers)
    return result


def _product(graph: Graph, single: Graph, node: int, context: Context) -> Call:
    device = context.device
    (position,) = (p for p in graph.nodes[node].eqns if single.nodes[p].kind == "contraction")
    eqn = graph.jaxpr.eqns[position]
    moved = sum(nbytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
    calls = tuple(_calls(graph, single, node, context)) if targets.chooses(context) else ()
    return Call(products.mainloop_us(eqn, device) / targets.unsure(context), moved, calls)


def _calls(
    graph: Graph, single: Graph, node: int, context: Context
) -> Iterator[tuple[tuple[int, ...], float]]:
    """A product alone, and with as much of what follows it as cuBLAS takes along."""
    device = context.device

    def time(nodes: Sequence[int]) -> float:
        positions = sorted(p for n in nodes for p in graph.nodes[n].eqns)
        reducing = {i for i, p in enumerate(positions) if single.nodes[p].kind == "reduction"}
        return fusions.xla_us(graph.extract(positions), device, reducing, graph.apart)

    group, last, alone = [node], node, time([node])
    yield (node,), targets.predicted_us(single, graph.nodes[node].eqns, context)
    while True:
        readers = {c for t in graph.writes[last] for c in graph.tensors[t].consumers}
        if len(readers) != 1 or any(graph.tensors[t].escapes for t in graph.writes[last]):
            return
        (last,) = readers
        if graph.nodes[last].opaque or graph.nodes[last].kind not in ("pointwise", "view"):
            return
        group.append(last)
        with_epilogue = time(group)
        if with_epilogue > alone + _FOLDED * device.xla_launch_us:
            return
        yield tuple(group), with_epilogue
