"""Programs compiled and timed on the device, outside of the user's own.

A program calls one function many times, each time on other operands, so that neither the L2 cache
nor the cost of starting a program decides; an optimization barrier between two calls keeps XLA from
fusing or merging them. :class:`Bench` is what :mod:`.measure` needs, :class:`DeviceBench` does it
on the first GPU, and tests bring their own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jevt_kernels.spec import TensorType
from jevt_kernels.tuning import operands

#: A program runs about so long, as far as its number of calls decides.
_PROGRAM_US = 1000.0
_LEAST_CALLS, _MOST_CALLS = 6, 32

#: Times that a program is started before one waits for it: the next start overlaps with the run.
_STARTS = 3

#: Part of the device's free memory that operands and results may take, and where it is not known,
#: so many bytes.
_MEMORY_PART = 0.5
_MEMORY_BYTES = 4 << 30

#: Sets of operands together exceed the L2 cache so many times.
_CACHES = 2


class OutOfMemory(RuntimeError):
    """The device has no room for operands and results now; that says nothing of the kernel."""


@dataclass(frozen=True)
class Work:
    """What every candidate is run on.

    Attributes:
      sets: operands, a tuple for each call.
    """

    sets: tuple[tuple[Any, ...], ...]


class Program(Protocol):
    """A compiled program that has run once."""

    def __call__(self) -> Sequence[Sequence[Any]]:
        """Results by call and position."""
        ...


class Bench(Protocol):
    """Where programs are compiled and timed."""

    def work(
        self, inputs: Sequence[TensorType], outputs: Sequence[TensorType], us: float, positive: bool
    ) -> Work:
        """Operands for a function that takes about so long.

        Raises:
          OutOfMemory: there is no room for them.
        """
        ...

    def prepare(self, function: Callable[..., Sequence[Any]], work: Work) -> Program:
        """Compiles a program and runs it once; raises whatever that raises."""
        ...

    def seconds(self, program: Program, work: Work) -> float:
        """Seconds of one call of the function, in one run of the program."""
        ...


@contextlib.contextmanager
def undisturbed(x64: bool) -> Iterator[None]:
    """What every thread that measures has to be told: ``x64`` as it is in the caller's thread.

    NaNs of random operands are no news, and whatever guards the user's transfers is not meant for
    these.
    """
    with (
        jax.enable_x64(x64),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
    ):
        yield


@dataclass(frozen=True)
class DeviceBench:
    """Programs on a device of JAX's.

    Attributes:
      l2_bytes: size of the last-level cache.
      device: JAX's; None for the default one.
    """

    l2_bytes: int
    device: Any = None

    def work(
        self, inputs: Sequence[TensorType], outputs: Sequence[TensorType], us: float, positive: bool
    ) -> Work:
        """See ``Bench.work``."""
        size, result = (max(1, sum(t.nbytes for t in types)) for types in (inputs, outputs))
        room = self._room()
        wanted = max(_LEAST_CALLS, min(_MOST_CALLS, round(_PROGRAM_US / max(us, 1.0))))
        # Started once more before it has ended, a program has two sets of results; a third are
        # those that it is compared with.
        calls = min(wanted, int(room / 2 / (3 * result)))
        different = min(calls, max(2, -(-_CACHES * self.l2_bytes // size)), int(room / 2 / size))
        if calls < 1 or different < 1:
            need = 2 * max(size, 3 * result)
            raise OutOfMemory(f"needs {need >> 20} MiB of {int(room) >> 20} MiB that are free")
        with jax.default_device(self.device):
            drawn = [operands.draw(inputs, seed, positive=positive) for seed in range(different)]
        return Work(tuple(drawn[call % different] for call in range(calls)))

    def prepare(self, function: Callable[..., Sequence[Any]], work: Work) -> Program:
        """See ``Bench.prepare``."""

        def program(sets: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
            results: list[tuple[Any, ...]] = []
            for each in sets:
                given, _ = jax.lax.optimization_barrier((each, results[-1:]))
                results.append(tuple(function(*given)))
            return results

        with jax.default_device(self.device):
            compiled = jax.jit(program).lower(work.sets).compile()

            def run() -> Sequence[Sequence[Any]]:
                results: Sequence[Sequence[Any]] = compiled(work.sets)
                return results

            jax.block_until_ready(run())  # ptxas assembles kernels at the first start
        return run

    def seconds(self, program: Program, work: Work) -> float:
        """See ``Bench.seconds``."""
        start = time.perf_counter()
        for _ in range(_STARTS):
            results = program()
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / (_STARTS * len(work.sets))

    def _room(self) -> float:
        """Bytes that operands and results may take."""
        device = self.device or jax.local_devices()[0]
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return _MEMORY_BYTES
        return _MEMORY_PART * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
