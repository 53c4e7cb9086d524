"""What a refused group says of other groups: no more than is true of them."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from partitions import brute_force, context, random_problem, trace

from jevt.partition import partition, solve
from jevt.partition.refusals import Oracle

LIMITS = solve.Limits(60.0)


def check(problem, accepts, seed):
    """The optimum under a ``build`` that takes what ``accepts`` says, by exhaustion."""
    outcome = solve.solve(problem, Oracle(accepts, lambda nodes, stored: accepts(nodes)), LIMITS)
    assert problem.valid(outcome.groups), seed
    assert all(len(g) == 1 or accepts(g) for g in outcome.groups), seed
    assert outcome.status == "optimal", seed
    assert outcome.cost == brute_force(problem, accepts), seed
    return outcome.groups


def test_readers_of_one_tensor_may_need_its_maker():
    together = 0
    for seed in range(150, 450):
        problem = random_problem(seed, (4, 5, 6)[seed % 3])
        if not (problem.edges or problem.siblings):
            continue
        makers: dict[frozenset[int], set[int]] = {}
        for tensor in problem.tensors:
            for pair in itertools.combinations(tensor.consumers, 2):
                if tensor.producer is not None:
                    makers.setdefault(frozenset(pair), set()).add(tensor.producer)

        def accepts(nodes, makers=makers):
            return all(not pair <= {*nodes} or some & {*nodes} for pair, some in makers.items())

        groups = check(problem, accepts, seed)
        together += any(pair <= {*group} for pair in makers for group in groups)
    assert together > 20


def test_what_no_other_kernel_holds_may_be_beside_a_matrix_product():
    together = 0
    for seed in range(150):
        problem = random_problem(seed, (4, 5, 6)[seed % 3], products=1)
        product = problem.products[0].node if problem.products else -1
        if product < 0 or not (problem.edges or problem.siblings):
            continue
        pairs = [{*pair} for pair in (*problem.edges, *problem.siblings) if product not in pair]

        def accepts(nodes, pairs=pairs, product=product):
            return product in nodes or not any(pair <= {*nodes} for pair in pairs)

        groups = check(problem, accepts, seed)
        together += any(pair <= {*group} for pair in pairs for group in groups)
    assert together > 10


@pytest.mark.parametrize("rows", [4096, 3000])
def test_a_sum_joins_the_product_whose_operand_its_neighbours_read(rows):
    """Without the product of a and b, the two that read it would be a kernel in no other way."""

    def program(a, b):
        squares = a * a
        product = squares @ squares[:1024]
        both = b * a
        return product, both, both.sum(0), product * (squares * both), b.max(1)

    shape = jax.ShapeDtypeStruct((rows, 1024), jnp.float32)
    plan = partition(trace(program, shape, shape)[0], context("triton"), workers=1)
    (gemm,) = (group for group in plan.groups if group.kind == "gemm")
    names = [eqn.primitive.name for eqn in gemm.jaxpr.eqns]
    assert names.count("reduce_sum") == 1
    assert names.count("mul") == 3
    assert plan.solution.status == "optimal"
