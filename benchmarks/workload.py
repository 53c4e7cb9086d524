"""The common shape of everything that is timed: a step function and how to feed it.

A step is ``step(state, batch) -> (new_state, aux)``. For a training step the state is
``{"params", "stats", "lr"}`` and ``aux`` is the loss; for a subgraph the state is the parameters
and the new state is their gradients. Nothing here, and no model, knows jevt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accuracy import Gradients
from benchmarks.cost import Work, count_work, everything_in_memory

Tree = Any
Step = Callable[[Tree, Tree], tuple[Tree, Tree]]

# With this learning rate, (p - p') / lr is the gradient to the last bit but one: p vanishes
# beside lr * g. So the very program that is timed yields the gradients that are checked.
PROBE_LEARNING_RATE = float(2**24)
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    Attributes:
      name: as on the command line.
      step: ``(state, batch) -> (new_state, aux)``, traceable by JAX.
      init: seed -> state, made on the device.
      batch: seed -> batch, made on the device.
      donate_argnums: what ``jax.jit`` may overwrite.
      carries_state: whether the new state is the next step's state (a training step).
      batches: how many batches to rotate through, so that nothing stays in the L2 cache.
      on_chip: says of an intermediate's aval that an ideal kernel never writes it to memory;
        the roofline's bytes leave it out.
    """

    name: str
    step: Step
    init: Callable[[int], Tree]
    batch: Callable[[int], Tree]
    donate_argnums: tuple[int, ...] = (0,)
    carries_state: bool = True
    batches: int = 3
    on_chip: Callable[[Any], bool] = everything_in_memory

    def probe(self, state: Tree) -> Tree:
        """The state from which one step yields the gradients."""
        if not self.carries_state:
            return state
        return {**state, "lr": jnp.float32(PROBE_LEARNING_RATE)}

    def gradients(self, before: Tree, after: Tree) -> Gradients:
        """The gradients by name, float32 on the host, one after the other, from the states before
        and after a step from ``probe``."""
        if self.carries_state:
            before, after = before["params"], after["params"]
        old = jax.tree.leaves(before)
        for i, (path, new) in enumerate(jax.tree_util.tree_leaves_with_path(after)):
            gradient = _on_host(new)
            if self.carries_state:
                gradient = (_on_host(old[i]) - gradient) / np.float32(PROBE_LEARNING_RATE)
            yield jax.tree_util.keystr(path), gradient

    def shapes(self) -> tuple[Tree, Tree]:
        """A state and a batch as shapes and dtypes; nothing is made."""
        return jax.eval_shape(lambda: self.init(0)), jax.eval_shape(lambda: self.batch(0))

    def work(self) -> Work:
        """FLOPs and bytes of one step, counted from its jaxpr without running anything."""
        return count_work(self.step, *self.shapes(), on_chip=self.on_chip)


LossFn = Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]


def sgd_step(loss_fn: LossFn) -> Step:
    """The training step of ``loss_fn(params, stats, batch) -> (loss, new_stats)``.

    The learning rate is a float32 scalar in the state, as with a schedule. The update is computed
    in float32 and stored in the parameter's dtype.
    """

    def step(state: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), grads = grad_fn(state["params"], state["stats"], batch)
        lr = state["lr"]

        def update(p: jax.Array, g: jax.Array) -> jax.Array:
            new = p.astype(jnp.float32) - lr * g.astype(jnp.float32)
            return new.astype(p.dtype)

        params = jax.tree.map(update, state["params"], grads)
        return {"params": params, "stats": stats, "lr": lr}, loss

    return step


def training_state(params: Tree, stats: Tree | None = None) -> Tree:
    """The state of ``sgd_step``."""
    return {"params": params, "stats": stats or {}, "lr": jnp.float32(LEARNING_RATE)}


def cast_floats(tree: Tree, dtype: Any) -> Tree:
    """The tree with its floating-point leaves in ``dtype``."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float32)
