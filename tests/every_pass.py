"""The five workloads and the small models after each pass, against the untouched programs.

    PYTHONPATH=tests .venv/bin/python -m every_pass            all of them
    PYTHONPATH=tests .venv/bin/python -m every_pass gpt bert   only these

The passes are those for a GPU, in the order of the pipeline. After each that has changed something,
the jaxpr is checked and evaluated. The test suite does so with a few of the models
(``tests/jevt/passes/test_every_pass.py``), and with all of them after the last pass
(``tests/jevt/passes/test_models.py``).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import small_models
from jax.extend.core import Jaxpr
from rewriting import evaluate

from benchmarks import registry
from benchmarks.accuracy import NEGLIGIBLE
from benchmarks.options import Options
from jevt import pipeline
from jevt._context import Context
from jevt.partition.cost import DEVICES

type Outputs = Sequence[np.ndarray]

WORKLOADS = (*registry.MODELS, "gcn-bcoo")
#: Of each output. Whole steps together are below 1e-5 (``tests/jevt/passes/test_models.py``), but
#: one rounding of a scale near 1 is more than that of its change.
TOLERANCE = 1e-4
#: Passes that let small arrays be, as those of these models are, unless they are told.
FROM_A_SIZE_ON = ("segment_sums", "row_products")
#: The model that is compared with itself in float32: it may not depart from that more than before.
MIXED = "mixed_precision"


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step as it is traced.

    Attributes:
      jaxpr: untouched.
      args: its arguments, flat.
      parents: of each output, where in the tree of outputs it and its siblings are.
    """

    jaxpr: Jaxpr
    args: Sequence
    parents: Sequence[str]

    @classmethod
    def of(cls, fun: Callable, *args) -> Step:
        jaxpr, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shape)]
        return cls(jaxpr, jax.tree.leaves(args), [jax.tree_util.keystr(p[:-1]) for p in paths])

    def outputs(self, jaxpr: Jaxpr) -> Outputs:
        """What ``jaxpr`` makes of the arguments."""
        return [np.asarray(v) for v in evaluate(jaxpr, *self.args, compiled=True)]

    def error(self, got: Outputs, want: Outputs) -> float:
        """The largest error of a change, in the norm and by it; infinite if it is not finite.

        A change that is nearly nothing beside its siblings (the gradient of a key's bias) is judged
        by them. Integers have to be the same.
        """
        changes = list(zip(self._changes(got), self._changes(want), strict=True))
        squares: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for (_, b), parent, value in zip(changes, self.parents, want, strict=True):
            if jnp.issubdtype(value.dtype, jnp.floating):
                squares[parent][0] += float(np.sum(b**2))
                squares[parent][1] += b.size
        worst = 0.0
        for (a, b), parent, value in zip(changes, self.parents, want, strict=True):
            difference = float(np.sum((a - b) ** 2))
            if difference == 0.0:
                continue
            if not jnp.issubdtype(value.dtype, jnp.floating) or not np.isfinite(difference):
                return np.inf
            norm, size = squares[parent]
            scale = max(float(np.sum(b**2)), NEGLIGIBLE * norm / size * b.size)
            if not 0.0 < scale < np.inf:
                return np.inf
            worst = max(worst, float(np.sqrt(difference / scale)))
        return worst

    def _changes(self, outputs: Outputs) -> list[np.ndarray]:
        """What is added to the state, which is where an error shows, and the other outputs."""
        olds = [*self.args, *[None] * len(outputs)]
        changes = []
        for new, old in zip(outputs, olds, strict=False):
            is_state = old is not None and np.shape(old) == new.shape
            base = np.asarray(old, np.float64) if is_state else 0.0
            changes.append(np.asarray(new, np.float64) - base)
        return changes


@dataclasses.dataclass(frozen=True)
class Found:
    """What the passes did to a model: how many changed it, and the largest error after which."""

    changed: int
    error: float
    after: str


def check(name: str) -> Found:
    """A model after each pass.

    Raises:
      AssertionError: which names the model and the pass after which it is ill-typed, or its outputs
        are not those of the untouched program.
    """
    step = (workload if name in registry.WORKLOADS else model)(name)
    want, tolerance = step.outputs(step.jaxpr), TOLERANCE
    if name == MIXED:  # bfloat16 is rounded where it was, or less
        exact = truth()
        want, tolerance = exact, 1.1 * step.error(want, exact)
    found = Found(0, 0.0, "none")
    for pass_name, jaxpr in each_pass(step.jaxpr):
        where = f"{name} after {pass_name}"
        try:
            jax.extend.core.check_jaxpr(jaxpr)
        except Exception as error:
            raise AssertionError(f"{where} is ill-typed") from error
        assert jaxpr.out_avals == step.jaxpr.out_avals, where
        error = step.error(step.outputs(jaxpr), want)
        assert error < tolerance, f"{where}: {error:.1e}, not {tolerance:.1e}"
        error, after = max((found.error, found.after), (error, pass_name), key=lambda p: p[0])
        found = Found(found.changed + 1, error, after)
    return found


def workload(name: str) -> Step:
    """A training step of small shapes in float32, whose state changes by its gradients."""
    made = registry.make(name, Options(size="smoke", dtype="float32", param_dtype="float32"))
    return Step.of(made.step, made.probe(made.init(0)), made.batch(0))


def model(name: str) -> Step:
    """A training step of ``tests/small_models.py``."""
    step, args = small_models.MODELS[name]()
    return Step.of(step, *args)


def truth() -> Outputs:
    """The outputs of the model in mixed precision, all in float32."""
    fun, args = small_models.mixed_precision("float32")
    step = Step.of(fun, *args)
    return step.outputs(step.jaxpr)


def each_pass(jaxpr: Jaxpr) -> Iterator[tuple[str, Jaxpr]]:
    """Each pass for a GPU that changes the program, with its place, and the program after it."""
    device = DEVICES["H100"]
    context = Context("cuda", "auto", False, (False,) * len(jaxpr.invars), device)
    for place, (name, graph_pass) in enumerate(pipeline.graph_passes(context)):
        if name in FROM_A_SIZE_ON:
            graph_pass = functools.partial(graph_pass, smallest=1)
        before, jaxpr = jaxpr, graph_pass(jaxpr)
        if jaxpr is before or str(jaxpr) == str(before):
            continue
        yield f"{name} ({place})", jaxpr


def main(names: Sequence[str]) -> None:
    """Prints a line on each model, of those named or of all."""
    for name in names or (*WORKLOADS, *small_models.MODELS):
        started = time.monotonic()
        found = check(name)
        spent = time.monotonic() - started
        sys.stdout.write(
            f"{name}: {found.changed} passes changed something, largest error {found.error:.1e}"
            f" after {found.after}; {spent:.0f} s\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
