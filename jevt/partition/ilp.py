"""The integer program of one component.

Variables, for the nodes v and r of a :class:`~.problem.Problem` in executable order::

    in[v, r]      bool  v is in the group whose first node is r (``Problem.name``); in[r, r] says
                        that there is such a group
    space[r, l]   bool  the group of r has label l
    cut[u, v]     bool  some group has v, which depends on u, and not u
    written[t]    bool  tensor t goes to memory
    read[t, r]    bool  the group of r fetches t from memory
    time[v]       int   when the result of v is there, once that is needed; for a node in several
                        groups, start[r] and home[v, r] say when they run and which one writes it

Constraints, by the methods that add them:

* ``one_group``: every node is in one group, named by its first node. A node of
  ``Problem.copies`` is in one at least: this is where duplication is decided. Such nodes name no
  group with others, as several groups may have the same one.
* ``apart``: pairs that no kernel or no order allows together.
* ``connected``: a group hangs together by candidate edges, because nothing relates the axes of
  pieces that do not touch. A node is in the group of r only together with what all chains of links
  between the two pass through, and with a node at each distance on the way. Pieces that do not
  touch all the same are cut lazily, by ``split``, with the distances counted from the piece.
* ``convex``: "no path leaves a partition and comes back" (EVT, ASPLOS 2024, section 5): with u and
  v, the group holds what lies on a path between them, unless the path starts at another copy of u.
* ``cuts``: dependent nodes in different groups cut the edge between them.
* ``read_or_written``: a copy has a reader in its group, but for one that may serve the others:
  one that nobody reads would only link what does not touch.
* ``acyclic``: the quotient graph has no cycle, which convexity of each group does not give: a cut
  edge puts the consumer's group at a later time. Added lazily, when a solution has a cycle: few
  graphs of training steps have one, and the times make the others twice as slow.
* ``one_space``: every node has a place in its group's iteration space, which is a matrix product's
  only if the group has one (EVT's templates: one mainloop, whose tile the visitor tree follows). A
  node smaller than the space and its rows has one only where nobody else reads its results, which
  could not be stored.
* ``traffic``: the objective of :meth:`~.problem.Problem.cost`, term for term.
* ``operands``: a group reads and writes no more tensors than a kernel has parameters for. It is
  what ``build`` says too, but is known beforehand; of registers and shared memory only ``build``
  can tell.
* ``refused``: added lazily. What ``build`` refuses cannot be written down beforehand; each refusal
  (:mod:`.refusals`) names nodes that never fit one kernel, if it stores certain of their results.

Naming a group by its first node takes n² variables where EVT's pairwise "same partition" takes n²
variables and n³ transitivity constraints, breaks the symmetry between groups, and counts launches
and reads exactly. A formulation with one variable an edge is smaller still, but its relaxation
knows nothing of launches: on components of 30 nodes it was not proven in 9 s where this one takes
0.1 s. A set partition over enumerated groups knows them, but groups of 30 and more nodes, as around
one mainloop, are too many to enumerate.

Why OR-Tools' CP-SAT: the constraints are clauses and differences, which its clause learning
propagates directly, and it uses the linear relaxation beside (``linearization_level=2``; with less
100 nodes are not proven in 20 s, with it in 1–2 s). Probing and repeated presolving cost more than
they save on models as small and as often solved as these. Its solutions are exact integers; with
one worker, a fixed seed and a limit in deterministic time the same problem gives the same answer;
it takes hints.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from ortools.sat.python import cp_model

from jevt.partition import apart, connect, order
from jevt.partition.problem import Grouping, Problem
from jevt.partition.refusals import Refusal

type Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long the solver may search: work in its own deterministic seconds, and by the clock."""

    work: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """A grouping, None if none was found in time, and a lower bound on the cost of any."""

    groups: Grouping | None
    bound: int
    optimal: bool
    spent: float


