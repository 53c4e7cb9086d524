"""Where measured times are known they replace predicted ones.

The store's content at the start of a compilation travels in the context, so that one compilation
sees one content, and a plan that was made with another is not taken for it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jax.extend.core import Jaxpr

from jevt._context import Context
from jevt.lowering.errors import NotFusible
from jevt_kernels import tuning
from jevt_kernels.spec import KernelSpec

if TYPE_CHECKING:
    from jevt.partition.build import Builder
    from jevt.partition.plan import Group


def key(spec: KernelSpec, jaxpr: Jaxpr) -> str:
    """Under what the times of a group are stored: its kernel, and what XLA would run instead."""
    return tuning.key(spec, jaxpr.pretty_print(use_color=False))


def find(spec: KernelSpec, jaxpr: Jaxpr, context: Context) -> tuning.Record | None:
    """What was measured of a group, None if nothing was.

    A configuration that the mainloop does not offer is none that was measured: nothing else than
    what jevt itself would try is ever run because of a file.
    """
    if not context.known.kernels:
        return None
    record = context.known.kernels.get(key(spec, jaxpr))
    if record is None or record.config is None:
        return record
    return record if record.config in tuning.offered(tuning.anonymous(spec)) else None


def best_us(jaxpr: Jaxpr, builder: Builder, context: Context) -> float | None:
    """What equations take together by the better of a kernel and XLA, None if it is not known."""
    if not context.known.kernels:
        return None
    try:
        record = find(builder.spec(jaxpr, "candidate"), jaxpr, context)
    except NotFusible:
        return None
    if record is None or record.xla_us is None:
        return None
    return record.xla_us if record.kernel_us is None else min(record.kernel_us, record.xla_us)


def settled(group: Group, context: Context) -> Group | None:
    """A group as its measured times decide, None if they do not.

    Args:
      group: with a kernel, as the cost model sees it: ``predicted_us`` is the kernel's.
      context: of the compilation.
    """
    assert group.spec is not None
    record = find(group.spec, group.jaxpr, context)
    if record is None:
        return None
    left = dataclasses.replace(
        group, target="xla", predicted_us=group.xla_us, measured_us=record.xla_us, config=None
    )
    if record.kernel_us is None:
        return dataclasses.replace(left, reason=f"measured: {record.error}", fallback=True)
    ours, xla = record.kernel_us, record.xla_us
    if context.backend == "auto":
        if xla is None and (group.predicted_us or 0.0) > (group.xla_us or 0.0):
            return None
        if xla is not None and ours > xla:
            reason = f"measured: {ours:.1f} µs as a kernel, {xla:.1f} µs as XLA runs it"
            return dataclasses.replace(left, reason=reason)
    return dataclasses.replace(group, target="triton", measured_us=ours, config=record.config)
