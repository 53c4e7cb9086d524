"""Device kernels of a few steps, from JAX's profiler."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from benchmarks.kernel_table import aggregate
from benchmarks.messages import Profile


def profile_steps(run: Callable[[], object], steps: int) -> Profile:
    """Profiles ``run``, which does ``steps`` steps and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        return aggregate(_device_events(data), steps)


def _device_events(data: jax.profiler.ProfileData) -> Iterable[tuple[str, float]]:
    for plane in data.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    yield event.name, event.duration_ns
