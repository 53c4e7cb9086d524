"""Chooses what the forward pass keeps for the backward pass, and what is computed again there.

A value that is made before a matrix product and read after it by a kernel of the backward pass has
to pass through memory; but so may the values that it is made from, and those can be fewer bytes:
the float32 ``x - mean`` of a layer norm follows from its bfloat16 input and one mean a row, a
gelu's derivative from the product that both passes read.

The graph is cut at the equations that no fused kernel holds (matrix products, loops, effects), and
at those that add up sums of many tensors (:mod:`.totals`), into *regions* of connected fusible
equations. A region needs values of earlier ones; which values it
should read instead is a minimum cut (as in the partitioner of ``torch.compile``, there once for the
whole backward pass). Reading or writing a value costs its bytes, writing nothing if memory holds it
anyway; computing one again costs its arithmetic, in bytes that the device could have moved
meanwhile. Only pointwise equations, views and sources of the value's own region are repeated: never
a reduction, nothing beyond what the region itself has read, and no value that is short.

The cut is the best for what it counts. It does not know groups: neither their launches, nor that
two groups of a region may both read a value. So it is a heuristic for the partitioner's objective,
and the bound of a plan is one for the program with these repetitions. Repetitions inside a
component are decided with the groups (:mod:`.copies`).

Every value that is computed again is computed by the same equations from the same operands.

    before  c = convert a; d = sub c m; …  h = dot_general … ; i = mul h d      d: float32, stored
    after   c = convert a; d = sub c m; …  h = dot_general … ; c' = convert a; d' = sub c' m;
            i = mul h d'                                                      a: bfloat16, m: short
"""

from __future__ import annotations

from collections.abc import Iterable

from jax.extend.core import Jaxpr, JaxprEqn, Var
from ortools.graph.python import max_flow

from jevt._context import Device
from jevt.partition import cost, totals
from jevt.partition.graph import Reading, nbytes
from jevt.passes import dce

#: Kinds of nodes whose equations may be repeated.
_REPEATED = frozenset({"pointwise", "view", "source"})

#: Bytes below which a value is kept: reading it takes no time that could be saved.
_SHORT = 1 << 16


def recompute(graph: Reading, device: Device) -> Jaxpr:
    """The graph's jaxpr, with equations repeated where that saves traffic.

    Args:
      graph: one node for each equation.
      device: sets how much arithmetic a byte is worth.
    """
    return _Recompute(graph, device).run()


class _Recompute:
    """The regions of a graph, and what memory holds so far."""

    def __init__(self, graph: Reading, device: Device) -> None:
        self.graph = graph
        self.device = device
        self.eqns = graph.jaxpr.eqns
        self.maker = {v: p for p, eqn in enumerate(self.eqns) for v in eqn.outvars}
        self.region = _regions(graph, self.maker)
        self.arithmetic: dict[int, int] = {}
        self.stored = self._in_memory_anyway()

    def run(self) -> Jaxpr:
        members: dict[int, list[int]] = {}
        for position, region in enumerate(self.region):
            if region is not None:
                members.setdefault(region, []).append(position)
        repeated: dict[int, frozenset[Var]] = {}
        for region, positions in members.items():  # in the order of their first equations
            repeated[region] = self._repeated(region, positions)
        if not any(repeated.values()):
            return self.graph.jaxpr
        return dce.run(self.graph.jaxpr.replace(eqns=self._rewritten(repeated)))

    def _in_memory_anyway(self) -> set[Var]:
        """Inputs, outputs, and whatever an equation without a kernel reads or writes."""
        jaxpr = self.graph.jaxpr
        result = {v for v in (*jaxpr.invars, *jaxpr.outvars) if isinstance(v, Var)}
        for eqn, region in zip(self.eqns, self.region, strict=True):
            if region is None:
                result.update(v for v in (*eqn.invars, *eqn.outvars) if isinstance(v, Var))
        return result

    def _repeated(self, region: int, positions: list[int]) -> frozenset[Var]:
        """The values of earlier regions that this one computes again."""
        reads = dict.fromkeys(
            v for p in positions for v in self.eqns[p].invars if isinstance(v, Var)
        )
        needed = [
            v for v in reads if self._home(v) not in (None, region) and nbytes(v.aval) >= _SHORT
        ]
        if not needed:
            return frozenset()
        at_hand = {v for v in reads if self._home(v) is None}
        network = _Network(needed)
        stack = list(needed)
        known = set(needed)
        while stack:
            var = stack.pop()
            moved = nbytes(var.aval)
            read = 0 if var in at_hand else moved
            network.keep(var, read if var in self.stored else read + moved)
            home, operands = self._home(var), self._operands(var)
            if operands is None:
                network.must_keep(var)
            if operands is None or network.keeps(var):
                continue
            network.repeat(var, operands, self._arithmetic(self.maker[var]))
            for operand in operands:
                if operand not in known:
                    known.add(operand)
                    stack.append(operand)
                    if self._home(operand) != home:  # the maker's region has read it
                        network.must_keep(operand)
        repeated = network.solve()
        kept = {v for v in known if v not in repeated}
        wanted: set[Var] = set()
        stack = list(needed)
        while stack:
            var = stack.pop()
            if var in wanted:
                continue
            wanted.add(var)
            if var in repeated:
                stack.extend(self._operands(var) or ())
        self.stored |= kept & wanted
        return frozenset(repeated & wanted)

    def _home(self, var: Var) -> int | None:
        """The region that makes a value; None for inputs and what no kernel makes."""
        position = self.maker.get(var)
        return None if position is None else self.region[position]

    def _operands(self, var: Var) -> list[Var] | None:
        """The operands of the equation that makes a value, None if it may not be repeated."""
        position = self.maker.get(var)
        if position is None or self.region[position] is None or nbytes(var.aval) < _SHORT:
            return None
        eqn, node = self.eqns[position], self.graph.nodes[position]
        if node.kind not in _REPEATED or len(eqn.outvars) != 1 or eqn.effects:
            return None
        return list(dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)))

    def _arithmetic(self, position: int) -> int:
        """An equation's arithmetic in bytes; never 0, so that a tie is decided for keeping."""
        if position not in self.arithmetic:
            spent = cost.arithmetic_us([self.eqns[position]], self.device)
            self.arithmetic[position] = 1 + round(spent * self.device.bytes_per_us)
        return self.arithmetic[position]

    def _rewritten(self, repeated: dict[int, frozenset[Var]]) -> list[JaxprEqn]:
        """All equations, each copy before its first reader."""
        copies: dict[tuple[int, Var], Var] = {}
        result: list[JaxprEqn] = []

        def available(region: int, var: Var) -> Var:
            if var not in repeated[region]:
                return var
            if (region, var) not in copies:
                original = self.eqns[self.maker[var]]
                invars = [
                    available(region, v) if isinstance(v, Var) else v for v in original.invars
                ]
                copies[region, var] = Var(var.aval)
                result.append(original.replace(invars=invars, outvars=[copies[region, var]]))
            return copies[region, var]

        for eqn, region in zip(self.eqns, self.region, strict=True):
            if region is not None and repeated[region]:
                invars = [available(region, v) if isinstance(v, Var) else v for v in eqn.invars]
                if any(a is not b for a, b in zip(invars, eqn.invars, strict=True)):
                    eqn = eqn.replace(invars=invars)
            result.append(eqn)
        return result


