"""The integer program of one component.

Variables, for the nodes v and r of a :class:`~.problem.Problem` in executable order::

    in[v, r]      bool  v is in the group that is named by its node r, a matrix product or the first
                        (``Problem.name``); in[r, r] says that there is such a group
    space[r, l]   bool  the group of r has label l
    cut[u, v]     bool  some group has v, which depends on u, and not u
    written[t]    bool  tensor t goes to memory
    writes[t, r]  bool  the group of r does that
    read[t, r]    bool  the group of r fetches t from memory
    kernel[r]     bool  the group of r is a kernel of ours, not one of XLA's
    call[c]       bool  there is a group that XLA runs as one call of cuBLAS
    waits[r]      int   what the group of r takes longer than moving its bytes
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
* ``traffic``, ``times``: the objective of :meth:`~.problem.Problem.cost`, term for term. A maximum
  is the bytes and what is ``waits`` beyond them, which no more than one lower bound for each line
  of the formula keeps above 0: bytes that nobody needs to move would only be dearer.
* ``arithmetic``: a line of that formula that few groups reach; added lazily, once a group does.
* ``measured``: known times of whole groups in place of the formula's.
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
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from time import monotonic

from ortools.sat.python import cp_model

from jevt.partition import apart, connect, order
from jevt.partition.problem import Grouping, Problem, Product, Work
from jevt.partition.refusals import Refusal

type Pair = tuple[int, int]
type Searching = Callable[[], contextlib.AbstractContextManager[object]]
type Term = tuple[int, cp_model.IntVar]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long the solver may search, and what surrounds the search.

    Attributes:
      work: in its own deterministic seconds.
      seconds: by the clock.
      searching: entered for the search, in which no Python runs.
    """

    work: float
    seconds: float
    searching: Searching = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Answer:
    """A grouping, None if none was found in time, and a lower bound on the cost of any."""

    groups: Grouping | None
    bound: int
    optimal: bool
    spent: float


class OutOfTime(Exception):
    """The deadline has passed while a program was being written down."""


