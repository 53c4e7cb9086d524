"""Cross entropy, forward and backward in one kernel: its spellings, its values, what it moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from partitions import context

import jevt
from jevt import pipeline
from jevt.partition import partition
from jevt_kernels import aot, limits, visitor

TOKENS, VOCABULARY = 16384, 30528
LOGITS = jax.ShapeDtypeStruct((TOKENS, VOCABULARY), jnp.bfloat16)
LABELS = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)


def integer(logits, labels):
    wide = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels).mean()


def in_bfloat16(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def by_hand(logits, labels):
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()


def one_hot(logits, labels):
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -(jax.nn.one_hot(labels, logits.shape[-1]) * log_p).sum(-1).mean()


def smoothed(logits, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets).mean()


def ignoring(logits, labels):
    counts = labels >= 0
    wide = logits.astype(jnp.float32)
    kept = jnp.where(counts, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(wide, kept)
    return jnp.where(counts, losses, 0).sum() / jnp.maximum(counts.sum(), 1)


def with_z_loss(logits, labels):
    wide = logits.astype(jnp.float32)
    z = jax.nn.logsumexp(wide, axis=-1)
    picked = jnp.take_along_axis(wide, labels[:, None], axis=1)[:, 0]
    return (z - picked + 1e-4 * z * z).mean()


def soft(logits, targets):
    return optax.softmax_cross_entropy(
        logits.astype(jnp.float32), targets.astype(jnp.float32)
    ).mean()


LOSSES = {
    "integer": integer,
    "in bfloat16": in_bfloat16,
    "by hand": by_hand,
    "one hot": one_hot,
    "smoothed": smoothed,
    "ignoring": ignoring,
    "z loss": with_z_loss,
    "soft": soft,
}


def planned(function, *arguments):
    jaxpr = jax.make_jaxpr(function)(*arguments)
    planned_for = context("triton")
    for _, run in pipeline.graph_passes(planned_for):
        jaxpr = run(jaxpr)
    return partition(jaxpr.with_consts(()), planned_for).groups


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("read", [True, False], ids=["loss read", "gradient alone"])
def test_each_logit_is_read_once_and_its_gradient_written_once(name, read):
    target = LOGITS if name == "soft" else LABELS
    differentiate = jax.value_and_grad if read else jax.grad
    groups = planned(differentiate(LOSSES[name]), LOGITS, target)
    size = 2 * TOKENS * VOCABULARY
    large = [[t.nbytes >= size for t in (*g.spec.inputs, *g.spec.outputs)] for g in groups]
    assert [any(group) for group in large].count(True) == 1
    assert sum(map(sum, large)) == (3 if name == "soft" else 2)
    assert all(g.target == "triton" for g in groups)
    # The mean over tokens, and the number of those that count, are small kernels.
    assert len(groups) == 1 + read + (name == "ignoring")


@pytest.mark.interpret
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_values(name, dtype):
    """Of a vocabulary of odd size; logits on the way to overflow, one that is -inf."""
    keys = jax.random.split(jax.random.key(0), 3)
    logits = (8 * jax.random.normal(keys[0], (7, 45))).astype(dtype)
    labels = jax.random.randint(keys[1], (7,), 0, 40)
    if name == "ignoring":
        labels = labels.at[2].set(-100).at[5].set(-1)
    if name in ("integer", "by hand", "ignoring", "z loss"):
        logits = logits.at[1, 44].set(-jnp.inf).at[3, 41].set(300)
    target = labels
    if name == "soft":
        target = jax.nn.softmax(jax.random.normal(keys[2], (7, 45)))
    both = jax.value_and_grad(LOSSES[name])
    value, gradient = jevt.jit(both, backend="interpret")(logits, target)
    exact, slope = jax.jit(both)(logits.astype(jnp.float32), target)
    tolerance = 1e-5 if dtype == jnp.float32 else 8e-3
    np.testing.assert_allclose(float(value), float(exact), rtol=tolerance)
    assert gradient.dtype == dtype
    difference = np.asarray(gradient, np.float32) - np.asarray(slope)
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(slope)


@pytest.mark.interpret
def test_impossible_rows():
    """As ``jax.nn.softmax`` has it: no logit above -inf, an infinite one, one that is NaN."""
    logits = np.zeros((4, 6), np.float32)
    logits[0], logits[1, 2], logits[2, 3] = -np.inf, np.inf, np.nan
    labels = np.array([0, 2, 1, 5])

    def losses(logits):
        per_token = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return per_token.sum(), per_token

    both = jax.value_and_grad(losses, has_aux=True)
    for got, want in zip(
        jax.tree.leaves(jevt.jit(both, backend="interpret")(logits)),
        jax.tree.leaves(jax.jit(both)(logits)),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 5), (5, 1)], ids=str)
def test_sizes_0_and_1(shape):
    x = jax.random.normal(jax.random.key(0), shape)

    def function(x):
        both = (jax.nn.softmax(x), jax.nn.log_softmax(x)) if shape[1] else ()
        return (*both, x.sum(-1), jnp.square(x).sum())

    for got, want in zip(
        jevt.jit(function, backend="interpret")(x), jax.jit(function)(x), strict=True
    ):
        assert got.shape == want.shape
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_for_30528_words(arch):
    """A thread block holds a row and loads the next, or walks through it: nothing is spilled."""
    walking = []
    for name, loss in LOSSES.items():
        target = LOGITS if name == "soft" else LABELS
        groups = planned(jax.value_and_grad(loss), LOGITS, target)
        (spec,) = (g.spec for g in groups if g.spec.outputs[-1].shape == LOGITS.shape)
        binary = aot.compile(spec, arch)
        assert binary.spill_bytes == 0, name
        walking.append(binary.num_warps == 32 and binary.shared_bytes > 2 * VOCABULARY)
    assert any(walking) and not walking[-1]


def by_hand_with_z_loss(logits, labels):
    return by_hand(logits, labels) + 1e-4 * jnp.square(logsumexp(logits)).mean()


def smoothed_with_z_loss(logits, labels):
    return smoothed(logits, labels) + 1e-4 * jnp.square(logsumexp(logits)).mean()


def one_hot_with_z_loss(logits, labels):
    return one_hot(logits, labels) + 1e-4 * jnp.square(logsumexp(logits)).mean()


def of_a_probability(logits, labels):
    """Of softmax's result: its gradient divides by it, and by the softmax's sum again."""
    p = jax.nn.softmax(logits.astype(jnp.float32))
    return -jnp.log(p[jnp.arange(len(labels)), labels]).mean()


def logsumexp(logits):
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


SPELLINGS = (
    (by_hand, (8192, 16), (8192, 16)),
    (one_hot, (32768, 32), (8192, 16)),
    (smoothed, (32768, 32), (8192, 16)),
    (with_z_loss, (8192, 16), (8192, 16)),
    (of_a_probability, (8192, 16), (8192, 16)),
    (by_hand_with_z_loss, (4096, 16), (4096, 16)),
    (one_hot_with_z_loss, (4096, 16), (4096, 16)),
    (smoothed_with_z_loss, (4096, 8), (4096, 16)),
)


@pytest.mark.aot
@pytest.mark.parametrize("read", [True, False], ids=["loss read", "gradient alone"])
@pytest.mark.parametrize(("loss", "both", "alone"), SPELLINGS)
def test_every_spelling_keeps_to_its_registers(loss, both, alone, read):
    """Columns and warps by what is alive: loops, the more threads or fewer columns the more it is.

    A row is held where loops would be slower, and nothing of another tile lives as long as it does.
    """
    differentiate = jax.value_and_grad if read else jax.grad
    groups = planned(differentiate(loss), LOGITS, LABELS)
    (spec,) = (g.spec for g in groups if g.spec.outputs[-1].shape == LOGITS.shape)
    config = limits.default_config(spec, 90)
    assert (config.block("col"), config.num_warps) == (both if read else alone)
    assert config.programs == (528 if config.block("col") > VOCABULARY else 0)
    assert aot.compile(spec, 90).spill_bytes == 0


def test_smoothed_labels_of_a_gradient_alone_are_a_choice():
    """Between two numbers: as arithmetic on a mask they take registers of a whole row."""
    groups = planned(jax.grad(smoothed), LOGITS, LABELS)
    (spec,) = (g.spec for g in groups if g.spec.outputs[-1].shape == LOGITS.shape)
    varies = visitor.dependencies(spec.tree, spec.space)
    ops = [n.op for n, v in zip(spec.tree, varies, strict=True) if "col" in v and is_compute(n)]
    assert sorted(ops) == ["add", "convert", "convert", "eq", "exp", "mul", "select_n", "sub"]


def is_compute(node):
    return isinstance(node, visitor.Compute)
