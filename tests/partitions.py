"""What the partitioner's tests share: contexts, evaluation, random problems, brute force."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.extend.core import Literal

from jevt._context import Context
from jevt.partition import order
from jevt.partition.cost import DEVICES
from jevt.partition.plan import Plan
from jevt.partition.problem import Label, Launches, Problem, Product, Traffic, Work


def context(backend="auto", **fields) -> Context:
    platform = fields.pop("platform", "cuda")
    return Context(platform, backend, False, (), DEVICES["H100"], **fields)


def trace(function, *arguments):
    """The jaxpr after the passes, and its constants, which become its first inputs."""
    from jevt.pipeline import GRAPH_PASSES

    jaxpr = jax.make_jaxpr(function)(*arguments)
    for _, run in GRAPH_PASSES:
        jaxpr = run(jaxpr)
    return jaxpr.with_consts(()), list(jaxpr.consts)


def by_groups(plan: Plan, arguments):
    """Evaluates the groups one after another, each as a function of its own inputs."""
    env = dict(zip(plan.jaxpr.invars, arguments, strict=True))
    for group in plan.groups:
        operands = [env[v] for v in group.jaxpr.invars]  # a KeyError is a wrong order
        results = jax.core.eval_jaxpr(group.jaxpr, (), *operands)
        env.update(zip(group.jaxpr.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in plan.jaxpr.outvars]


def check_valid(plan: Plan, arguments, *, rtol=1e-6):
    """Every equation once, an executable order, and the values of the program."""
    for each in [plan, *(inner for _, inner in plan.nested)]:
        positions = sorted(p for group in each.groups for p in group.eqns)
        assert positions == list(range(len(each.jaxpr.eqns)))
        assert all(group.eqns == tuple(sorted(group.eqns)) for group in each.groups)
    expected = jax.core.eval_jaxpr(plan.jaxpr, (), *arguments)
    for got, want in zip(by_groups(plan, arguments), expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=rtol, atol=1e-6
        )


def set_partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in set_partitions(rest):
        yield [[first], *smaller]
        for index, group in enumerate(smaller):
            yield [*smaller[:index], [first, *group], *smaller[index + 1 :]]


def covers(problem: Problem, groups: list[list[int]]) -> Iterator[list[list[int]]]:
    """The groups as they are, and with further copies of nodes beside what reads them."""
    consumers = problem.consumers()

    def more(groups, copied):
        if not copied:
            yield [sorted(g) for g in groups]
            return
        node, *rest = copied  # last to first, so that what a copy reads may be copied too
        near = [g for g in groups if node not in g and not consumers[node].isdisjoint(g)]
        for count in range(len(near) + 1):
            for chosen in itertools.combinations(near, count):
                with_copies = [[*g, node] if g in chosen else g for g in groups]
                yield from more(with_copies, rest)

    yield from more(groups, sorted((node for node in problem.copies), reverse=True))


def traffic_only(problem: Problem) -> Problem:
    """The problem with EVT's objective: what is moved, and launches."""
    products = tuple(Product(p.node, 0, 0) for p in problem.products)
    launch = Launches(problem.launch.ours)
    return dataclasses.replace(
        problem, launch=launch, works=(Work(),) * problem.size, chained=(), products=products,
        copies=(),
    )  # fmt: skip


def brute_force(problem: Problem, accepts: Callable[[Sequence[int]], bool]) -> int:
    """The cost of the best valid grouping whose groups are accepted."""
    return min(
        problem.cost(groups)
        for disjoint in set_partitions(range(problem.size))
        for groups in covers(problem, disjoint)
        if all(len(g) == 1 or accepts(g) for g in groups) and problem.valid(groups)
    )


def cheaper(problem: Problem, cost: int) -> list[list[int]] | None:
    """A valid grouping without copies that costs less, by exhaustive search; None if there is none.

    Nodes are put into groups in their order. What the nodes so far cost only grows with more nodes,
    and what is a cycle among them stays one, so most of the search is cut off.
    """
    parts = [_first(problem, count) for count in range(problem.size + 1)]
    successors = [part.successors() for part in parts]
    apart = {frozenset(pair) for pair in problem.ordered}

    def search(groups: list[list[int]], node: int) -> list[list[int]] | None:
        if parts[node].cost(groups) >= cost:
            return None
        if len(order.schedule(groups, successors[node])) < len(groups):
            return None
        if node == problem.size:
            return groups if problem.valid(groups) else None
        for index, group in enumerate(groups):
            if not any(frozenset((other, node)) in apart for other in group):
                found = search([*groups[:index], [*group, node], *groups[index + 1 :]], node + 1)
                if found:
                    return found
        return search([*groups, [node]], node + 1)

    return search([], 0)


def _first(problem: Problem, count: int) -> Problem:
    """The problem of the first nodes, with what only they read and write."""
    tensors = []
    for tensor in problem.tensors:
        if tensor.producer is None or tensor.producer < count:
            inside = [i for i, c in enumerate(tensor.consumers) if c < count]
            consumers = tuple(tensor.consumers[i] for i in inside)
            shares = tuple(tensor.read_bytes[i] for i in inside)
            tensors.append(dataclasses.replace(tensor, consumers=consumers, read_bytes=shares))
    return dataclasses.replace(
        problem,
        size=count,
        tensors=tuple(tensors),
        ordered=tuple((a, b) for a, b in problem.ordered if b < count),
        works=problem.works[:count],
        chained=tuple((a, b) for a, b in problem.chained if b < count),
        products=tuple(p for p in problem.products if p.node < count),
        copies=(),
    )


