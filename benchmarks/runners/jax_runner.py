"""Runs a workload or a kernel case under ``jax.jit`` or ``jevt.jit``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accuracy, registry
from benchmarks.kernel_profile import profile_steps
from benchmarks.kernels.case import Case, as_workload, find_case
from benchmarks.messages import Job, Loaded, Profile
from benchmarks.runners.base import WARM_UP_STEPS
from benchmarks.runners.kernel_step import KernelStep
from benchmarks.workload import Tree, Workload, cast_floats

SEED = 0


def device_name() -> str:
    """The name of the device that JAX runs on."""
    return jax.devices()[0].device_kind


class JaxRunner:
    """The variants ``float32``, ``jax``, ``jax-cudnn`` and ``jevt``, and the peers of a case."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.workload = _workload(job)
        self.step = _compiler(job)(self.workload)
        self.state: Tree = None
        self.batches: list[Tree] = []
        self.turn = 0

    def load(self) -> Loaded:
        w = self.workload
        count = 1 if self.job.variant == "float32" else w.batches
        self.batches = [self._lift(w.batch(SEED + i)) for i in range(count)]
        tried = ""
        if isinstance(self.step, KernelStep):
            tried = self.step.prepare(self.batches, self.job.configs, self.job.search_s)
        state = jax.block_until_ready(w.probe(self._lift(w.init(SEED))))
        after, cold = _timed(self.step, state, self.batches[0])
        del state
        peak = self._peak_bytes()
        rel_err, note = self._check(after)
        del after
        warm = None
        if self.job.variant != "float32":
            warm = self._warm_start() if self.job.measure_warm else None
            self.state = w.init(SEED)
        return Loaded(cold, warm, peak, rel_err, note, self._warm_up(), tried)

    def block(self, steps: int) -> float:
        start = time.perf_counter()
        aux = self._run(steps)
        seconds = time.perf_counter() - start
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(aux)):
            raise FloatingPointError(f"{self.job.name}: the loss is not finite after timed steps")
        return seconds

    def profile(self, steps: int) -> Profile:
        return profile_steps(lambda: self._run(steps), steps)

    def _run(self, steps: int) -> Tree:
        """Dispatches the steps, waits for the last, returns its loss or output."""
        for _ in range(steps):
            batch = self.batches[self.turn % len(self.batches)]
            self.turn += 1
            after, aux = self.step(self.state, batch)
            if self.workload.carries_state:
                self.state = after
        jax.block_until_ready((after, aux))
        return aux

    def _lift(self, tree: Tree) -> Tree:
        """Float32 copies for the reference run: the same values as the other runs'."""
        return cast_floats(tree, jnp.float32) if self.job.variant == "float32" else tree

    def _check(self, after: Tree) -> tuple[float | None, str]:
        w = self.workload
        before = self._lift(w.init(SEED))
        if self.job.kind == "case":
            return accuracy.describe(_worst(after, _case_reference(self.job)), None)
        if self.job.references is None:
            return None, ""
        folder = Path(self.job.references)
        if self.job.variant in ("float32", "jax"):
            accuracy.save(w.gradients(before, after), folder / self.job.variant)
        errors: list[accuracy.Error | None] = [None, None]
        for i, name in enumerate(("float32", "jax")):
            reference = accuracy.references(folder / name)
            if reference is not None and self.job.variant not in ("float32", name):
                errors[i] = accuracy.compare(w.gradients(before, after), reference)
        return accuracy.describe(*errors)

    def _warm_start(self) -> float:
        """Compiles again from the caches on disk, after JAX has forgotten everything."""
        state = jax.block_until_ready(self.workload.init(SEED))
        jax.clear_caches()
        self.step = _compiler(self.job)(_workload(self.job))
        return _timed(self.step, state, self.batches[0])[1]

    def _warm_up(self) -> float:
        if self.job.variant == "float32":
            return 0.0
        self.block(WARM_UP_STEPS)
        return self.block(WARM_UP_STEPS) / WARM_UP_STEPS

    def _peak_bytes(self) -> int | None:
        """The allocator's peak, less the batches that only wait for their turn."""
        stats = jax.devices()[0].memory_stats()
        if not stats or self.job.variant == "float32":
            return None
        held = {id(x): x.nbytes for b in self.batches for x in jax.tree.leaves(b)}
        used = {id(x): x.nbytes for x in jax.tree.leaves(self.batches[0])}
        return stats["peak_bytes_in_use"] - sum(held.values()) + sum(used.values())


def _workload(job: Job) -> Workload:
    options = job.options
    if job.kind == "case":
        return as_workload(_case(job), job.variant)
    if job.variant == "jax-cudnn":
        options = options.replace(attention="cudnn")
    if job.variant != "float32":
        return registry.make(job.name, options)
    # The reference computes in float32 on the values that the others start from.
    lifted = registry.make(job.name, options.replace(dtype="float32", param_dtype="float32"))
    own = registry.make(job.name, options)
    return Workload(
        own.name,
        lifted.step,
        own.init,
        own.batch,
        donate_argnums=own.donate_argnums,
        carries_state=own.carries_state,
    )


def _compiler(job: Job) -> Callable[[Workload], Any]:
    """How the variant turns a workload into a compiled step."""
    if job.variant != "jevt":
        return lambda w: jax.jit(w.step, donate_argnums=w.donate_argnums)
    if job.kind == "case" and (kernel := _case(job).kernel) is not None:
        return lambda w: KernelStep(kernel())
    import jevt

    # A kernel case compares kernels, so on a GPU it asks for them; a step lets jevt choose.
    on_gpu = jax.default_backend() == "gpu"
    backend: Literal["triton", "auto"] = "triton" if job.kind == "case" and on_gpu else "auto"
    return lambda w: jevt.jit(w.step, backend=backend, donate_argnums=w.donate_argnums)


def _timed(step: Any, state: Tree, batch: Tree) -> tuple[Tree, float]:
    start = time.perf_counter()
    after, aux = jax.block_until_ready(step(state, batch))
    del aux
    return after, time.perf_counter() - start


def _case(job: Job) -> Case:
    return find_case(job.name, job.options.size)


def _case_reference(job: Job) -> Tree:
    """The case's reference in float32 under ``jax.jit``, on the first arguments."""
    case = _case(job)
    with jax.default_matmul_precision("highest"):
        return jax.jit(case.reference or case.fun)(*cast_floats(case.args(SEED), jnp.float32))


def _worst(results: Tree, reference: Tree) -> accuracy.Error:
    """The largest error of a result relative to its own norm: one may be a sum of the others.

    It is computed on the device, as results may be gigabytes.
    """

    @jax.jit
    def own(got: jax.Array, want: jax.Array) -> jax.Array:
        difference = got.astype(want.dtype) - want
        error = jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(want.ravel())
        return jnp.where(jnp.any(difference), error, 0)

    errors = {
        jax.tree_util.keystr(path): float(own(got, want))
        for (path, got), want in zip(
            jax.tree_util.tree_leaves_with_path(results), jax.tree.leaves(reference), strict=True
        )
    }
    where = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
    worst = errors[where] if np.isfinite(errors[where]) else float("inf")
    return accuracy.Error(worst, worst, where)
