"""The same inputs give the same bits in every run: one kernel of each family, and a whole step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gemm_kernels as gemm
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from partitions import context

import jevt
import jevt_kernels
from jevt import pipeline
from jevt.partition import partition

RUNS = 100

HALF, FLOAT = jnp.dtype("bfloat16"), jnp.dtype("float32")

#: Tokens, features and words for which the gradient of an embedding is a sum of segments.
TOKENS, FEATURES, WORDS = 8192, 128, 3001


def normal(*shape: int, dtype: Any = HALF, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def integers(count: int, high: int) -> jax.Array:
    """The first numbers are more frequent."""
    return jnp.asarray(np.random.default_rng(0).uniform(size=count) ** 3 * high, jnp.int32)


def softmax(x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x.astype(FLOAT)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    wide = x.astype(FLOAT)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


def gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """By all arguments, given the cotangent last."""
    return lambda *args: jax.vjp(function, *args[:-1])[1](args[-1])


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    wide = logits.astype(FLOAT)
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels).mean()


def column_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(FLOAT)
    return wide.sum(0), jnp.square(wide).sum(0)


def embedding_gradient(tokens: jax.Array, dy: jax.Array) -> jax.Array:
    table = jnp.zeros((WORDS, FEATURES), dy.dtype)
    return jax.vjp(lambda table: table[tokens], table)[1](dy)[0]


def adamw(params: Any, grads: Any, moments: Any) -> Any:
    updates, state = optax.adamw(1e-3).update(grads, moments, params)
    return optax.apply_updates(params, updates), state


def _adamw_arguments() -> tuple[Any, ...]:
    params = [normal(*shape, dtype=FLOAT) for shape in ((40, 33), (33,), (70, 9), (301,), (5, 5))]
    return params, [2 * p for p in params], optax.adamw(1e-3).init(params)


def clipped(grads: Any) -> Any:
    return optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]


ROWS = normal(301, 1000)
VECTOR = normal(1000, dtype=FLOAT, seed=1)

#: The function, what makes its arguments, and the kernel that it is for: its kind or equation.
FAMILIES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]], str]] = {
    "softmax": (softmax, lambda: (ROWS,), "rowwise"),
    "softmax, long rows": (softmax, lambda: (normal(3, 70000),), "rowwise"),
    "softmax, gradient": (gradients(softmax), lambda: (ROWS, ROWS[::-1]), "rowwise"),
    "layer norm": (layer_norm, lambda: (ROWS, VECTOR, VECTOR), "rowwise"),
    "layer norm, gradients": (
        gradients(layer_norm),
        lambda: (ROWS, VECTOR, VECTOR, ROWS[::-1]),
        "columnwise",
    ),
    "cross entropy": (
        jax.value_and_grad(cross_entropy),
        lambda: (ROWS, integers(301, 1000)),
        "rowwise",
    ),
    "column sums": (column_sums, lambda: (normal(5000, 96),), "columnwise"),
    "embedding, gradient": (
        embedding_gradient,
        lambda: (integers(TOKENS, WORDS), normal(TOKENS, FEATURES)),
        "segment_sum",
    ),
    "AdamW of several tensors": (adamw, _adamw_arguments, "multi_tensor"),
    "norm of many tensors": (
        clipped,
        lambda: ([normal(1 + 50 * k, 1024) for k in range(12)],),
        "multi_tensor",
    ),
}


def loss_of(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    x = layer_norm(params["table"][tokens], params["scale"], params["bias"])
    return cross_entropy(jax.nn.gelu(x) @ params["head"], labels)


def train_step(params: Any, state: Any, tokens: jax.Array, labels: jax.Array) -> Any:
    loss, grads = jax.value_and_grad(loss_of)(params, tokens, labels)
    updates, state = optax.adamw(1e-2).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def step_arguments() -> tuple[Any, ...]:
    params = {
        "table": normal(WORDS, FEATURES),
        "scale": 1 + normal(FEATURES, dtype=FLOAT),
        "bias": normal(FEATURES, dtype=FLOAT, seed=1),
        "head": normal(FEATURES, 200) / 8,
    }
    tokens = integers(TOKENS, WORDS)
    return params, optax.adamw(1e-2).init(params), tokens, jnp.roll(tokens, -1) % 200


@jax.jit
def different(first: Any, again: Any) -> jax.Array:
    """How many numbers of two results differ in their bits."""

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    return sum((bits(x) != bits(y)).sum() for x, y in pairs)


def check(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    first = function(*arguments)
    counts = [different(first, function(*arguments)) for _ in range(RUNS)]
    assert sum(map(int, counts)) == 0


def planned(function: Callable[..., Any], shapes: Any) -> set[str]:
    """The kinds of the kernels for an H100, and the names of what is computed."""
    planned_for = context("triton")
    jaxpr = jax.make_jaxpr(function)(*shapes)
    for _, run in pipeline.graph_passes(planned_for):
        jaxpr = run(jaxpr)
    plan = partition(jaxpr.with_consts(()), planned_for)
    kinds = {group.kind for group in plan.groups if group.target == "triton"}
    return kinds | {eqn.primitive.name for eqn in plan.jaxpr.eqns}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_planned(name: str) -> None:
    function, arguments, kind = FAMILIES[name]
    assert kind in planned(function, jax.eval_shape(arguments))


def test_train_step_is_planned() -> None:
    kinds = {"columnwise", "rowwise", "gemm", "fused_segment_sum", "multi_tensor"}
    assert kinds <= planned(train_step, jax.eval_shape(step_arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    function, arguments, _ = FAMILIES[name]
    check(jevt.jit(function, backend="triton"), arguments())


@pytest.mark.gpu
def test_product_with_column_sums() -> None:
    spec = gemm.dgrad_gelu((2, 300, 130, 96))
    operands = [jnp.asarray(x) for x in gemm.operands(spec)]
    check(jax.jit(functools.partial(jevt_kernels.call, spec)), tuple(operands))


@pytest.mark.gpu
def test_train_step() -> None:
    check(jevt.jit(train_step, backend="triton"), step_arguments())
