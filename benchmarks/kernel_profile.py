"""Device kernels of a few steps, from JAX's profiler."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from benchmarks.categories import category, short_name
from benchmarks.messages import Kernel, Profile


def profile_steps(run: Callable[[], None], steps: int) -> Profile:
    """Profiles ``run``, which does ``steps`` steps and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        return aggregate(_device_events(data), steps)


def aggregate(events: Iterable[tuple[str, float]], steps: int) -> Profile:
    """Sums (kernel, nanoseconds) over ``steps`` steps into a profile of one step."""
    nanoseconds: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for name, duration in events:
        nanoseconds[short_name(name)] += duration
        launches[short_name(name)] += 1
    return Profile(
        tuple(
            Kernel(name, category(name), ns / steps / 1e6, launches[name] / steps)
            for name, ns in nanoseconds.most_common()
        )
    )


def _device_events(data: jax.profiler.ProfileData) -> Iterable[tuple[str, float]]:
    for plane in data.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    yield event.name, event.duration_ns
