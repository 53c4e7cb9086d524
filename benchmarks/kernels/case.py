"""Kernel cases and the registry of their suites."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.options import Size
from benchmarks.workload import Tree, Workload

# Each module registers at least one suite when imported.
MODULES = ("pointwise", "rowwise", "columnwise", "reductions", "gemm")


@dataclass(frozen=True)
class Case:
    """One function on one set of shapes.

    Attributes:
      name: unique in its suite, as ``<family>-<shape>-<dtype>``.
      fun: the function; the variants ``jax`` and ``jevt`` run it under ``jax.jit`` and
        ``jevt.jit``, and float32 arguments make it its own reference, if it has no other.
      args: seed -> arguments, made on the device.
      bytes: least traffic to and from memory, each argument and result once.
      flops: FLOPs, where they and not the bytes bound the case; 0 otherwise.
      peers: other functions of the same arguments and results, run under ``jax.jit`` as variants
        of their own (a library call through JAX, say).
      batches: sets of arguments to rotate through; together several times the L2 cache.
      kernel: makes the kernel, a ``jevt_kernels.KernelSpec``, that the variant ``jevt`` runs in its
        fastest configuration instead of compiling ``fun``.
      reference: computes the same from float32 arguments where ``fun`` would take too much memory.
    """

    name: str
    fun: Callable[..., Tree]
    args: Callable[[int], tuple[Any, ...]]
    bytes: int
    flops: int = 0
    peers: Mapping[str, Callable[..., Tree]] = field(default_factory=dict)
    batches: int = 3
    kernel: Callable[[], Any] | None = None
    reference: Callable[..., Tree] | None = None


Builder = Callable[[Size], Sequence[Case]]
_SUITES: dict[str, Builder] = {}


def suite(name: str) -> Callable[[Builder], Builder]:
    """Registers a function of the size that returns the suite's cases."""

    def register(builder: Builder) -> Builder:
        if name in _SUITES:
            raise ValueError(f"suite: expected a new name, got {name!r} again")
        _SUITES[name] = builder
        return builder

    return register


def suite_names() -> list[str]:
    """The names of all suites."""
    for module in MODULES:
        importlib.import_module(f"benchmarks.kernels.{module}")
    return list(_SUITES)


@functools.cache
def cases(name: str, size: Size) -> Sequence[Case]:
    """The cases of a suite.

    Raises:
      ValueError: for an unknown suite; the message lists the known ones.
    """
    if name not in suite_names():
        raise ValueError(f"suites: expected some of {', '.join(_SUITES)}; got {name!r}")
    return _SUITES[name](size)


def find_case(path: str, size: Size) -> Case:
    """The case ``suite/name``."""
    suite_name, _, name = path.partition("/")
    found = {case.name: case for case in cases(suite_name, size)}
    if name not in found:
        raise ValueError(f"case: expected one of {', '.join(found)}; got {name!r}")
    return found[name]


def as_workload(case: Case, variant: str) -> Workload:
    """The case as a step without state; its results take the place of gradients."""
    fun = case.peers.get(variant, case.fun)

    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        del state
        return fun(*batch), ()

    return Workload(
        case.name,
        step,
        init=lambda seed: (),
        batch=case.args,
        donate_argnums=(),
        carries_state=False,
        batches=case.batches,
    )
