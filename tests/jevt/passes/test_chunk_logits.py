"""Logits in chunks of tokens: every spelling of the loss, the same values, less memory."""

from __future__ import annotations

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import partitions
import pytest
from jax.extend.core import check_jaxpr
from rewriting import count, evaluate, near, relative_norm

import jevt
from jevt import pipeline
from jevt.partition import cost, partition
from jevt.passes import chunk_logits
from jevt.passes.chunks import policy

BATCH, TOKENS, FEATURES, VOCABULARY = 4, 6, 8, 40

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture
def small(monkeypatch):
    """Eight rows are a chunk."""
    monkeypatch.setattr(policy, "MIN_ROWS", 8)
    monkeypatch.setattr(policy, "ALIGNED", 2)


def context(memory=1000, **changes):
    context = partitions.context("xla")
    device = dataclasses.replace(context.device, memory_bytes=memory)
    return dataclasses.replace(context, platform="cpu", device=device, **changes)


def run(fun, *args, **circumstances):
    """The program as it is traced, as the pass leaves it, and what the pass notes."""
    original = jaxpr = jax.make_jaxpr(fun)(*args)
    notes: list[str] = []
    planned_for = context(**circumstances)
    for name, graph_pass in pipeline.graph_passes(planned_for, notes.append):
        if name == "chunk_logits":
            notes.clear()
            result = graph_pass(jaxpr)
            check_jaxpr(result)
            assert result.in_avals == original.in_avals
            assert result.out_avals == original.out_avals
            noted = list(notes)
            assert graph_pass(result) is result, "not idempotent"
            return original, result, noted
        jaxpr = graph_pass(jaxpr)
    raise AssertionError("the pass is not in the pipeline")


values = functools.partial(evaluate, compiled=True)


def loops(jaxpr):
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


def largest(jaxpr):
    """Elements of the largest value that a program computes, bodies aside."""
    made = [v for eqn in jaxpr.eqns for v in eqn.outvars]
    return max(int(np.prod(v.aval.shape)) for v in made)


def in_chunks(fun, *args, chunks=3, tolerance=2e-6):
    """The program with its logits in chunks, after a look at its values."""
    original, result, notes = run(fun, *args)
    assert len(notes) == 1 and f": {chunks} chunks of " in notes[0], notes
    assert len(loops(result)) == 1
    near(values(result, *args), values(original, *args), tolerance)
    return result