def random_problem(
    seed: int, size: int, copies: int = 0, products: int = 0, near: int | None = None
) -> Problem:
    """A problem as ``components.pose`` could have made it.

    Args:
      seed: of the random choices.
      size: number of nodes.
      copies: number of nodes, at most, that several groups may hold.
      products: number of matrix products, at most.
      near: nodes read only so many nodes before them; by default any.
    """
    rng = random.Random(seed)
    labels = (Label(64, 0), Label(64, 8), Label(512, 0), Label(64, 0, product=True))
    multiply = set(rng.sample(range(size), min(products, size)))
    free = tuple(rng.random() < 0.15 and v not in multiply for v in range(size))
    reads: list[set[int]] = []
    for v in range(size):
        before = range(max(0, v - (near or v)), v)
        count = 1 if free[v] else rng.choice((1, 1, 2))
        reads.append(set(rng.sample(before, min(len(before), count))))
    firm = [rng.choice((0b1001, 0b1011, 0b1011, 0b0010, 0b0100, 0b1111)) for _ in range(size)]
    for v in multiply:
        firm[v] = 0b1000
    tensors: list[Traffic] = []
    chance = 0.05 if near is None else 0.5 / size
    apart = {(a, b) for b in range(size) for a in range(b) if rng.random() < chance}
    leaves = [rng.random() < 0.25 or not any(v in r for r in reads) for v in range(size)]
    for a, b in apart:
        leaves[a] |= a not in reads[b]  # there is a path outside
    for v in range(size):
        consumers = tuple(c for c in range(size) if v in reads[c])
        amount = rng.choice((0, 4, 32, 64, 256))
        if free[v] and reads[v]:  # a relabelled tensor has its operand's bytes
            amount = tensors[min(reads[v])].nbytes
        tensors.append(Traffic(amount, v, consumers, (amount,) * len(consumers), leaves[v]))
    for _ in range(rng.randrange(3)):
        consumers = tuple(sorted(rng.sample(range(size), rng.randrange(1, min(size, 4)))))
        consumers = tuple(c for c in consumers if not free[c])
        shares = tuple(rng.choice((16, 64)) for _ in consumers)
        tensors.append(Traffic(64, None, consumers, shares, False))
    inner = [0] * size
    direct = [(u, v) for v in range(size) for u in sorted(reads[v])]
    struck = {e for e in direct if rng.random() < 0.15 or e[1] in multiply}
    for v in reversed(range(size)):
        consumers = [c for c in range(size) if v in reads[c]]
        if consumers and not leaves[v] and not any((v, c) in struck for c in consumers):
            mask = 0b1111 & ~firm[v] if rng.random() < 0.5 and v not in multiply else 0
            for c in consumers:
                mask &= firm[c] | inner[c]
            inner[v] = mask
    place = [f | i for f, i in zip(firm, inner, strict=True)]
    edges = [(a, b) for a, b in direct if (a, b) not in struck | apart and place[a] & place[b]]
    ordered = sorted(apart | (set(direct) - set(edges)))
    siblings = {
        (a, b)
        for t in tensors
        for i, a in enumerate(t.consumers)
        for b in t.consumers[i + 1 :]
        if place[a] & place[b] and not multiply & {a, b}
    }
    # A small node whose edge was struck out after all has no place as such.
    for v in range(size):
        if any(u == v for u, _ in ordered):
            inner[v] = 0
    linked = {a for a, _ in edges}
    shared = [v for v in range(size) if not free[v] and v in linked and v not in multiply]
    again = sorted(rng.sample(shared, min(copies, len(shared)))) if copies else []
    return Problem(
        size,
        tuple(edges),
        tuple(sorted(siblings - set(edges) - set(ordered))),
        tuple(ordered),
        tuple(tensors),
        labels,
        tuple(firm),
        tuple(inner),
        free,
        **_prices(rng, reads, free, multiply, direct),
        copies=tuple(again),
    )


def _prices(rng, reads, free, multiply, direct):
    """Launches, and what nodes cost beside traffic: no less in a larger group than in a smaller."""
    ours = rng.choice((10, 100))
    exposed = rng.choice((70, 100, 125))
    launch = Launches(ours, rng.choice((None, ours // 2, ours)), ours // 2, exposed)
    works, products = [], []
    for v, alone in enumerate(free):
        plain = alone or v in multiply
        amount = 0 if plain else rng.choice((0, 0, 8, 64, 256))
        reduces = not plain and rng.random() < 0.4
        sums = reduces and rng.random() < 0.5
        short = rng.choice((0, 20)) * sums
        parts = (short, short + rng.choice((0, 20)) * sums, rng.choice((0, 20)) * reduces)
        more = ours // 2 * rng.choice((0, 1)) * reduces
        works.append(Work(amount, amount * rng.choice((1, 3)), more, sums, parts, reduces > sums))
        if v in multiply:
            mainloop = rng.choice((60, 200, 600))
            calls = [((v,), rng.choice((60, mainloop)))]
            readers = [c for c, operands in enumerate(reads) if v in operands]
            if len(readers) == 1 and not free[readers[0]]:
                calls.append(((v, readers[0]), calls[0][1]))
            moved = rng.choice((0, 64, 256))
            products.append(Product(v, mainloop, moved, tuple(calls) if launch.xla else ()))
    chained = tuple(sorted(e for e in direct if works[e[0]].rows and rng.random() < 0.7))
    found = {"launch": launch, "works": tuple(works), "chained": chained}
    return found | {"products": tuple(products)}