class Program:
    """The CP-SAT model of a problem; can be solved again after more cuts."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = cp_model.CpModel()
        self.successors = problem.successors()
        self.links = problem.links()
        self.above, self.below = apart.reach(self.successors)
        self.never = apart.never_together(problem, self.above, self.below)
        self.around: list[connect.Surroundings] = []
        self.inside: dict[Pair, cp_model.IntVar] = {}
        self.cut: dict[Pair, cp_model.IntVar | None] = {}
        self.alone: dict[int, cp_model.IntVar] = {}
        self.written: dict[int, cp_model.IntVar] = {}
        self.time: list[cp_model.IntVar] = []
        self.copied = {node for node, _ in problem.copies}
        self.names: list[list[int]] = [[] for _ in self.nodes]  # for each node, its groups' names
        self.one_group()
        self.apart()
        self.connected()
        self.convex()
        self.cuts()
        self.read_or_written()
        self.one_space()
        self.traffic()
        self.operands()

    @property
    def nodes(self) -> range:
        return range(self.problem.size)

    def one_group(self) -> None:
        model = self.model
        for r in self.nodes:
            allowed = apart.members(self.problem, r, self.never[r])
            self.around.append(connect.Surroundings.of(r, allowed, self.links))
            for v in sorted(self.around[r].via):
                self.inside[v, r] = model.new_bool_var(f"in_{v}_{r}")
                self.names[v].append(r)
        for v in self.nodes:
            if v in self.copied:
                model.add_at_least_one(self._memberships(v))
            else:
                model.add_exactly_one(self._memberships(v))
        for (v, r), inside in self.inside.items():
            if v != r:
                model.add_implication(inside, self.inside[r, r])

    def read_or_written(self) -> None:
        model, consumers = self.model, self.problem.consumers()
        leaving = {t.producer for t in self.problem.tensors if t.leaves}
        for v in sorted(self.copied):
            serving = []
            for r in self.names[v]:
                serving.append(model.new_bool_var(f"serving_{v}_{r}"))
                readers = [x for c in sorted(consumers[v]) for x in self._inside(c, r)]
                model.add_bool_or(serving[-1], ~self.inside[v, r], *readers)
            model.add_at_most_one(serving)
            if v in leaving:
                continue
            served = []
            readings = [pair for pair in self.inside if pair[0] in consumers[v]]
            for c, r in readings:
                served.append(model.new_bool_var(f"served_{v}_{c}_{r}"))
                for literal in (self.inside[c, r], *(~x for x in self._inside(v, r))):
                    model.add_implication(served[-1], literal)
            for x in serving:
                model.add_bool_or(~x, *served)

    def apart(self) -> None:
        for a in self.nodes:
            for b in range(a + 1, self.problem.size):
                if self.never[a] >> b & 1:
                    for r in self.names[a]:
                        if (b, r) in self.inside:
                            self.model.add_at_most_one(self.inside[a, r], self.inside[b, r])

    def connected(self) -> None:
        for (v, r), inside in self.inside.items():
            if v != r:
                self.model.add_implication(inside, self.inside[self.around[r].via[v], r])
                self._separate([v], r)

    def split(self, piece: Sequence[int]) -> None:
        """Lets no node of ``piece`` be with a first node outside it unless what links them is."""
        for r in self.nodes:
            if r not in piece:
                self._separate(piece, r)

    def _separate(self, piece: Sequence[int], r: int) -> None:
        members = [self.inside[v, r] for v in piece if (v, r) in self.inside]
        for border in self.around[r].separators(piece, self.links) if members else ():
            joined = [self.inside[w, r] for w in border]
            for inside in members:
                self.model.add_bool_or(~inside, *joined)

    def convex(self) -> None:
        for u in self.nodes:
            for w in self.successors[u]:
                for v in range(w + 1, self.problem.size):
                    if not self.below[w] >> v & 1:
                        continue
                    for r in self.names[u]:
                        if (v, r) in self.inside:
                            unless = [*self._inside(w, r)]
                            if u in self.copied:
                                unless += [self.inside[u, s] for s in self.names[u] if s != r]
                            self.model.add_bool_or(~self.inside[u, r], ~self.inside[v, r], *unless)

    def cuts(self) -> None:
        for u in self.nodes:
            for v in self.successors[u]:
                if self.never[u] >> v & 1:
                    self.cut[u, v] = None
                    continue
                cut = self.cut[u, v] = self.model.new_bool_var(f"cut_{u}_{v}")
                for r in self.names[v]:
                    self.model.add_bool_or(cut, ~self.inside[v, r], *self._inside(u, r))
                for r in self.names[u] if u not in self.copied else ():
                    self.model.add_bool_or(cut, ~self.inside[u, r], *self._inside(v, r))

    def acyclic(self) -> None:
        if self.time:
            return
        model, last = self.model, self.problem.size - 1
        self.time = [model.new_int_var(0, last, f"time_{v}") for v in self.nodes]
        start = list(self.time)  # of the group of a name
        for r in sorted(self.copied):
            start[r] = model.new_int_var(0, last, f"start_{r}")
        for v in self.nodes:
            home = {r: self.inside[v, r] for r in self.names[v]}
            if v in self.copied:
                home = {r: model.new_bool_var(f"home_{v}_{r}") for r in home}
                model.add_exactly_one(home.values())
            for r, here in home.items():
                model.add_implication(here, self.inside[v, r])
                if v != r or v in self.copied:
                    model.add(self.time[v] == start[r]).only_enforce_if(here)
        for (u, v), cut in self.cut.items():
            if v not in self.copied:
                later = model.add(self.time[v] >= self.time[u] + 1)
                if cut is not None:
                    later.only_enforce_if(cut)
                continue
            for r in self.names[v]:
                without = [self.inside[v, r], *(~x for x in self._inside(u, r))]
                model.add(start[r] >= self.time[u] + 1).only_enforce_if(without)

    def one_space(self) -> None:
        problem, model = self.problem, self.model
        labels = apart.widest(problem)
        plain = [label for label in labels if not problem.labels[label].product]
        if plain and all(firm >> plain[0] & 1 for firm in problem.firm):
            return
        consumers = problem.consumers()
        for r in self.nodes:
            space = {label: model.new_bool_var(f"space_{r}_{label}") for label in labels}
            model.add_exactly_one(space.values())
            products = [x for p, _ in problem.products for x in self._inside(p, r)]
            for label, chosen in space.items():
                if problem.labels[label].product:
                    model.add_bool_or(~chosen, *products)
            for v in self.nodes:
                if (v, r) not in self.inside:
                    continue
                for label, chosen in space.items():
                    if problem.firm[v] >> label & 1:
                        continue
                    unless = [~self.inside[v, r], ~chosen]
                    if problem.inner[v] >> label & 1:
                        for c in sorted(consumers[v]):
                            if v not in self.copied:
                                model.add_bool_or(*unless, *self._inside(c, r))
                            cut = self.cut[v, c]
                            if cut is None or self.copied & {v, c}:
                                model.add_bool_or(*unless, *([] if cut is None else [~cut]))
                    else:
                        model.add_bool_or(*unless)

    def traffic(self) -> None:
        problem, model = self.problem, self.model
        for v in self.nodes:
            if problem.free[v]:
                self.alone[v] = self._lonely(v)
        terms = [(problem.launch, self.inside[r, r]) for r in self.nodes]
        terms += [(-problem.launch, alone) for alone in self.alone.values()]
        company = [(v, dearer) for v, dearer in problem.products if dearer]
        terms += [(-dearer, self._lonely(v)) for v, dearer in company]
        terms += [(price, x) for v, price in problem.copies for x in self._memberships(v)]
        for t, tensor in enumerate(problem.tensors):
            u = tensor.producer
            if u is not None and (tensor.leaves or tensor.consumers):
                written = self.written[t] = model.new_bool_var(f"written_{t}")
                terms.append((tensor.nbytes, written))
                spared = [written, *self._alone(u)]
                if tensor.leaves:
                    model.add_bool_or(spared)
                for c in tensor.consumers:
                    cut = self.cut[u, c]
                    model.add_bool_or(spared if cut is None else [*spared, ~cut])
            terms += self._reads(t)
        fixed = sum(dearer for _, dearer in company) - sum(price for _, price in problem.copies)
        model.minimize(fixed + sum(weight * variable for weight, variable in terms))

    def operands(self) -> None:
        problem, model = self.problem, self.model
        if not 0 < problem.operands < len(problem.tensors):
            return
        touched = collections.Counter(
            v
            for tensor in problem.tensors
            for v in (*tensor.consumers, *([] if tensor.producer is None else [tensor.producer]))
        )
        crowded = {v for v, count in touched.items() if count > problem.operands}
        for r in self.nodes:
            if any((v, r) in self.inside for v in crowded):
                continue  # such a node may be alone
            uses: list[cp_model.IntVar] = []
            for t, tensor in enumerate(problem.tensors):
                u = tensor.producer
                made = [] if u is None else self._inside(u, r)
                shares = zip(tensor.consumers, tensor.read_bytes, strict=True)
                readers = [x for c, amount in shares if amount for x in self._inside(c, r)]
                stored = made if u not in self.copied and t in self.written else []
                if not readers and not stored:
                    continue
                uses.append(model.new_bool_var(f"uses_{r}_{t}"))
                for reader in readers:
                    model.add_bool_or(uses[-1], ~reader, *made)
                for maker in stored:
                    model.add_bool_or(uses[-1], ~maker, ~self.written[t])
            if len(uses) > problem.operands:
                model.add(sum(uses) <= problem.operands)

    def _lonely(self, v: int) -> cp_model.IntVar:
        """A variable that is true only if a node is a group by itself."""
        alone = self.model.new_bool_var(f"alone_{v}")
        self.model.add_implication(alone, self.inside[v, v])
        for w in self.nodes:
            for inside in self._inside(w, v) if w != v else ():
                self.model.add_implication(alone, ~inside)
        return alone

    def _reads(self, t: int) -> list[tuple[int, cp_model.IntVar]]:
        """A group with consumers of different shares of a tensor reads the largest share."""
        tensor = self.problem.tensors[t]
        terms: list[tuple[int, cp_model.IntVar]] = []
        for r in self.nodes:
            readers = [
                (c, amount)
                for c, amount in zip(tensor.consumers, tensor.read_bytes, strict=True)
                if amount and (c, r) in self.inside
            ]
            paid = 0
            for share in sorted({amount for _, amount in readers}):
                read = self.model.new_bool_var(f"read_{t}_{r}_{share}")
                terms.append((share - paid, read))
                paid = share
                for c, amount in readers:
                    if amount >= share:
                        spared = self._alone(c) if c == r else []
                        if tensor.producer is not None:
                            spared += self._inside(tensor.producer, r)
                        self.model.add_bool_or(read, ~self.inside[c, r], *spared)
        return terms

    def refused(self, cut: Refusal) -> None:
        for r in self.nodes if cut.rest else (self.problem.name(cut.nodes),):
            if not all((v, r) in self.inside for v in cut.nodes):
                continue
            together = [~self.inside[v, r] for v in cut.nodes]
            if not cut.rest:
                others = sorted(set(self.nodes).difference(cut.nodes))
                self.model.add_bool_or(*together, *(x for v in others for x in self._inside(v, r)))
                continue
            # A result is stored unless all its readers are in the group.
            spared = itertools.product(*(self._readers(t, cut.nodes, r) for t in cut.stored))
            for readers in spared:
                self.model.add_bool_or(*together, *(x for x in readers if x is not None))

    def _readers(self, t: int, nodes: Sequence[int], r: int) -> Sequence[cp_model.BoolVarT | None]:
        """Literals that are all true if a tensor is not stored; None where it is in any case."""
        tensor = self.problem.tensors[t]
        u = tensor.producer
        assert u is not None
        readers: list[cp_model.BoolVarT | None] = []
        for c in tensor.consumers:
            if c in self.copied:
                cut = self.cut[u, c]
                readers.append(None if cut is None else ~cut)
            elif c not in nodes:
                readers.append(self.inside.get((c, r)))
        return [None] if tensor.leaves or not all(x is not None for x in readers) else readers

    def solve(self, hint: Grouping, limits: Limits) -> Answer:
        """The cheapest grouping that respects the problem and the cuts so far."""
        self._hint(hint)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.linearization_level = 2
        solver.parameters.cp_model_probing_level = 0
        solver.parameters.max_presolve_iterations = 1
        solver.parameters.max_deterministic_time = limits.work
        solver.parameters.max_time_in_seconds = limits.seconds
        status = solver.solve(self.model)
        spent = float(solver.response_proto.deterministic_time)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return Answer(None, 0, False, spent)
        groups: dict[int, list[int]] = {}
        for (v, r), inside in self.inside.items():
            if solver.boolean_value(inside):
                groups.setdefault(r, []).append(v)
        bound = round(solver.best_objective_bound)
        return Answer(sorted(groups.values()), bound, status == cp_model.OPTIMAL, spent)

    def _hint(self, groups: Grouping) -> None:
        self.model.clear_hints()
        held = {(node, self.problem.name(group)) for group in groups for node in group}
        for pair, inside in self.inside.items():
            self.model.add_hint(inside, pair in held)
        if not self.time:
            return
        ready: set[int] = set()
        for rank, index in enumerate(order.schedule(groups, self.successors)):
            for node in (n for n in groups[index] if n not in ready):
                self.model.add_hint(self.time[node], rank)
            ready.update(groups[index])

    def _memberships(self, v: int) -> list[cp_model.IntVar]:
        return [self.inside[v, r] for r in self.names[v]]

    def _inside(self, v: int, r: int) -> list[cp_model.IntVar]:
        """The variable, in a list that is empty where v cannot be in a group of r."""
        variable = self.inside.get((v, r))
        return [] if variable is None else [variable]

    def _alone(self, v: int) -> list[cp_model.IntVar]:
        return [self.alone[v]] if v in self.alone else []