def operands(shape=(BATCH, TOKENS), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    h = jax.random.normal(keys[0], (*shape, FEATURES), dtype)
    w = (jax.random.normal(keys[1], (FEATURES, VOCABULARY)) / 3).astype(dtype)
    b = jax.random.normal(keys[2], (VOCABULARY,), dtype)
    labels = jax.random.randint(keys[3], shape, 0, VOCABULARY)
    return h, w, b, labels


def step_of(loss):
    """``(h, w, b, labels) -> ((loss, extra), gradients)``."""
    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


def of_logits(loss):
    """A step of a loss of logits and labels, mean over tokens."""
    return step_of(lambda h, w, b, labels: (loss(h @ w + b, labels).mean(), ()))


def picked(values, labels):
    return jnp.take_along_axis(values, labels[..., None], -1)[..., 0]


def hot(labels):
    return jax.nn.one_hot(labels, VOCABULARY)


def smoothed(z, labels):
    return optax.softmax_cross_entropy(z, optax.smooth_labels(hot(labels), 0.1))


def z_loss(z, labels):
    return cross_entropy(z, labels) + 1e-2 * jax.nn.logsumexp(z, -1) ** 2


def ignored(z, labels):
    kept = labels != 3
    losses = cross_entropy(z, jnp.where(kept, labels, 0))
    return jnp.where(kept, losses, 0).sum() / kept.sum()


def weighted(z, labels):
    weights = jnp.cos(labels)
    return (cross_entropy(z, labels) * weights).sum() / weights.sum()


def focal(z, labels):
    log_p = picked(jax.nn.log_softmax(z), labels)
    return -((1 - jnp.exp(log_p)) ** 2) * log_p


def with_entropy(z, labels):
    log_p = jax.nn.log_softmax(z)
    return cross_entropy(z, labels) + 0.1 * (jnp.exp(log_p) * log_p).sum(-1)


LOSSES = {
    "optax": cross_entropy,
    "optax, float32": lambda z, n: cross_entropy(z.astype(jnp.float32), n),
    "sum": lambda z, n: cross_entropy(z, n).sum(),
    "log_softmax": lambda z, n: -picked(jax.nn.log_softmax(z), n),
    "one hot": lambda z, n: -(hot(n) * jax.nn.log_softmax(z)).sum(-1),
    "by index": lambda z, n: (
        -jax.nn.log_softmax(z.reshape(-1, VOCABULARY))[jnp.arange(n.size), n.ravel()]
    ),
    "probabilities": lambda z, n: -jnp.log(picked(jax.nn.softmax(z), n)),
    "flat": lambda z, n: cross_entropy(z.reshape(-1, VOCABULARY), n.ravel()),
    "smoothed": smoothed,
    "z-loss": z_loss,
    "ignored labels": ignored,
    "weights": weighted,
    "weights of sequences": lambda z, n: (
        cross_entropy(z, n) * jnp.arange(1.0, 1 + BATCH)[:, None]
    ).mean(),
    "temperatures of sequences": lambda z, n: cross_entropy(
        z * jnp.arange(1.0, 1 + BATCH)[:, None, None], n
    ),
    "focal": focal,
    "entropy": with_entropy,
    "soft cap": lambda z, n: cross_entropy(5 * jnp.tanh(z / 5), n),
    "clipped": lambda z, n: cross_entropy(jnp.clip(z, -1, 1), n),
    "padded vocabulary": lambda z, n: cross_entropy(
        jnp.where(jnp.arange(VOCABULARY) < 37, z, -1e9), n % 37
    ),
    "cut vocabulary": lambda z, n: cross_entropy(z[..., :37], n % 37),
    "a class more": lambda z, n: cross_entropy(
        jnp.concatenate([z, jnp.zeros_like(z[..., :1])], -1), n
    ),
    "no last token": lambda z, n: cross_entropy(z[:, :-1], n[:, 1:]),
    "no first token, flat": lambda z, n: cross_entropy(
        z[:, 1:].reshape(-1, VOCABULARY), n[:, 1:].ravel()
    ),
}

#: Where they are not 3 of 8 tokens.
CHUNKS = {"no last token": 2, "no first token, flat": 2}


@pytest.mark.parametrize("name", LOSSES)
def test_spellings(name, small):
    args = operands()
    result = in_chunks(of_logits(LOSSES[name]), *args, chunks=CHUNKS.get(name, 3))
    assert largest(result) < BATCH * (TOKENS - 1) * VOCABULARY / 2
    body = loops(result)[0].params["jaxpr"]
    assert count(body, "dot_general") == 3
    with jax.enable_x64(True):
        wide = [np.asarray(a).astype(np.float64) for a in args[:3]]
        exact = jax.jit(of_logits(LOSSES[name]))(*wide, args[3])
    assert relative_norm(values(result, *args), jax.tree.leaves(exact)) < 1e-6


@pytest.mark.parametrize("name", ["optax", "optax, float32", "z-loss", "no last token"])
def test_bfloat16(name, small):
    """As near to the exact values as under ``jax.jit``."""
    args = operands((5, 16), jnp.bfloat16)
    step = of_logits(LOSSES[name])
    _, result, notes = run(step, *args)
    assert "chunks of" in notes[0]
    with jax.enable_x64(True):
        wide = [np.asarray(a).astype(np.float64) for a in args[:3]]
        exact = jax.jit(step)(*wide, args[3])
    exact = jax.tree.leaves(exact)
    plain = jax.tree.leaves(jax.jit(step)(*args))
    for got, other, want in zip(values(result, *args), plain, exact, strict=True):
        assert got.dtype == other.dtype
        assert relative_norm([got], [want]) < 1.2 * relative_norm([other], [want]) + 1e-3


def test_sums_of_many_chunks_are_rounded_once(small):
    """In bfloat16, sums over 256 chunks would lose all but the first digit."""
    args = operands((2048,), jnp.bfloat16)
    step = of_logits(LOSSES["optax"])
    _, result, notes = run(step, *args)
    assert ": 256 chunks of 8 " in notes[0]
    plain = jax.tree.leaves(jax.jit(step)(*args))
    assert relative_norm(values(result, *args)[2:], plain[2:]) < 3e-3


def test_float64(small):
    with jax.enable_x64(True):
        args = operands(dtype=jnp.float64)
        in_chunks(of_logits(z_loss), *args, tolerance=1e-14)


@pytest.mark.parametrize(
    ("shape", "chunks"), [((24,), 3), ((1, 24), 3), ((2, 3, 4), 3), ((5, 5), 3), ((23,), 2)]
)
def test_shapes_of_batches(shape, chunks, small):
    """With a last chunk that is shorter, or with none."""
    in_chunks(of_logits(cross_entropy), *operands(shape), chunks=chunks)


def test_what_leaves_the_loop(small):
    """Losses of tokens, and predictions, beside the gradient."""

    def loss(h, w, b, labels):
        z = h @ w + b
        losses = cross_entropy(z, labels)
        best = jax.lax.top_k(z, 3)[1]
        return losses.mean(), (losses, z.argmax(-1), (best == labels[..., None]).any(-1).mean())

    in_chunks(step_of(loss), *operands())


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,)])
def test_one_gradient(wanted, small):
    fun = jax.grad(lambda h, w, b, labels: cross_entropy(h @ w + b, labels).mean(), wanted)
    in_chunks(fun, *operands())


