"""Runs a PyTorch twin eagerly or under ``torch.compile``."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import accuracy
from benchmarks.kernel_table import aggregate
from benchmarks.messages import Job, Loaded, Profile
from benchmarks.runners.base import WARM_UP_STEPS
from benchmarks.torch_models import registry
from benchmarks.torch_models.twin import Batch, Twin, device

LEARNING_RATE = 1e-3
_MODES = {"inductor": "default", "inductor-max": "max-autotune"}
Forward = Callable[[nn.Module, Batch], torch.Tensor]


def device_name() -> str:
    """The name of the device that PyTorch runs on."""
    return torch.cuda.get_device_name() if device().type == "cuda" else "cpu"


class TorchRunner:
    """The variants ``torch``, ``inductor`` and ``inductor-max``."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.twin: Twin = registry.make(job.name, job.options, compiled=job.variant in _MODES)
        self.forward = self._compile()
        fused = device().type == "cuda"
        self.optimizer = torch.optim.SGD(
            self.twin.module.parameters(), LEARNING_RATE, fused=fused, foreach=not fused
        )
        self.batches: list[Batch] = []
        self.turn = 0

    def load(self) -> Loaded:
        self.batches = [self._with_leaf(self.twin.batch(i)) for i in range(self.twin.batches)]
        # With dropout the reference run would draw other random bits.
        checked = self.job.references is not None and self.job.options.dropout == 0.0
        reference = self._float32_gradients() if checked else None
        self._reset_peak()
        _, cold = self._timed_backward()
        rel_err, note = None, ""
        if reference is not None:
            rel_err, note = accuracy.describe(accuracy.compare(self._gradients(), reference), None)
        warm = self._warm_start() if self.job.measure_warm else None
        self.block(WARM_UP_STEPS)
        peak = self._peak_bytes()
        step_s = self.block(WARM_UP_STEPS) / WARM_UP_STEPS
        return Loaded(cold, warm, peak, rel_err, note, step_s)

    def block(self, steps: int) -> float:
        _wait()
        start = time.perf_counter()
        out = self._run(steps)
        seconds = time.perf_counter() - start
        if not bool(torch.isfinite(out).all()):
            raise FloatingPointError(f"{self.job.name}: not finite after timed steps")
        return seconds

    def profile(self, steps: int) -> Profile:
        if device().type != "cuda":
            return Profile(())
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self._run(steps)
        events = (
            (e.name, e.device_time_total * 1e3)
            for e in profiler.events()
            if e.device_type == torch.autograd.DeviceType.CUDA and not _is_annotation(e)
        )
        return aggregate(events, steps)

    def _run(self, steps: int) -> torch.Tensor:
        """Dispatches the steps, waits for the last, returns its loss or output."""
        for _ in range(steps):
            batch = self.batches[self.turn % len(self.batches)]
            self.turn += 1
            out = self._backward(self.forward, self.twin.module, batch)
            if self.twin.trains:
                self.optimizer.step()
        _wait()
        return out

    def _backward(self, forward: Forward, module: nn.Module, batch: Batch) -> torch.Tensor:
        """One forward and backward pass into fresh gradients."""
        for parameter in module.parameters():
            parameter.grad = None
        if "x" in batch:
            batch["x"].grad = None
        if self.job.variant == "inductor-max":
            torch.compiler.cudagraph_mark_step_begin()
        out = forward(module, batch)
        out.backward(batch.get("dy"))
        return out.detach()

    def _timed_backward(self) -> tuple[torch.Tensor, float]:
        _wait()
        start = time.perf_counter()
        out = self._backward(self.forward, self.twin.module, self.batches[0])
        _wait()
        return out, time.perf_counter() - start

    def _warm_start(self) -> float:
        """Compiles again from Inductor's caches on disk; an eager model just runs again."""
        if self.job.variant in _MODES:
            torch._dynamo.reset()  # noqa: SLF001
            self.forward = self._compile()
        return self._timed_backward()[1]

    def _compile(self) -> Forward:
        mode = _MODES.get(self.job.variant)
        return self.twin.forward if mode is None else torch.compile(self.twin.forward, mode=mode)

    def _gradients(self) -> Iterator[tuple[str, np.ndarray]]:
        """The gradients of the last backward pass by name, float32 on the host."""
        yield from _named_gradients(self.twin.module, self.batches[0])

    def _float32_gradients(self) -> list[np.ndarray]:
        """The gradients of an eager float32 run from the same values, without TF32.

        It serves the PyTorch variants, whose initial values are not those of the JAX variants.
        """
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        options = self.job.options.replace(dtype="float32")
        twin = registry.make(self.job.name, options, compiled=self.job.variant in _MODES)
        module = copy.deepcopy(self.twin.module).float()
        batch = {name: _to_float32(x) for name, x in self.batches[0].items()}
        if "graph" in batch:
            batch["graph"] = twin.batch(0)["graph"]
        self._backward(twin.forward, module, self._with_leaf(batch))
        return [gradient for _, gradient in _named_gradients(module, batch)]

    def _with_leaf(self, batch: Batch) -> Batch:
        """A subgraph's input wants a gradient."""
        if "x" in batch:
            batch["x"].requires_grad_()
        return batch

    def _reset_peak(self) -> None:
        if device().type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak_bytes(self) -> int | None:
        """The allocator's peak, less the batches that only wait for their turn."""
        if device().type != "cuda":
            return None
        held = {id(x): _nbytes(x) for batch in self.batches for x in batch.values()}
        used = {id(x): _nbytes(x) for x in self.batches[0].values()}
        return torch.cuda.max_memory_allocated() - sum(held.values()) + sum(used.values())


def _named_gradients(module: nn.Module, batch: Batch) -> Iterator[tuple[str, np.ndarray]]:
    named = list(module.named_parameters())
    if "x" in batch:
        named.append(("x", batch["x"]))
    for name, parameter in named:
        assert parameter.grad is not None
        yield name, parameter.grad.float().cpu().numpy()


def _is_annotation(event: Any) -> bool:
    """Whether a device event is a range that spans kernels, not a kernel."""
    ranges = ("Optimizer.", "ProfilerStep", "##", "Torch-Compiled", "CompiledFunction")
    return getattr(event, "is_user_annotation", False) or event.name.startswith(ranges)


def _to_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().clone().float()
    return value


def _nbytes(value: Any) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
