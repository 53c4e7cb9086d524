"""``tune="on"``: what is not known of a plan's kernels is measured while the program is compiled.

    plan ─▶ kernels of which nothing is known ─▶ measured ─▶ store ─▶ plan, with what is known now

A plan that is to be measured also has kernels that are predicted to be slower by a little, so that
the cost model is corrected both ways. A product whose kernel has lost stands alone in the next
plan, whose kernels are measured in turn; after a few rounds what is left goes by predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.extend.core import jaxpr_as_fun

from jevt._context import Context, Device
from jevt.lowering.errors import JevtWarning
from jevt.partition.cost import device_model
from jevt.partition.plan import Group, Plan
from jevt.partition.printing import all_groups
from jevt.tuning import known
from jevt_kernels import tuning
from jevt_kernels.tuning.bench import undisturbed

_SEVERAL = (
    "jevt: tune='on' has no effect in a program of several processes, which must all make the same"
    " plan. Tune it in a single process with one device's share of the data."
)

#: Plans that are measured at most, one made by the times of the other.
_ROUNDS = 3

#: Programs of two compilations would disturb each other's times.
_measuring = threading.Lock()


def make_bench(device: Device) -> tuning.Bench:
    """Where kernels are timed: the process's first GPU."""
    return tuning.DeviceBench(device.l2_bytes, jax.local_devices(backend="cuda")[0])


def store(platform: str, folder: Path | None) -> tuning.Store | None:
    """The store of this process's GPU, None where there is nothing to be known.

    Processes of one program must make the same plan of it, and their stores may differ: they go by
    predictions alone.

    Args:
      platform: that is compiled for.
      folder: of the store; the user's cache folder by default.
    """
    if platform != "cuda" or jax.process_count() > 1:
        return None
    identity = tuning.local()
    if identity is None:
        return None
    return tuning.opened(folder or tuning.default_folder(), identity)


def consult(platform: str, folder: Path | None, tune: bool) -> tuple[Device, tuning.Snapshot, bool]:
    """The cost model's picture of the device, what is known of kernels on it, whether to measure.

    With ``tune``, a device that has never been calibrated is.
    """
    found = store(platform, folder)
    if found is None:
        if tune and platform == "cuda" and jax.process_count() > 1:
            warnings.warn(_SEVERAL, JevtWarning, stacklevel=2)
        return device_model(platform), tuning.Snapshot(), False
    snapshot = found.load()
    if tune and snapshot.calibration is None:
        snapshot = _calibrated(found, device_model(platform))
    return device_model(platform, snapshot.calibration), snapshot, tune


def _calibrated(found: tuning.Store, device: Device) -> tuning.Snapshot:
    """What the store knows after the device has been calibrated, if it can be."""
    try:
        with _measuring:
            bench, capability = make_bench(device), device.compute_capability
            measured = _apart(lambda: tuning.calibrate(bench, capability))
    except Exception as error:  # noqa: BLE001 - the device may be full, or Triton missing
        warnings.warn(
            "jevt: the GPU could not be calibrated, and predictions use data-sheet values:"
            f" {type(error).__name__}: {error}",
            JevtWarning,
            stacklevel=2,
        )
        return found.load()
    return found.add({}, measured)


def improve(
    planner: Callable[[Context], Plan], context: Context, folder: Path | None
) -> tuple[Plan, Context, tuple[str, ...]]:
    """Plans a program by measured times: what a plan lacks is measured, and it is made again.

    Args:
      planner: makes the plan of the program, by what its context knows.
      context: of the compilation, with ``tune``.
      folder: of the store.

    Returns:
      The plan, the context with what is known now, and what could not be measured, and why.
    """
    found = store(context.platform, folder)
    assert found is not None, "a context says tune only where there is a store"
    failed: dict[str, str] = {}
    with _measuring:
        context = dataclasses.replace(context, known=found.load())
        for _ in range(_ROUNDS):
            plan = planner(context)
            missing = {k: g for k, g in _unknown(plan, context).items() if k not in failed}
            if not missing:
                break
            bench = make_bench(context.device)
            for (key, group), report in zip(missing.items(), _progress(len(missing)), strict=True):
                result = _measure(group, bench, context.device.compute_capability)
                if result.record is None:
                    failed[key] = f"{group.name}, which is not measured: {result.reason}"
                else:
                    found.add({key: result.record})
                report(
                    f"{group.name}: " + ", ".join(map(str, result.trials[:3] or [result.reason]))
                )
            context = dataclasses.replace(context, known=found.load())
        if missing or failed:  # nothing that is only tried stays
            plan = planner(dataclasses.replace(context, tune=False))
    return plan, context, tuple(failed.values())


def _unknown(plan: Plan, context: Context) -> dict[str, Group]:
    """The plan's kernels of which nothing is known, equal ones once."""
    result: dict[str, Group] = {}
    for group in all_groups(plan):
        if group.target != "triton" or group.spec is None:
            continue
        if known.find(group.spec, group.jaxpr, context) is None:
            result.setdefault(known.key(group.spec, group.jaxpr), group)
    return result


def _measure(group: Group, bench: tuning.Bench, capability: int) -> tuning.Result:
    spec, jaxpr = group.spec, group.jaxpr
    assert spec is not None
    try:
        return _apart(
            lambda: tuning.measure(
                spec,
                jaxpr_as_fun(jaxpr),
                bench,
                capability=capability,
                expected_us=group.predicted_us or 0.0,
            )
        )
    except Exception as error:  # noqa: BLE001 - tuning must not break a program that would run
        return tuning.Result(None, reason=f"{type(error).__name__}: {error}".splitlines()[0])


def _apart[T](function: Callable[[], T]) -> T:
    """Calls it in a thread of its own: no mesh, default device or guard of the caller's is there.

    (What is measured is one device's program, whatever program is being compiled.)
    """
    x64 = jax.config.jax_enable_x64

    def run() -> T:
        with undisturbed(x64):
            return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _progress(count: int) -> Iterator[Callable[[str], None]]:
    """For each of so many kernels, what to call with a line about it.

    On a terminal a line replaces the one before.
    """
    live = sys.stderr.isatty()

    def report(number: int, text: str) -> None:
        line = f"jevt: tuning {number} of {count}, {text}"
        end = "\n" if number == count or not live else ""
        sys.stderr.write(("\r\x1b[K" if live else "") + line[: 110 if live else None] + end)
        sys.stderr.flush()

    for number in range(1, count + 1):
        yield functools.partial(report, number)