def test_no_gradient(small):
    in_chunks(lambda h, w, b, labels: cross_entropy(h @ w + b, labels).mean(), *operands())


def test_recomputed_logits(small):
    """Under ``jax.checkpoint`` there are two products, and each has its loop."""
    loss = jax.checkpoint(lambda h, w, b, labels: (cross_entropy(h @ w + b, labels).mean(), ()))
    args = operands()
    original, result, notes = run(step_of(loss), *args)
    assert len(loops(result)) == len(notes) == 2
    assert count(result, "optimization_barrier") == 1
    near(values(result, *args), values(original, *args))


def test_soft_labels(small):
    _, _, _, labels = args = operands()
    targets = jax.nn.softmax(jnp.sin(jnp.arange(labels.size * VOCABULARY, dtype=jnp.float32)))
    targets = targets.reshape(BATCH, TOKENS, VOCABULARY)
    step = step_of(lambda h, w, b, t: (optax.softmax_cross_entropy(h @ w + b, t).mean(), ()))
    in_chunks(step, *args[:3], targets)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_is_in_the_loop(frozen, small):
    h, w, b, _ = operands()

    def loss(h, w, b, teacher):
        targets = jax.nn.softmax(jnp.tanh(h) @ teacher / 2)
        targets = jax.lax.stop_gradient(targets) if frozen else targets
        return optax.softmax_cross_entropy(h @ w + b, targets).mean(), ()

    result = in_chunks(step_of(loss), h, w, b, w[:, ::-1])
    assert count(result, "dot_general") == count(loops(result)[0].params["jaxpr"], "dot_general")


def test_tied_embeddings(small):
    """The gradient of the table is that of the layer and that of the lookup."""
    _, w, _, labels = operands()

    def loss(table, mix):
        return cross_entropy(jnp.tanh(table[labels] @ mix) @ table.T, labels[:, ::-1]).mean()

    in_chunks(jax.value_and_grad(loss, (0, 1)), w.T, jnp.eye(FEATURES) / 2)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, FEATURES, dtype=jnp.bfloat16)
        return embed.attend(nn.LayerNorm(dtype=jnp.bfloat16)(embed(tokens)))


class Untied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, FEATURES, dtype=jnp.bfloat16)(tokens)
        return nn.Dense(VOCABULARY, dtype=jnp.bfloat16)(nn.LayerNorm(dtype=jnp.bfloat16)(x))


@pytest.mark.parametrize("model", [Tied(), Untied()], ids=["tied", "untied"])
def test_flax(model, small):
    labels = operands()[3]
    params = model.init(jax.random.key(1), labels)

    def loss(params):
        z = model.apply(params, labels).astype(jnp.float32)
        return cross_entropy(z, jnp.roll(labels, -1, 1)).mean()

    in_chunks(jax.value_and_grad(loss), params, tolerance=2e-2)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, 0)])
def test_vmap(axes, small):
    args = operands()
    pairs = zip(args, axes, strict=True)
    both = [a if axis is None else jnp.stack([a, a[::-1]]) for a, axis in pairs]
    in_chunks(jax.vmap(of_logits(cross_entropy), axes), *both)


def test_gradients_accumulated_in_a_scan(small):
    h, w, b, labels = operands()

    def body(total, part):
        scale, targets = part
        (_, ()), (_, dw, _) = of_logits(cross_entropy)(h * scale, w, b, targets)
        return total + dw, None

    def fun(w, scales, targets):
        return jax.lax.scan(body, jnp.zeros_like(w), (scales, targets))[0]

    args = w, jnp.arange(3.0), jnp.stack([labels, labels[::-1], labels])
    original, result, notes = run(fun, *args)
    assert len(notes) == 1 and ": 3 chunks of 8 " in notes[0]
    assert len(loops(loops(result)[0].params["jaxpr"])) == 1
    near(values(result, *args), values(original, *args))