def _regions(graph: Reading, maker: dict[Var, int]) -> list[int | None]:
    """For each equation, a number that it shares with the fusible equations around it.

    Equations are of one region if they are connected and equally many equations without a kernel
    lie before them.
    """
    eqns = graph.jaxpr.eqns
    collectors = totals.find(graph).collectors
    fusible = [
        (node.kind in _REPEATED or node.kind == "reduction") and position not in collectors
        for position, node in enumerate(graph.nodes)
    ]
    depth: list[int] = []
    parent = list(range(len(eqns)))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    for position, eqn in enumerate(eqns):
        before = [maker[v] for v in _variables(eqn) if v in maker]
        deepest = max((depth[p] for p in before), default=0)
        depth.append(deepest + (not fusible[position]))
        if fusible[position]:
            for p in before:
                if fusible[p] and depth[p] == depth[position]:
                    first, second = sorted((root(p), root(position)))
                    parent[second] = first
    return [root(p) if fusible[p] else None for p in range(len(eqns))]


def _variables(eqn: JaxprEqn) -> Iterable[Var]:
    return (v for v in eqn.invars if isinstance(v, Var))


class _Network:
    """A minimum cut that decides, value by value, between keeping and repeating.

    Each value has two nodes. The arc between them is cut when the value is kept; the arc from the
    source to the first, when it is repeated, and then its operands have to be available.
    """

    def __init__(self, needed: list[Var]) -> None:
        self.needed = needed
        self.index: dict[Var, int] = {}
        self.kept: dict[Var, int] = {}
        self.arithmetic: dict[Var, int] = {}
        self.arcs: list[tuple[Var, Var]] = []

    def keep(self, var: Var, cost: int) -> None:
        self.index.setdefault(var, len(self.index))
        self.kept[var] = cost

    def must_keep(self, var: Var) -> None:
        self.arithmetic[var] = -1

    def keeps(self, var: Var) -> bool:
        return self.arithmetic.get(var) == -1

    def repeat(self, var: Var, operands: list[Var], arithmetic: int) -> None:
        self.arithmetic[var] = arithmetic
        self.arcs += [(operand, var) for operand in operands]

    def solve(self) -> set[Var]:
        """The values that are repeated."""
        finite = sum(self.kept.values()) + sum(a for a in self.arithmetic.values() if a > 0)
        unbounded = finite + 1
        flow = max_flow.SimpleMaxFlow()
        source, sink = 0, 1
        for var, index in self.index.items():
            made, available = 2 + 2 * index, 3 + 2 * index
            flow.add_arc_with_capacity(made, available, self.kept[var])
            arithmetic = self.arithmetic[var]
            capacity = unbounded if arithmetic < 0 else arithmetic
            flow.add_arc_with_capacity(source, made, capacity)
        for operand, var in self.arcs:
            flow.add_arc_with_capacity(
                3 + 2 * self.index[operand], 2 + 2 * self.index[var], unbounded
            )
        for var in self.needed:
            flow.add_arc_with_capacity(3 + 2 * self.index[var], sink, unbounded)
        status = flow.solve(source, sink)
        if status != flow.OPTIMAL:
            raise RuntimeError(f"expected the maximum flow to be found, got {status}")
        before = set(flow.get_source_side_min_cut())
        return {var for var, index in self.index.items() if 2 + 2 * index not in before}
