"""Updates of all parameters of BERT-Large, bfloat16 with float32 moments: AdamW, LAMB, clipping.

LAMB needs the norms of each parameter and of its update before it writes, and clipping the norm of
all gradients: they read twice, of which the bytes of a case count one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import optax

from benchmarks.kernels.case import Case
from benchmarks.kernels.operands import FLOAT, moved
from benchmarks.models import bert
from benchmarks.options import Options, Size
from benchmarks.workload import Tree

#: Moments are float32, whatever the parameters are.
ADAMW = optax.adamw(1e-3, mu_dtype=FLOAT)
LAMB = optax.lamb(1e-3, weight_decay=0.01)

#: Of all gradients together; that of those drawn here is larger.
_LARGEST_NORM = 1.0


def adamw(params: Tree, grads: Tree, state: Tree) -> Tree:
    """An update of all parameters."""
    updates, state = ADAMW.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def lamb(params: Tree, grads: Tree, state: Tree) -> Tree:
    """An update of all parameters, each relative to its norm; norms in float32."""
    updates, state = LAMB.update(_wide(grads), state, _wide(params))
    return optax.apply_updates(params, updates), state


def clip(grads: Tree) -> Tree:
    """Gradients whose norm, in float32 and of all together, is at most 1."""
    clipped, _ = optax.clip_by_global_norm(_LARGEST_NORM).update(_wide(grads), optax.EmptyState())
    return jax.tree.map(lambda x, like: x.astype(like.dtype), clipped, grads)


def optimizers(size: Size) -> list[Case]:
    """AdamW, LAMB and clipping by the global norm."""
    workload = bert.make(Options(size=size))
    params = jax.tree.leaves(jax.eval_shape(lambda: workload.init(0))["params"])

    def updated(seed: int, update: optax.GradientTransformation) -> tuple[Tree, ...]:
        drawn = _draw(seed, [*params, *params])
        weights, grads = drawn[: len(params)], drawn[len(params) :]
        return weights, grads, update.init(_wide(weights))

    return [
        _case("adamw", adamw, params, lambda seed: updated(seed, ADAMW)),
        _case("lamb", lamb, params, lambda seed: updated(seed, LAMB)),
        _case("clip", clip, params, lambda seed: (_draw(seed, params),)),
    ]


def _case(
    family: str,
    function: Callable[..., Tree],
    params: Sequence[jax.ShapeDtypeStruct],
    args: Callable[[int], tuple[Tree, ...]],
) -> Case:
    name = f"{family}-bert-{len(params)}"
    return Case(name, function, args, bytes=moved(function, args), batches=1)


def _draw(seed: int, shapes: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.PRNGKey(seed), len(shapes))
    return [
        0.02 * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, shapes, strict=True)
    ]


def _wide(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(FLOAT), tree)
