"""Groups that do the same for tensors of their own: which are merged, when, and which are not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Var
from partitions import check_valid, context, trace

from jevt.lowering import multi_tensor, spec
from jevt.lowering.errors import NotFusible
from jevt.partition import from_json, partition, to_json
from jevt_kernels import codegen
from jevt_kernels.mainloops.multi_tensor import MAX_POINTERS
from jevt_kernels.multi_tensor import launches


def arrays(*shapes, dtype=np.float32):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(dtype) for shape in shapes]


def plan(function, *arguments, backend="auto", **fields):
    program, consts = trace(function, *arguments)
    assert not consts
    return partition(program, context(backend, **fields))


def merged(found):
    return [g for g in found.groups if g.kind == "multi_tensor"]


def sizes(group):
    return [m.size for m in group.spec.members]


def sgd(rate, weights, gradients):
    return [w - rate * g for w, g in zip(weights, gradients, strict=True)]


SHAPES = [(64, 32), (128,), (3, 16, 16), (4096,), (80,)]


@pytest.mark.parametrize("backend", ["auto", "triton", "interpret"])
def test_updates_are_one_kernel(backend):
    arguments = 0.1, arrays(*SHAPES), arrays(*SHAPES)
    found = plan(sgd, *arguments, backend=backend)
    (group,) = found.groups
    assert (group.target, group.kind, group.name) == ("triton", "multi_tensor", "g00_multi_tensor")
    assert sizes(group) == [2048, 128, 768, 4096, 80]
    assert len(group.spec.inputs) == 11, "the rate is one operand"
    # One launch of a kernel instead of five of XLA's.
    assert group.predicted_us == pytest.approx(3.0, abs=0.1)
    assert group.xla_us == pytest.approx(10.0, abs=0.1)
    check_valid(found, jax.tree.leaves(arguments))


@pytest.mark.parametrize(
    "fields",
    [{"backend": "xla"}, {"platform": "cpu"}, {"partitioned": True}],
    ids=["xla", "cpu", "partitioned"],
)
def test_nothing_is_merged_where_no_kernel_may_be(fields):
    found = plan(sgd, 0.1, arrays(*SHAPES), arrays(*SHAPES), **fields)
    assert len(found.groups) == len(SHAPES)
    assert {g.target for g in found.groups} == {"xla"}


def scaled_by_norms(weights, gradients):
    """As LAMB: an update relative to two norms of each tensor."""

    def one(w, g):
        update = g + 0.1 * w
        norm, other = jnp.square(w).sum(), jnp.square(update).sum()
        return w - jnp.where(other > 0, jnp.sqrt(norm / other), 1.0) * update

    return [one(w, g) for w, g in zip(weights, gradients, strict=True)]


@pytest.mark.parametrize("backend", ["auto", "triton", "interpret"])
def test_updates_with_norms_are_three_kernels(backend):
    """Of any shapes, a launch each for the parts of sums, the sums and the updates."""
    arguments = arrays(*SHAPES), arrays(*SHAPES)
    found = plan(scaled_by_norms, *arguments, backend=backend)
    (group,) = found.groups
    assert (group.target, group.kind) == ("triton", "multi_tensor")
    assert sizes(group) == [2048, 128, 768, 4096, 80]
    stages = codegen.generate(group.spec).stages
    assert [len(step.spec.members) for step in stages.steps] == [5, 5, 5]
    assert group.predicted_us == pytest.approx(9.0, abs=0.2)
    check_valid(found, jax.tree.leaves(arguments))


def test_updates_with_norms_have_pointers_for_sums():
    """Of 2 inputs and 1 result a member, and 2 sums of all; the rest is a launch of its own."""
    most = (MAX_POINTERS - 2) // 3
    many = [(32,)] * (most + 4)
    found = plan(scaled_by_norms, arrays(*many), arrays(*many))
    assert sorted(len(sizes(g)) for g in merged(found)) == [4, most]


def test_norms_of_rows_are_not_merged():
    def step(xs):
        return [x / jnp.square(x).sum(-1, keepdims=True) for x in xs]

    assert not merged(plan(step, arrays((8, 32), (16, 32)), backend="triton"))


LARGE = [(1 << 15,), (128,), (300, 16, 16), (4096,), (80,), (96, 7, 2), (64,), (2048,), (256, 256)]


def clipped(gradients, *others):
    """As ``optax.clip_by_global_norm``, with an update of what else is given."""
    norm = jnp.sqrt(sum(jnp.square(g.astype(jnp.float32)).sum() for g in gradients))
    scaled = [jnp.where(norm < 1, g, (g / norm.astype(g.dtype)) * 1.0) for g in gradients]
    return [w - 0.1 * g for w, g in zip(*others, scaled, strict=True)] if others else scaled


@pytest.mark.parametrize("backend", ["auto", "triton", "interpret"])
@pytest.mark.parametrize("count", [1, 2], ids=["alone", "updates"])
def test_clipping_takes_a_few_launches(count, backend):
    """Two for all sums, one for what is made of them, and one for what needs their norm."""
    arguments = [arrays(*LARGE)] * count
    found = plan(clipped, *arguments, backend=backend)
    assert [g.kind for g in found.groups if g.target == "triton"] == ["multi_tensor"] * 2
    sums, rest = merged(found)
    assert (len(sizes(sums)), len(sizes(rest))) == (9, 9)
    assert all(not v.aval.shape for v in sums.jaxpr.outvars)
    assert launches(sums.spec) == 2
    assert launches(rest.spec) == 1
    others = [g for g in found.groups if g not in (sums, rest)]
    assert {(g.target, g.reason) for g in others} == {("xla", "cost model: scalars only")}
    assert len(others) <= 2
    assert found.solution.status in ("trivial", "optimal")
    moved = sum(g.nbytes for g in arguments[0]) / context().device.bytes_per_us
    assert sums.predicted_us == pytest.approx(2 * 3.0 + moved, abs=0.1)
    check_valid(found, jax.tree.leaves(arguments), rtol=1e-5)


def test_clipping_of_several_types():
    """Each type has launches of its own; so have sizes that no vector divides."""
    wide, half = arrays(*LARGE), arrays(*LARGE[:6], (33,), (35,), dtype=jnp.bfloat16)
    found = plan(clipped, [*wide, *half])
    of_sums = [g for g in merged(found) if not g.jaxpr.outvars[0].aval.shape]
    assert [len(sizes(g)) for g in of_sums] == [9, 6, 2]
    assert [len(sizes(g)) for g in merged(found) if g not in of_sums] == [9, 6, 2]
    check_valid(found, [*wide, *half], rtol=2e-2)


def test_norms_that_are_results():
    """Of each tensor, beside that of all: one launch where each fits a program."""

    def step(xs):
        squares = [jnp.square(x).sum() for x in xs]
        return [jnp.sqrt(s) for s in squares], jnp.sqrt(sum(squares))

    found = plan(step, arrays(*[(16 * k,) for k in range(1, 9)]))
    (group,) = merged(found)
    assert len(group.jaxpr.outvars) == 16
    assert launches(group.spec) == 1
    check_valid(found, arrays(*[(16 * k,) for k in range(1, 9)]), rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda xs: sum(jnp.abs(x).max() for x in xs),
        lambda xs: jnp.all(jnp.stack([jnp.isfinite(x).all() for x in xs])),
    ],
    ids=["largest", "finite"],
)
def test_other_reductions(function):
    found = plan(function, arrays(*LARGE))
    assert [len(sizes(g)) for g in merged(found)] == [9]
    check_valid(found, arrays(*LARGE))


def test_norms_of_many_tensors_take_their_pointers():
    """One each, and one for the parts of all sums."""
    found = plan(lambda xs: clipped(xs)[0], arrays(*[(1 << 15,)] * 490))
    of_sums = [g for g in merged(found) if not g.jaxpr.outvars[0].aval.shape]
    assert sorted(len(sizes(g)) for g in of_sums) == [490 - (MAX_POINTERS - 1), MAX_POINTERS - 1]


def test_what_is_made_again_behind_a_norm():
    """Gradients with a factor are not written for the norm; short ones are, beside their sums."""

    def step(gradients, factor):
        return clipped([g.astype(jnp.float32) / factor for g in gradients])

    shapes = [*LARGE, (1 << 16,), (1 << 17,)]
    arguments = arrays(*shapes, dtype=jnp.bfloat16), np.float32(8)
    found = plan(step, *arguments)
    assert {g.kind for g in found.groups if g.target == "triton"} == {"multi_tensor"}
    stored = [
        v.aval.size for g in merged(found) for v in g.jaxpr.outvars if v not in outputs(found)
    ]
    assert max(stored) <= 1 << 14
    assert sum(size == 1 for size in stored) == 11
    check_valid(found, jax.tree.leaves(arguments), rtol=1e-4)


def outputs(found):
    return {v for v in found.jaxpr.outvars if isinstance(v, Var)}


def stacked(gradients):
    """The same in another spelling."""
    norm = jnp.sqrt(jnp.stack([jnp.square(g).sum() for g in gradients]).sum())
    return [jnp.where(norm < 1, g, g / norm) for g in gradients]


def backward(layers, width, rows, function=clipped):
    """Products whose results are gradients, and their norm."""

    def step(xs, ys):
        gradients = [x.T @ y for x, y in zip(xs, ys, strict=True)]
        return function(gradients)

    return step, (arrays(*[(rows, width)] * layers), arrays(*[(rows, width)] * layers))


def with_device(function, arguments, **fields):
    program, _ = trace(function, *arguments)
    device = dataclasses.replace(context().device, **fields)
    return partition(program, dataclasses.replace(context(), device=device))


@pytest.mark.parametrize("function", [clipped, stacked])
def test_norms_of_products(function):
    """Gradients wait for their norm in any case: sums of all, though they exceed the cache."""
    step, arguments = backward(8, 512, 64, function)
    found = with_device(step, arguments, l2_bytes=1 << 20)
    assert [(g.target, g.kind) for g in found.groups if "gemm" in g.kind] == [("xla", "gemm")] * 8
    assert [len(sizes(g)) for g in merged(found)] == [8, 8]
    check_valid(found, jax.tree.leaves(arguments), rtol=1e-4)


def test_products_whose_kernel_sums_up():
    """Where that costs less than reading the gradient once more: launches are shared, so it must
    be longer than the second stage, which is not."""
    step, arguments = backward(8, 1024, 64)  # 4 MiB of a gradient, 1.4 µs
    fast = {"kernel_flops_per_us": 1e12, "cublas_flops_per_us": 1e12, "exposed_epilogue": 0.0}
    found = with_device(step, arguments, **fast)
    assert all(len(g.jaxpr.eqns) <= 2 for g in found.groups if g.kind == "gemm")
    slow = found.context.device.bytes_per_us / 16  # 23 µs
    found = with_device(step, arguments, **fast, bytes_per_us=slow)
    products = [g for g in found.groups if g.kind == "gemm"]
    assert len(products) == 8
    assert all(g.target == "triton" and not g.jaxpr.outvars[-1].aval.shape for g in products)


def test_what_nothing_else_keeps_does_not_wait_for_a_norm():
    """Beyond what the cache holds."""

    def step(xs):
        return sum(jnp.square(lax.sort(x)).sum() for x in xs)

    shapes = [(1 << 18,)] * 8  # a mebibyte each
    found = with_device(step, (arrays(*shapes),), l2_bytes=7 << 19)
    assert [len(sizes(g)) for g in merged(found)] == [4, 4]


def test_types_and_computations_are_kept_apart():
    def step(xs, ys, zs):
        return [x * 2 for x in xs], [y * 2 for y in ys], [jnp.exp(z) for z in zs]

    halves = arrays((32,), (64,), dtype=jnp.bfloat16)
    arguments = arrays((32,), (64,)), halves, arrays((48,), (16,))
    found = plan(step, *arguments)
    assert [len(sizes(g)) for g in merged(found)] == [2, 2, 2]
    check_valid(found, jax.tree.leaves(arguments))


def test_sizes_that_no_vector_divides_are_kept_apart():
    arguments = 0.1, arrays((32,), (33,), (64,), (7, 5)), arrays((32,), (33,), (64,), (7, 5))
    assert [sizes(g) for g in merged(plan(sgd, *arguments))] == [[32, 64], [33, 35]]


def test_what_depends_on_each_other_is_not_merged():
    """Three rounds on two arrays: the same tree six times, between opaque equations."""

    def step(xs):
        for _ in range(3):
            xs = [lax.sort(x * 2 + 1) for x in xs]
        return xs

    arguments = arrays((512,), (64,))
    found = plan(step, arguments)
    assert [sizes(g) for g in merged(found)] == [[512, 64]] * 3
    check_valid(found, arguments)


def test_merges_that_would_be_a_cycle_together():
    """a → b and c → d, where a is like d and b like c: only one of the two pairs can be merged."""

    def step(x, y):
        a = lax.sort(x * 2)
        c = lax.sort(jnp.exp(y))
        return jnp.exp(a), c * 2

    arguments = arrays((512,), (64,))
    found = plan(step, *arguments)
    assert len(merged(found)) == 1
    check_valid(found, arguments)


def test_random_programs_stay_executable():
    generator = np.random.default_rng(0)
    functions = [lambda x: x * 2, jnp.exp, lax.sort, lambda x: x + 1]
    merges = 0
    for _ in range(30):
        choices = generator.integers(0, 4, (8, 3)).tolist()
        reads = [int(generator.integers(0, k + 1)) for k in range(8)]

        def step(x, choices=choices, reads=reads):
            values = [x]
            for read, chosen in zip(reads, choices, strict=True):
                value = values[read]
                for function in chosen:
                    value = lax.sort(functions[function](value))
                values.append(value)
            return values[1:]

        (argument,) = arrays((32,))
        found = plan(step, argument * 0.01)
        merges += len(merged(found))
        check_valid(found, [argument * 0.01], rtol=1e-5)
    assert merges > 10


def training(order, rows=512, width=512):
    """Gradients become ready from the last layer to the first; updates stand in ``order``."""

    def step(weights, x):
        grads = jax.grad(lambda ws: _loss(ws, x))(weights)
        return {k: weights[k] - 0.1 * grads[k] for k in order}

    def _loss(weights, x):
        for name in sorted(weights):
            x = jnp.sin(x @ weights[name])
        return x.sum()

    names = [f"w{k}" for k in range(8)]
    weights = dict(zip(names, arrays(*[(width, width)] * 8), strict=True))
    return step, (weights, arrays((rows, width))[0])


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_gradients_do_not_wait_for_long(seed):
    """Neighbours in time are merged, whatever the order of the updates, bounded by the cache."""
    order = [f"w{k}" for k in range(8)]
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    step, arguments = training(order)
    megabyte = 1 << 20  # of one gradient
    # Products of ours are slow, so that updates do not join them.
    device = dataclasses.replace(
        context().device, l2_bytes=int(2.5 * megabyte), kernel_flops_per_us=1.0
    )
    program, _ = trace(step, *arguments)
    found = partition(program, dataclasses.replace(context(), device=device))
    groups = merged(found)
    # Two wait for a third; the two gradients that are ready last may be ready at once.
    assert [len(sizes(g)) for g in groups] == [3, 3, 2]
    parameters = {v: k for k, v in enumerate(program.invars)}
    layers = [sorted(parameters[v] for v in g.jaxpr.invars if v in parameters) for g in groups]
    assert layers == [[5, 6, 7], [2, 3, 4], [0, 1]]
    check_valid(found, jax.tree.leaves(arguments), rtol=1e-3)


def test_gradients_that_wait_anyway_are_merged_in_any_size():
    """Where an update needs all gradients, nothing is kept longer than it would be."""

    def clipped(weights, raw):
        gradients = [lax.sort(g) for g in raw]
        scale = lax.sort(jnp.stack([g[-1] for g in gradients]))[-1]
        return [w - g * scale for w, g in zip(weights, gradients, strict=True)]

    shapes = [(1 << 18,)] * 6  # a mebibyte each
    device = dataclasses.replace(context().device, l2_bytes=1 << 20)
    program, _ = trace(clipped, arrays(*shapes), arrays(*shapes))
    found = partition(program, dataclasses.replace(context(), device=device))
    assert [len(sizes(g)) for g in merged(found)] == [6]


def test_a_scalar_of_each_ones_own():
    """As a trust ratio of LAMB."""

    def step(rate, ratios, weights, changes):
        return [w - rate * (r * c) for r, w, c in zip(ratios, weights, changes, strict=True)]

    arguments = 0.1, [np.float32(k) for k in range(3)], *[arrays((32,), (64,), (48,))] * 2
    found = plan(step, *arguments)
    (group,) = merged(found)
    assert sizes(group) == [32, 64, 48]
    assert sum(t.size == 1 for t in group.spec.inputs) == 4
    check_valid(found, jax.tree.leaves(arguments))


def test_what_xla_fuses_is_left_to_it():
    """A sum takes what it sums into its own kernel, and one reader what it alone reads."""

    def build(jaxpr, name):
        if len(jaxpr.eqns) > 1:
            raise NotFusible("one equation a kernel")
        return spec.build(jaxpr, name)

    def found(function):
        program, _ = trace(function, arrays((64, 32), (64, 48)))
        return [len(sizes(g)) for g in merged(partition(program, context(), build=build))]

    assert found(lambda xs: [jnp.exp(x).sum(1) for x in xs]) == []
    assert found(lambda xs: [lax.sort(jnp.exp(x)) for x in xs]) == [2]
    assert found(lambda xs: [jnp.sin(jnp.exp(x)) for x in xs]) == []
    # What is an output too is written in any case, and read again.
    assert found(lambda xs: [(e := jnp.exp(x), jnp.sin(e)) for x in xs]) == [2]


def test_what_is_made_for_other_groups_is_bounded_too():
    def step(xs):
        return [lax.sort(x * 2) for x in xs]

    arguments = arrays(*[(1 << 18,)] * 6)  # a mebibyte each
    device = dataclasses.replace(context().device, l2_bytes=2 << 20)
    program, _ = trace(step, arguments)
    found = partition(program, dataclasses.replace(context(), device=device))
    assert [len(sizes(g)) for g in merged(found)] == [2, 2, 2]


def test_a_launch_takes_so_many_pointers():
    count = 400
    shapes = [(16 * (1 + k % 3),) for k in range(count)]
    found = plan(sgd, 0.1, arrays(*shapes), arrays(*shapes))
    pointers = [len(g.spec.inputs) + len(g.spec.outputs) for g in merged(found)]
    assert sum(map(len, map(sizes, merged(found)))) == count
    assert len(pointers) == 3
    assert all(MAX_POINTERS // 2 < p <= MAX_POINTERS for p in pointers[:2])


def donating(function, donated, *arguments):
    program, _ = trace(function, *arguments)
    flags = tuple(d for d, a in zip(donated, arguments, strict=True) for _ in jax.tree.leaves(a))
    return partition(program, dataclasses.replace(context(), donated=flags))


def test_donated_tensors_are_kept_apart_from_others():
    """Were they merged, none could be written in place."""

    def step(kept, given, gradients):
        new = sgd(0.1, [*kept, *given], gradients)
        return new[: len(kept)], new[len(kept) :]

    kept, given = arrays((32,), (64,)), arrays((128,), (48,))
    found = donating(step, (False, True, False), kept, given, arrays((32,), (64,), (128,), (48,)))
    assert [sizes(g) for g in merged(found)] == [[32, 64], [128, 48]]


def test_a_donated_tensor_is_overwritten_after_its_last_reader():
    """The update could run first, as its gradient is given."""

    def step(weights, gradients, x):
        return [jnp.sin(x @ w) for w in weights], sgd(0.1, weights, gradients)

    arguments = arrays((64, 64), (64, 64)), arrays((64, 64), (64, 64)), arrays((64, 64))[0]
    first = donating(step, (False, False, False), *arguments)
    assert first.groups[0].kind == "multi_tensor"
    last = donating(step, (True, False, False), *arguments)
    assert last.groups[-1].kind == "multi_tensor"


def test_bodies_of_loops():
    def step(xs):
        def body(carry, _):
            return [lax.sort(x * 2 + 1) for x in carry], None

        return lax.scan(body, xs, None, length=3)[0]

    arguments = arrays((512,), (64,))
    found = plan(step, arguments)
    ((_, body),) = found.nested
    assert [sizes(g) for g in merged(body)] == [[512, 64]]
    check_valid(found, arguments, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (sgd, (0.1, arrays(*SHAPES), arrays(*SHAPES))),
        (clipped, (arrays(*LARGE), arrays(*LARGE))),
    ],
    ids=["sgd", "clipped"],
)
def test_round_trip_and_determinism(function, arguments):
    found = plan(function, *arguments)
    text = to_json(found)
    again = plan(function, *arguments)
    assert to_json(again) == text
    back = from_json(text, found.jaxpr)
    assert to_json(back) == text
    assert [_unnamed(g) for g in back.groups] == [_unnamed(g) for g in found.groups]
    assert str(back.groups[0].jaxpr) == str(found.groups[0].jaxpr)


def _unnamed(group):
    """A group's kernel, which has the name of the group's first place."""
    return group.spec and dataclasses.replace(group.spec, name="")


def test_json_that_does_not_fit():
    found = plan(sgd, 0.1, arrays((32,), (64,)), arrays((32,), (64,)))
    other, _ = trace(
        lambda r, w, g: [w[0] - r * g[0], w[1] + r * g[1]], 0.1, *[arrays((32,), (64,))] * 2
    )
    with pytest.raises(ValueError, match="to be a kernel, as in the plan; got: .*compute the same"):
        from_json(to_json(found), other)


def test_fuel_counts_a_launch():
    assert merged(plan(sgd, 0.1, arrays(*SHAPES), arrays(*SHAPES), fuel=1))[0].target == "triton"
    (group,) = merged(plan(sgd, 0.1, arrays(*SHAPES), arrays(*SHAPES), fuel=0))
    assert (group.target, group.reason) == ("xla", "fuel: JEVT_FUEL is used up")


def test_parts_of_equations():
    """A scalar input holds none together; what it makes, or a shared array, does."""

    def function(rate, x, y, z):
        scale = rate * 2
        return x * scale, y * scale, z * rate, jnp.sin(z)

    program, _ = trace(function, 0.1, *arrays((8,), (9,), (10,)))
    assert [len(part.outvars) for part in multi_tensor.split(program)] == [2, 2]
