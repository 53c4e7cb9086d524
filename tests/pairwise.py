"""EVT's own integer program of a partition, as an oracle for jevt's.

One 0/1 variable for each pair of nodes says whether they share a partition (ASPLOS 2024, section
5); transitivity takes three constraints for each three nodes, so it is for small problems only. It
shares no code with ``jevt.partition.ilp`` and states the same problem: convexity, acyclicity by
times, one iteration space a group. Its objective is EVT's, what is moved and launches
(``partitions.traffic_only``). That groups hang together is cut lazily. Nodes are in one group each.
"""

from __future__ import annotations

import itertools

from ortools.sat.python import cp_model

from jevt.partition.problem import Problem, components


def optimum(problem: Problem) -> int:
    """The cost of the best grouping."""
    program = _Pairwise(problem)
    links = problem.links()
    while True:
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        assert solver.solve(program.model) == cp_model.OPTIMAL
        groups = program.groups(solver)
        loose = [g for g in groups if len(components(g, links)) > 1]
        if not loose:
            return round(solver.objective_value)
        for group in loose:
            program.connect(group, links)


class _Pairwise:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = cp_model.CpModel()
        self.nodes = range(problem.size)
        self.same = {
            pair: self.model.new_bool_var("same") for pair in itertools.combinations(self.nodes, 2)
        }
        self.alone = [self._all([~self.together(u, v) for u in self.nodes if u != v])
                      for v in self.nodes]  # fmt: skip
        self._transitive()
        self._valid()
        self._one_space()
        self._objective()

    def together(self, u: int, v: int) -> cp_model.IntVar:
        return self.same[min(u, v), max(u, v)]

    def _all(self, literals) -> cp_model.IntVar:
        """A variable that is true exactly if all literals are."""
        result = self.model.new_bool_var("all")
        for literal in literals:
            self.model.add_implication(result, literal)
        self.model.add_bool_or(result, *(~x for x in literals))
        return result

    def _transitive(self) -> None:
        for u, v, w in itertools.permutations(self.nodes, 3):
            if u < w:
                self.model.add_bool_or(
                    ~self.together(u, v), ~self.together(v, w), self.together(u, w)
                )

    def _valid(self) -> None:
        """No path leaves a group and comes back, no groups wait for each other."""
        successors = self.problem.successors()
        below = [{v} for v in self.nodes]
        for v in reversed(self.nodes):
            for following in successors[v]:
                below[v] |= below[following]
        time = [self.model.new_int_var(0, self.problem.size, "time") for _ in self.nodes]
        for u, v in self.same:
            self.model.add(time[u] == time[v]).only_enforce_if(self.together(u, v))
        for u in self.nodes:
            for w in successors[u]:
                self.model.add(time[w] > time[u]).only_enforce_if(~self.together(u, w))
                for v in below[w] - {w}:
                    self.model.add_implication(self.together(u, v), self.together(u, w))
        products = [p.node for p in self.problem.products]
        for u, v in {*self.problem.ordered, *itertools.combinations(products, 2)}:
            self.model.add(self.together(u, v) == 0)

    def _one_space(self) -> None:
        problem, consumers = self.problem, self.problem.consumers()
        space = [[self.model.new_bool_var("space") for _ in problem.labels] for _ in self.nodes]
        products = [p.node for p in problem.products]
        for v in self.nodes:
            self.model.add_exactly_one(space[v])
            for bit, chosen in enumerate(space[v]):
                for u in range(v):
                    self.model.add_implication(chosen, space[u][bit]).only_enforce_if(
                        self.together(u, v)
                    )
                if problem.labels[bit].product and v not in products:
                    with_one = [self.together(p, v) for p in products]
                    self.model.add_bool_or(~chosen, self.alone[v], *with_one)
                if problem.firm[v] >> bit & 1:
                    continue
                if problem.inner[v] >> bit & 1:
                    for c in consumers[v]:
                        self.model.add_bool_or(~chosen, self.alone[v], self.together(v, c))
                else:
                    self.model.add_bool_or(~chosen, self.alone[v])

    def _objective(self) -> None:
        problem, model = self.problem, self.model
        terms = []
        idle = {v: self.alone[v] for v in self.nodes if problem.free[v]}
        for v in self.nodes:
            first = self._all([~self.together(u, v) for u in range(v)])
            terms.append(problem.launch.ours * first)
            if v in idle:
                terms.append(-problem.launch.ours * idle[v])
        for tensor in problem.tensors:
            u = tensor.producer
            if u is not None:
                written = model.new_bool_var("written")
                spared = [idle[u]] if u in idle else []
                for c in tensor.consumers:
                    model.add_bool_or(written, self.together(u, c), *spared)
                if tensor.leaves:
                    model.add_bool_or(written, *spared)
                terms.append(tensor.nbytes * written)
            readers = sorted(zip(tensor.read_bytes, tensor.consumers, strict=True), reverse=True)
            for index, (amount, c) in enumerate(readers):
                # The consumer with the largest share pays for its group.
                read = model.new_bool_var("read")
                for_free = [self.together(c, other) for _, other in readers[:index]]
                for_free += [self.together(u, c)] if u is not None else []
                for_free += [idle[c]] if c in idle else []
                model.add_bool_or(read, *for_free)
                terms.append(amount * read)
        model.minimize(sum(terms))

    def groups(self, solver: cp_model.CpSolver) -> list[list[int]]:
        near = {v: [] for v in self.nodes}
        for (u, v), same in self.same.items():
            if solver.boolean_value(same):
                near[u].append(v)
                near[v].append(u)
        return components(self.nodes, near)

    def connect(self, group: list[int], links: list[set[int]]) -> None:
        """A piece is with what lies outside it only together with one of its neighbours."""
        for piece in components(group, links):
            around = {w for v in piece for w in links[v]} - set(piece)
            for u in piece:
                for v in set(self.nodes) - set(piece):
                    near = [self.together(u, w) for w in around]
                    self.model.add_bool_or(~self.together(u, v), *near)