def test_shard_map(small):
    """Each device goes through its own tokens; sums vary over devices as they did."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec("i"), spec(), spec(), spec("i")), out_specs=spec()
    )
    def fun(h, w, b, labels):
        def loss(w):
            return jax.lax.pmean(cross_entropy(h @ w + b, labels).mean(), "i")

        return jax.grad(loss)(w)

    args = operands()
    original, result, notes = run(fun, *args)
    assert len(notes) == 1 and ": 3 chunks of 8 " in notes[0]
    near(values(result, *args), values(original, *args))


def printing(h, w, b, labels):
    def loss(w):
        value = cross_entropy(h @ w + b, labels).mean()
        jax.debug.print("{}", value)
        return value

    return jax.value_and_grad(loss)(w)


def test_effects_stay(small, capsys):
    args = operands()
    original, result, notes = run(printing, *args)
    assert "chunks of" in notes[0]
    evaluate(original, *args)
    jax.effects_barrier()
    want = capsys.readouterr().out
    evaluate(result, *args)
    jax.effects_barrier()
    assert capsys.readouterr().out == want != ""


def returned(h, w, b, labels):
    z = h @ w + b
    return cross_entropy(z, labels).mean(), z


def along_tokens(h, w, b, labels):
    z = h @ w + b
    return cross_entropy(z, labels).mean() + jnp.square(jnp.cumsum(z, 1)).mean(), ()


def sorted_logits(h, w, b, labels):
    z = h @ w + b
    return cross_entropy(z, labels).mean(), jnp.sort(z)[..., 0]


def half_shifted(h, w, b, labels):
    z = h @ w + b
    return cross_entropy(z[:, :-1], labels[:, 1:]).mean(), (z.argmax(-1) == labels).mean()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (returned, "are a result"),
        (along_tokens, "cumsum at .* reads them"),
        (sorted_logits, "sort at .* reads them"),
        (half_shifted, "slice at .* reads them"),
    ],
)
def test_what_stays_is_noted(loss, reason, small):
    args = operands()
    original, result, notes = run(step_of(loss), *args)
    assert not loops(result)
    (note,) = notes
    assert note.startswith("logits f32[4,6,40] at ")
    assert re.search(f"stay whole: .*{reason}", note), note
    near(values(result, *args), values(original, *args))


def perplexity(h, w, b, labels):
    return jnp.exp(cross_entropy(h @ w + b, labels).mean()), ()


def preference(h, w, b, labels):
    log_p = -cross_entropy(h @ w + b, labels).sum(-1)
    return -jax.nn.log_sigmoid(log_p[:2] - log_p[2:]).mean(), ()


def advantage(h, w, b, labels):
    losses = cross_entropy(h @ w + b, labels)
    return (losses * jax.lax.stop_gradient(losses - losses.mean())).mean(), ()


@pytest.mark.parametrize("loss", [perplexity, preference, advantage])
def test_a_gradient_that_waits_for_all_tokens_has_logits_of_its_own(loss, small):
    """A loop makes the loss, and another one the gradient."""
    args = operands()
    original, result, notes = run(step_of(loss), *args)
    assert sum("computed twice" in note for note in notes) == 1
    bodies = [loop.params["jaxpr"] for loop in loops(result)]
    assert sorted(count(body, "dot_general") for body in bodies) == [1, 3]
    assert largest(result) < BATCH * TOKENS * VOCABULARY / 2
    near(values(result, *args), values(original, *args))


def test_they_are_not_computed_twice_for_little_memory(small):
    memory = 8 * 2 * BATCH * TOKENS * VOCABULARY * 4
    _, result, (note,) = run(step_of(preference), *operands(), memory=memory)
    assert not loops(result)
    assert re.search("stay whole: what they are computed into waits for reduce_sum at ", note)


def test_automatic_partitioning(small):
    _, result, notes = run(of_logits(cross_entropy), *operands(), partitioned=True)
    assert not loops(result)
    assert notes[0].endswith("stay whole: tokens are partitioned automatically")


@pytest.mark.parametrize("memory", [64 << 30, 16 * 2 * 24 * VOCABULARY * 4])
def test_logits_that_are_not_large_stay(memory, small):
    """Up to a sixteenth of the memory."""
    _, result, notes = run(of_logits(cross_entropy), *operands(), memory=memory)
    assert not notes and not loops(result)


def test_few_tokens_stay():
    _, result, notes = run(of_logits(cross_entropy), *operands())
    assert not notes and not loops(result)


def test_no_gain_over_wide_features(small):
    """Hidden states as large as the logits."""
    h, w, labels = jnp.ones((24, 30)), jnp.ones((30, 40)), jnp.zeros(24, int)
    step = jax.value_and_grad(lambda h, w: cross_entropy(h @ w, labels).mean(), (0, 1))
    _, result, notes = run(step, h, w)
    assert not notes and not loops(result)


@pytest.mark.parametrize(
    ("rows", "wanted", "expected"),
    [
        (65536, 1000, 4096),
        (65536, 20000, 16384),
        (16384 - 32, 4096, 4088),  # even chunks may be a little shorter
        (3 * 4096 + 1, 4096, 4104),  # no divisor: 2 whole chunks and a shorter one
        (8192, 10**6, 4096),
    ],
)
def test_rows_of_a_chunk(rows, wanted, expected):
    assert policy.chunk_rows(rows, wanted) == expected


def test_attention_is_left_alone(small):
    """Although rows of scores depend on no others, forward and backward."""
    x = operands()[0]

    def loss(q, k, v):
        p = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k), -1)
        return jnp.square(jnp.einsum("bts,bsd->btd", p, v)).sum()

    q = jnp.concatenate([x, x, x, x], 1)
    _, result, _ = run(jax.grad(loss, (0, 1, 2)), q, q[..., ::-1], q)
    assert not loops(result)


def test_memory_and_values_of_a_compiled_step(monkeypatch):
    """The whole way through ``jevt.jit``."""
    rows, vocabulary = 16384, 512
    monkeypatch.setattr(cost, "CPU", dataclasses.replace(cost.CPU, memory_bytes=16 << 20))
    h = jax.random.normal(jax.random.key(0), (rows, FEATURES))
    w = jax.random.normal(jax.random.key(1), (FEATURES, vocabulary))
    labels = jnp.arange(rows) % vocabulary
    step = jax.value_and_grad(lambda h, w: cross_entropy(h @ w, labels).mean(), (0, 1))
    plain, ours = jax.jit(step), jevt.jit(step)
    logits = rows * vocabulary * 4
    compiled = ours.lower(h, w).compile()
    assert plain.lower(h, w).compile().memory_analysis().temp_size_in_bytes > logits
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * logits
    near(jax.tree.leaves(compiled(h, w)), jax.tree.leaves(plain(h, w)), 2e-6)
    assert "4 chunks of 4096 tokens" in str(jevt.last_trace(ours).stage("chunk_logits").notes)


def test_the_body_has_kernels():
    """Loss and gradient of a chunk are planned as those of whole logits are."""
    rows, features, vocabulary = 65536, 1024, 32000
    bf16 = jnp.bfloat16
    args = (
        jax.ShapeDtypeStruct((rows, features), bf16),
        jax.ShapeDtypeStruct((features, vocabulary), bf16),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )

    def loss(h, w, labels):
        return cross_entropy((h @ w).astype(jnp.float32), labels).mean()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*args)
    planned_for = partitions.context("triton")
    for _, graph_pass in pipeline.graph_passes(planned_for):
        jaxpr = graph_pass(jaxpr)
    ((_, body),) = partition(jaxpr, planned_for).nested
    kernels = [group for group in body.groups if group.target == "triton"]
    assert any(len(group.jaxpr.eqns) > 8 for group in kernels)
    assert largest(jaxpr) < rows * vocabulary


def test_nothing_is_done_to_programs_without_logits():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x @ x))(jnp.ones((8, 8)))
    assert chunk_logits.run(jaxpr, context()) is jaxpr


def test_the_memory_of_the_present_device_counts(monkeypatch):
    class Present:
        device_kind = "NVIDIA H100 80GB HBM3"
        compute_capability = "9.0"

        def memory_stats(self):
            return stats

    monkeypatch.setattr(jax, "devices", lambda platform: [Present()])
    stats = {"bytes_limit": 12345}
    assert cost.device_model("cuda").memory_bytes == 12345
    stats = None  # a platform that does not tell
    assert cost.device_model("cuda").memory_bytes == 60 * 10**9


@pytest.mark.interpret
def test_kernels_in_the_loop(monkeypatch, small):
    monkeypatch.setattr(cost, "CPU", dataclasses.replace(cost.CPU, memory_bytes=1000))
    args = operands((20,))
    step = of_logits(z_loss)
    ours = jevt.jit(step, backend="interpret")
    near(jax.tree.leaves(ours(*args)), jax.tree.leaves(jax.jit(step)(*args)), 1e-5)
    ((_, body),) = jevt.last_trace(ours).plan.nested
    assert any(group.target == "triton" and group.kind == "rowwise" for group in body.groups)