class Program:
    """The CP-SAT model of a problem; can be solved again after more cuts.

    Args:
      problem: one component.
      deadline: by ``time.monotonic``, for writing the program down.

    Raises:
      OutOfTime: it has passed.
    """

    def __init__(self, problem: Problem, deadline: float = math.inf) -> None:
        self.problem = problem
        self.deadline = deadline
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
        self.copied = set(problem.copies)
        self.products = {product.node for product in problem.products}
        self.kernel: dict[int, cp_model.IntVar | None] = {}
        self.several: dict[int, cp_model.IntVar] = {}
        self.waits: dict[int, cp_model.IntVar] = {}
        self.moved: list[list[Term]] = [[] for _ in self.nodes]  # for each name, bytes
        self.names: list[list[int]] = [[] for _ in self.nodes]  # for each node, its groups' names
        self.one_group()
        self.apart()
        self.connected()
        self.convex()
        self.cuts()
        self.read_or_written()
        self.one_space()
        self.kernels()
        terms = [*self.traffic(), *self.times(), *self.measured()]
        self.model.minimize(_sum(terms) - len(problem.copies))
        self.operands()

    @property
    def nodes(self) -> range:
        return range(self.problem.size)

    def timed(self) -> Iterator[int]:
        """The nodes, as long as there is time."""
        for node in self.nodes:
            if monotonic() > self.deadline:
                raise OutOfTime
            yield node

    def one_group(self) -> None:
        model = self.model
        for r in self.timed():
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
        for a in self.timed():
            for b in range(a + 1, self.problem.size):
                if self.never[a] >> b & 1:
                    for r in self.names[a]:
                        if (b, r) in self.inside:
                            self.model.add_at_most_one(self.inside[a, r], self.inside[b, r])

    def connected(self) -> None:
        for r in self.timed():
            for v, nearest in sorted(self.around[r].via.items()):
                if v != r:
                    self.model.add_implication(self.inside[v, r], self.inside[nearest, r])
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
        for u in self.timed():
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
        for u in self.timed():
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
        for r in self.timed():
            space = {label: model.new_bool_var(f"space_{r}_{label}") for label in labels}
            model.add_exactly_one(space.values())
            products = [x for p in problem.products for x in self._inside(p.node, r)]
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

    def kernels(self) -> None:
        """Which groups are a kernel of ours, by choice or because they are none of XLA's."""
        problem, model = self.problem, self.model
        if problem.launch.xla is None:
            return
        for r in self.nodes:
            kernel = self.kernel[r] = model.new_bool_var(f"kernel_{r}")
            model.add_implication(kernel, self.inside[r, r])
            for a, b in problem.chained if r not in self.products else ():
                both = [~x for node in (a, b) for x in self._inside(node, r)]
                if len(both) == 2:
                    model.add_bool_or(kernel, *both)

    def traffic(self) -> list[Term]:
        """What groups read and write."""
        problem, model = self.problem, self.model
        for v in self.nodes:
            if problem.free[v]:
                self.alone[v] = self._lonely(v)
        terms: list[Term] = []
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
                self._writes(t, written)
            terms += self._reads(t)
        return terms

    def _writes(self, t: int, written: cp_model.IntVar) -> None:
        """Whose group writes a tensor."""
        tensor, model = self.problem.tensors[t], self.model
        u = tensor.producer
        assert u is not None
        writes = {r: model.new_bool_var(f"writes_{t}_{r}") for r in self.names[u]}
        if u in self.copied:  # it is nobody's where several groups could
            shared, several = model.new_bool_var(f"shared_{t}"), self._several(u)
            model.add_implication(shared, several)
            model.add_bool_or(shared, ~several, ~written)
            model.add(sum(writes.values()) + shared == written)
        else:
            model.add(sum(writes.values()) == written)
        for r, here in writes.items():
            model.add_implication(here, self.inside[u, r])
            self.moved[r].append((tensor.nbytes, here))
            kernel = self.kernel.get(r)
            if kernel is not None and not tensor.late and r not in self.products:
                for v in self._members(r, lambda work: work.sums):
                    model.add_bool_or(kernel, ~here, ~self.inside[v, r])

    def _several(self, u: int) -> cp_model.IntVar:
        """A variable that says whether several groups hold a node."""
        if u not in self.several:
            several = self.several[u] = self.model.new_bool_var(f"several_{u}")
            holders = self._memberships(u)
            self.model.add(sum(holders) >= 1 + several)
            self.model.add(sum(holders) <= 1 + len(holders) * several)
        return self.several[u]

    def times(self) -> list[Term]:
        """Launches, and what groups take longer than moving their bytes."""
        problem, model, launch = self.problem, self.model, self.problem.launch
        terms: list[Term] = [(1, x) for v in problem.copies for x in self._memberships(v)]
        most = sum(w.ours + w.xla for w in problem.works) + sum(t.nbytes for t in problem.tensors)
        most += sum(p.mainloop + sum(time for _, time in p.calls) for p in problem.products)
        most = 2 * launch.exposed * most // 100 + most
        for r in self.timed():
            terms.append((launch.least, self.inside[r, r]))
            terms += [(-launch.least, alone) for v, alone in self.alone.items() if v == r]
            kernel = self.kernel.get(r)
            if kernel is not None and launch.xla is not None:
                terms.append((launch.ours - launch.xla, kernel))
                longer = self._members(r, lambda work: work.more > 0)
                for v in longer if r not in self.products else ():
                    terms.append((problem.works[v].more, self._all([self.inside[v, r]], [kernel])))
            waits = self.waits[r] = model.new_int_var(0, most, f"waits_{r}")
            terms.append((1, waits))
            self._wait(r, waits)
            terms += self._parts(r)
        return terms

    def arithmetic(self) -> None:
        """Lets no group run faster than its arithmetic."""
        problem, model = self.problem, self.model
        waits, self.waits = self.waits, {}
        for r, wait in waits.items():
            if r in self.products:
                continue  # whose lines have it
            kernel, time = self.kernel.get(r), wait + _sum(self.moved[r])
            ours, xla = (self._work(r, amounts) for amounts in problem.arithmetic())
            model.add(time >= _sum(ours))
            if kernel is not None and xla != ours:
                model.add(time + sum(amount for amount, _ in xla) * kernel >= _sum(xla))

    def _work(self, r: int, amounts: Sequence[int]) -> list[Term]:
        return [(n, x) for v, n in enumerate(amounts) if n for x in self._inside(v, r)]

    def _wait(self, r: int, waits: cp_model.IntVar) -> None:
        """What a group takes longer than moving its bytes, but for plain arithmetic."""
        kernel, moved = self.kernel.get(r), _sum(self.moved[r])
        for product in self.problem.products:
            if product.node == r:
                self._tiles(product, waits, moved)
                return
        if kernel is not None:
            for v in self._members(r, lambda work: work.sums):
                self.model.add(3 * waits >= moved).only_enforce_if(self.inside[v, r], ~kernel)

    def _tiles(self, product: Product, waits: cp_model.IntVar, moved: cp_model.LinearExpr) -> None:
        """What a product takes in a kernel of ours, or as a call of cuBLAS."""
        problem, model, exposed = self.problem, self.model, self.problem.launch.exposed
        r, calls = product.node, []
        work = _sum(self._work(r, problem.arithmetic()[0]))
        longest: list[Term] = []
        tiles = 100 * product.mainloop - exposed * product.moved
        unless: list[Term] = []
        for nodes, whole in product.calls:
            if problem.name(nodes) == r and all((v, r) in self.inside for v in nodes):
                call = self._exactly(nodes, r)
                calls.append(call)
                longest.append((whole - problem.launch.least - product.mainloop, call))
                most = problem.traffic(nodes)[0] + sum(problem.works[v].ours for v in nodes)
                unless.append((100 * product.mainloop + exposed * most, call))
        time = waits + moved
        model.add(time >= product.mainloop + _sum(longest))
        for epilogue in (moved + work, product.moved + work):
            model.add(100 * time + _sum(unless) >= tiles + exposed * epilogue)
        kernel = self.kernel.get(r)
        if kernel is not None:
            model.add_exactly_one(kernel, *calls)

    def _parts(self, r: int) -> list[Term]:
        """Second stages of what a kernel of ours reduces."""
        problem, kernel = self.problem, self.kernel.get(r)
        ours = [] if kernel is None else [kernel]
        whole = [self.inside[v, r] for v in self._members(r, lambda work: work.rows)]
        terms: list[Term] = []
        for v in self._members(r, lambda work: any(work.parts)):
            made = self._all([self.inside[v, r], *ours], [])
            short, long, beside = problem.works[v].parts
            if r in self.products:
                terms.append((beside, made))
                continue
            terms.append((short, made))
            if long > short and whole:
                longer = self.model.new_bool_var(f"longer_{v}_{r}")
                terms.append((long - short, longer))
                for x in whole:
                    self.model.add_bool_or(longer, ~x, ~made)
        if problem.launch.stage and terms:
            stage = self.model.new_bool_var(f"stage_{r}")
            for amount, parts in terms:
                if amount:
                    self.model.add_implication(parts, stage)
            terms.append((problem.launch.stage, stage))
        return terms

    def measured(self) -> list[Term]:
        """Corrections for groups whose times are known."""
        terms: list[Term] = []
        for nodes, time in self.problem.known:
            r = self.problem.name(nodes)
            if all((v, r) in self.inside for v in nodes):
                moved, spread = self.problem.traffic(nodes)
                formula = dataclasses.replace(self.problem, known=()).time(nodes, moved, spread)
                if time != formula:
                    terms.append((time - formula, self._exactly(nodes, r)))
        return terms

    def _exactly(self, nodes: Sequence[int], r: int) -> cp_model.IntVar:
        """A variable that says whether the group of a name is exactly these nodes."""
        others = sorted(set(self.nodes).difference(nodes))
        return self._all(
            [self.inside[v, r] for v in nodes], [x for v in others for x in self._inside(v, r)]
        )

    def _all(
        self, true: Sequence[cp_model.IntVar], false: Sequence[cp_model.IntVar]
    ) -> cp_model.IntVar:
        """A variable that says whether these are all true, and those all false."""
        if len(true) == 1 and not false:
            return true[0]
        result = self.model.new_bool_var("all")
        for x in true:
            self.model.add_implication(result, x)
        for x in false:
            self.model.add_implication(result, ~x)
        self.model.add_bool_or(result, *(~x for x in true), *false)
        return result

    def _members(self, r: int, chosen: Callable[[Work], bool]) -> list[int]:
        """The nodes that may be in the group of a name and whose work is of a kind."""
        works = enumerate(self.problem.works)
        return [v for v, work in works if chosen(work) and (v, r) in self.inside]

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
        for r in self.timed():
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
                self.moved[r].append((share - paid, read))
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
            another = r in self.products and r not in cut.nodes
            if another or not all((v, r) in self.inside for v in cut.nodes):
                continue
            together = [~self.inside[v, r] for v in cut.nodes]
            together += [x for v in cut.unless for x in self._inside(v, r)]
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
        with limits.searching():
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


def _sum(terms: Sequence[Term]) -> cp_model.LinearExpr:
    return cp_model.LinearExpr.weighted_sum(
        [variable for _, variable in terms], [weight for weight, _ in terms]
    )
