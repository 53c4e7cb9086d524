"""The integer program of one component.

Variables, for the candidate pairs of a :class:`~.problem.Problem`::

    same[e]    bool  the two nodes of e share a group
    time[v]    int   when the group of v runs
    label[v]   int   the iteration space of the group of v
    parent[a,b] bool a is b's parent in a spanning forest of the groups
    written[t], read[t,i]  bool  t goes to memory; its i-th reader is the first of its group to fetch it

Constraints, by the names that the methods below carry:

* ``acyclic``: "no path leaves a partition and comes back" (EVT, ASPLOS 2024, section 5, validity), in the
  stronger form that the quotient graph has no cycle: same[e] makes the times of both ends equal, an edge that
  is cut (or never was a candidate) makes the consumer's later.
* ``one_space``: same[e] makes labels equal; a label is a pair (points, row length), and a node's domain has
  the spaces in which it is a full tile, a row, or something smaller. In the last case its results do not
  span the space, so all its consumers are in the group.
* ``traffic``: a tensor is written if a consumer is elsewhere, read once by each group that is not its
  producer's.
* ``launches``: the number of groups is the number of nodes minus the edges of a spanning forest. Without
  it, groups would have to be counted through transitive variables, EVT's O(n³).
* ``refused``: added lazily. What ``build`` refuses cannot be written down beforehand; each refusal names nodes
  that never fit one kernel, and they are cut apart.

Why OR-Tools' CP-SAT: the model is Boolean structure with difference constraints, which its clause learning
propagates directly, while a MIP solver sees big-M rows with a weak relaxation; its solutions are exact
integers; with one worker, a fixed seed and a limit in deterministic time it gives the same plan everywhere;
it takes hints. On random graphs without a size limit for groups, this formulation is proven optimal up to
about 100 nodes in seconds, the pairwise one of the paper up to 50. Contraction and components keep real
graphs below that, and most components never get here, because one group for all reaches the lower bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ortools.sat.python import cp_model

from jevt.partition import order
from jevt.partition.problem import Grouping, Problem, components

type Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Nodes that are not one group: together with anything (``hard``), or exactly these."""

    nodes: tuple[int, ...]
    hard: bool


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long the solver may search, in its own deterministic seconds and by the clock."""

    deterministic: float
    wall: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """A grouping, None if none was found in time, and a lower bound on the cost of any."""

    groups: Grouping | None
    bound: int
    optimal: bool
    spent: float


def solve(problem: Problem, cuts: Sequence[Cut], hint: Grouping, limits: Limits) -> Answer:
    """The cheapest grouping that respects the problem and the cuts."""
    program = _Program(problem)
    for cut in cuts:
        program.refused(cut)
    program.hint(hint)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = limits.deterministic
    solver.parameters.max_time_in_seconds = limits.wall
    status = solver.solve(program.model)
    spent = float(solver.response_proto.deterministic_time)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(None, 0, False, spent)
    links: list[list[int]] = [[] for _ in range(problem.size)]
    for (a, b), variable in program.same.items():
        if solver.boolean_value(variable):
            links[a].append(b)
            links[b].append(a)
    bound = round(solver.best_objective_bound) * program.unit
    return Answer(
        components(range(problem.size), links), bound, status == cp_model.OPTIMAL, spent
    )


class _Program:
    """The CP-SAT model of a problem; each method adds the constraints of its name."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = cp_model.CpModel()
        model, count = self.model, problem.size
        pairs = (*problem.edges, *problem.siblings)
        self.same = {pair: model.new_bool_var(f"same_{pair[0]}_{pair[1]}") for pair in pairs}
        self.time = [model.new_int_var(0, count - 1, f"time_{v}") for v in range(count)]
        self.depth = [model.new_int_var(0, count - 1, f"depth_{v}") for v in range(count)]
        self.parent: dict[Pair, cp_model.IntVar] = {}
        self.alone = {v: model.new_bool_var(f"alone_{v}") for v in range(count) if problem.free[v]}
        self.label: list[cp_model.IntVar] = []
        self.unit = 1
        self.acyclic()
        self.one_space()
        self.launches()
        self.traffic()

    def acyclic(self) -> None:
        for (u, v), same in self.same.items():
            self.model.add(self.time[u] == self.time[v]).only_enforce_if(same)
        for u, v in self.problem.edges:
            self.model.add(self.time[v] >= self.time[u] + 1).only_enforce_if(~self.same[u, v])
        for u, v in self.problem.ordered:
            self.model.add(self.time[v] >= self.time[u] + 1)

    def one_space(self) -> None:
        problem, model = self.problem, self.model
        consumers = problem.consumers()
        labels = range(len(problem.labels))
        everywhere = (1 << len(labels)) - 1
        if all(firm == everywhere for firm in problem.firm):
            return
        for v in range(problem.size):
            allowed = problem.firm[v] | problem.inner[v]
            domain = cp_model.Domain.from_values([i for i in labels if allowed >> i & 1])
            self.label.append(model.new_int_var_from_domain(domain, f"label_{v}"))
            if problem.inner[v]:
                inner = model.new_bool_var(f"inner_{v}")
                firm = cp_model.Domain.from_values([i for i in labels if problem.firm[v] >> i & 1])
                model.add_linear_expression_in_domain(self.label[v], firm).only_enforce_if(~inner)
                for c in sorted(consumers[v]):
                    model.add_implication(inner, self.same[v, c])
        for (a, b), same in self.same.items():
            shared = (problem.firm[a] | problem.inner[a]) & (problem.firm[b] | problem.inner[b])
            if shared:
                model.add(self.label[a] == self.label[b]).only_enforce_if(same)
            else:
                model.add(same == 0)

    def launches(self) -> None:
        """A forest: every node has at most one parent, one step less deep and in the same group."""
        arriving: list[list[cp_model.IntVar]] = [[] for _ in range(self.problem.size)]
        for (a, b), same in self.same.items():
            for above, below in ((a, b), (b, a)):
                arc = self.model.new_bool_var(f"parent_{above}_{below}")
                self.parent[above, below] = arc
                self.model.add(self.depth[below] >= self.depth[above] + 1).only_enforce_if(arc)
                arriving[below].append(arc)
            self.model.add(self.parent[a, b] + self.parent[b, a] <= same)
        for arcs in arriving:
            self.model.add_at_most_one(arcs)
        for v, alone in self.alone.items():
            for pair, same in self.same.items():
                if v in pair:
                    self.model.add_implication(alone, ~same)

    def traffic(self) -> None:
        problem, model = self.problem, self.model
        constant = problem.launch * problem.size
        terms: list[tuple[int, cp_model.IntVar]] = [(-problem.launch, arc) for arc in self.parent.values()]
        terms += [(-problem.launch, alone) for alone in self.alone.values()]
        for t, tensor in enumerate(problem.tensors):
            u = tensor.producer
            readers = sorted(
                zip(tensor.consumers, tensor.read_bytes, strict=True), key=lambda r: (-r[1], r[0])
            )
            if u is not None and tensor.nbytes and (tensor.leaves or readers):
                written = model.new_bool_var(f"written_{t}")
                terms.append((tensor.nbytes, written))
                spared = [self.alone[u]] if u in self.alone else []
                if tensor.leaves:
                    model.add_bool_or([written, *spared])
                for c, _ in readers:
                    model.add_bool_or([written, *spared, *self._together(u, c)])
            for index, (c, amount) in enumerate(readers):
                if not amount:
                    continue
                spared = [self.alone[c]] if c in self.alone else []
                if u is not None:
                    spared += self._together(u, c)
                for other, _ in readers[:index]:
                    spared += self._together(other, c)
                if not spared:
                    constant += amount
                    continue
                read = model.new_bool_var(f"read_{t}_{c}")
                terms.append((amount, read))
                model.add_bool_or([read, *spared])
        model.minimize(sum(weight * variable for weight, variable in terms) + constant)

    def refused(self, cut: Cut) -> None:
        members = set(cut.nodes)
        inside = [p for p in self.same if members.issuperset(p)]
        tree = _spanning_tree(inside)
        clause = [~self.same[p] for p in tree]
        if not cut.hard:
            clause += [s for p, s in self.same.items() if len(members.intersection(p)) == 1]
        self.model.add_bool_or(clause)

    def hint(self, groups: Grouping) -> None:
        owner = {node: index for index, group in enumerate(groups) for node in group}
        for (a, b), same in self.same.items():
            self.model.add_hint(same, owner[a] == owner[b])
        ranks = order.executable([g[0] for g in groups], order.quotient(groups, self.problem.successors()))
        for rank, index in enumerate(ranks or ()):
            for node in groups[index]:
                self.model.add_hint(self.time[node], rank)

    def _together(self, a: int, b: int) -> list[cp_model.IntVar]:
        """The variable that says that two nodes share a group, if they may."""
        variable = self.same.get((a, b))
        if variable is None:
            variable = self.same.get((b, a))
        return [] if variable is None else [variable]


def _spanning_tree(pairs: Sequence[Pair]) -> list[Pair]:
    """A spanning forest, earlier pairs first: producer–consumer pairs precede siblings in a program."""
    root: dict[int, int] = {}

    def find(node: int) -> int:
        while root.setdefault(node, node) != node:
            node = root[node]
        return node

    tree: list[Pair] = []
    for a, b in pairs:
        first, second = find(a), find(b)
        if first != second:
            root[second] = first
            tree.append((a, b))
    return tree
