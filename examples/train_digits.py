"""Trains an MLP-mixer on handwritten digits, under ``jevt.jit`` and under ``jax.jit``.

    python examples/train_digits.py [--epochs 15] [--backend auto]

The digits come with scikit-learn. Both runs start from the same seed and see the same batches. At
the end a table puts them side by side, and the plan says how many equations the step has and what
became of them. On a GPU fused groups run as Triton kernels; on a CPU the same groups run through
XLA.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jevt
from jevt.partition import summary

BATCH = 96
SEED = 0

console = Console()


class MixerBlock(nn.Module):
    """Mixes patches with one another, then channels, each with an MLP behind a layer norm."""

    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps ``x``, of shape (batch, patches, channels), to the same shape."""
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + self._mlp(y, train).swapaxes(1, 2)
        return x + self._mlp(nn.LayerNorm()(x), train)

    def _mlp(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dropout(self.dropout, deterministic=not train)(nn.Dense(x.shape[-1])(y))


class Mixer(nn.Module):
    """MLP-mixer for 8×8 images in 2×2 patches.

    Attributes:
      channels: width of a patch's embedding.
      hidden: width of the MLPs.
      blocks: number of mixer blocks.
      dropout: rate after each MLP.
    """

    channels: int = 48
    hidden: int = 96
    blocks: int = 2
    dropout: float = 0.1

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, 8, 8, 1) to logits (batch, 10)."""
        x = nn.Conv(self.channels, (2, 2), strides=2)(images)
        x = x.reshape(x.shape[0], -1, self.channels)
        for _ in range(self.blocks):
            x = MixerBlock(self.hidden, self.dropout)(x, train)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


MODEL = Mixer()
OPTIMIZER = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 4e-3, 30, 180), weight_decay=1e-3)

type State = dict[str, Any]


def initial_state() -> State:
    """Parameters, optimizer state and random key of a fresh run."""
    init_key, dropout_key = jax.random.split(jax.random.key(SEED))
    params = MODEL.init(init_key, jnp.zeros((1, 8, 8, 1)), train=False)
    return {"params": params, "optimizer": OPTIMIZER.init(params), "key": dropout_key}


def train_step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, dict[str, Any]]:
    """One step of AdamW: forward, loss, backward and update in one program."""
    key, dropout_key = jax.random.split(state["key"])

    def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = MODEL.apply(params, images, train=True, rngs={"dropout": dropout_key})
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, jnp.mean(logits.argmax(-1) == labels)

    (loss, accuracy), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new_state = {"params": params, "optimizer": optimizer, "key": key}
    return new_state, {"loss": loss, "accuracy": accuracy}


def evaluate(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Accuracy on a set of images."""
    return jnp.mean(MODEL.apply(params, images, train=False).argmax(-1) == labels)


def batches(images: np.ndarray, labels: np.ndarray, epoch: int) -> Iterator[tuple[Any, Any]]:
    """Full batches in an order that depends on the epoch only."""
    order = np.random.default_rng((SEED, epoch)).permutation(len(images))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        yield images[chosen], labels[chosen]


@dataclasses.dataclass
class Run:
    """What one training run leaves.

    Attributes:
      losses: after each step.
      first_step_s: time of the first step, compilation included.
      step_ms: median time of the others.
      test_accuracy: at the end.
    """

    losses: list[float]
    first_step_s: float
    step_ms: float
    test_accuracy: float


def train(name: str, jit: Callable[..., Any], data: Any, epochs: int) -> tuple[Run, Any]:
    """Trains from the seed; returns the run and the compiled step."""
    train_images, test_images, train_labels, test_labels = data
    step = jit(train_step, donate_argnums=0)
    accuracy = jit(evaluate)
    state = initial_state()
    losses: list[float] = []
    times: list[float] = []
    console.rule(name)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("epoch 1", total=epochs * (len(train_images) // BATCH))
        for epoch in range(epochs):
            accuracies = []
            for images, labels in batches(train_images, train_labels, epoch):
                start = time.perf_counter()
                state, metrics = step(state, images, labels)
                losses.append(float(metrics["loss"]))  # waits for the step
                times.append(time.perf_counter() - start)
                accuracies.append(float(metrics["accuracy"]))
                progress.update(bar, advance=1, description=f"epoch {epoch + 1}")
            progress.console.print(
                f"epoch {epoch + 1:3d}   loss {np.mean(losses[-len(accuracies) :]):.4f}   "
                f"accuracy {np.mean(accuracies):.2%}"
            )
    test_accuracy = float(accuracy(state["params"], test_images, test_labels))
    console.print(f"test accuracy {test_accuracy:.2%}")
    return Run(losses, times[0], 1e3 * statistics.median(times[1:]), test_accuracy), step


def show_comparison(runs: dict[str, Run]) -> None:
    """Both runs side by side."""
    table = Table(title="The same training twice", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    rows = {
        "test accuracy": [f"{r.test_accuracy:.2%}" for r in runs.values()],
        "final loss": [f"{r.losses[-1]:.5f}" for r in runs.values()],
        "step time (median)": [f"{r.step_ms:.2f} ms" for r in runs.values()],
        "first step, with compilation": [f"{r.first_step_s:.1f} s" for r in runs.values()],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)
    first, second = (np.array(r.losses) for r in runs.values())
    console.print(f"largest difference of the loss curves: {np.abs(first - second).max():.2e}")


def show_plan(step: Any) -> None:
    """What became of the step's equations."""
    trace = jevt.last_trace(step)
    counts = summary(trace.plan)
    table = Table(
        title=f"Plan of {trace.name} on {trace.context.device.name}", title_justify="left"
    )
    table.add_column("")
    table.add_column("number", justify="right")
    table.add_row("equations, traced", str(len(trace.stages[0].jaxpr.eqns)))
    table.add_row("equations, after the passes", str(counts["equations"]))
    table.add_row("groups", str(counts["groups"]))
    for kind, number in counts["kinds"].items():
        table.add_row(f"Triton kernels: {kind}", str(number))
    for reason, number in counts["xla"].items():
        table.add_row(f"left to XLA: {reason}", str(number))
    console.print(table)
    console.print(
        f"planned in {trace.milliseconds / 1e3:.1f} s ({counts['status']}); the whole of it:"
        " print(jevt.last_trace(step)), or JEVT_DUMP_DIR=some/folder"
    )


def main() -> None:
    """Trains twice and compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--backend", default="auto", help="jevt.jit's backend")
    arguments = parser.parse_args()
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    data = train_test_split(
        images, digits.target.astype(np.int32), test_size=0.2, random_state=SEED
    )

    def jevt_jit(fun: Callable[..., Any], **options: Any) -> Any:
        return jevt.jit(fun, backend=arguments.backend, **options)

    ours, step = train("jevt.jit", jevt_jit, data, arguments.epochs)
    reference, _ = train("jax.jit", jax.jit, data, arguments.epochs)
    show_comparison({"jevt.jit": ours, "jax.jit": reference})
    show_plan(step)


if __name__ == "__main__":
    main()
