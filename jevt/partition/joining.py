"""One group in place of several whose kernels have been made one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.extend.core import Jaxpr

from jevt._context import Context
from jevt.partition import names
from jevt.partition.plan import Group
from jevt.tuning import known
from jevt_kernels.spec import KernelSpec


def joined(
    groups: Sequence[Group],
    jaxpr: Jaxpr,
    spec: KernelSpec,
    predicted_us: float,
    context: Context,
) -> Group | None:
    """The group, named as if it were the plan's first; None if it is not predicted to be faster.

    Args:
      groups: what it takes the place of.
      jaxpr: their equations.
      spec: its kernel.
      predicted_us: what that takes.
      context: for measured times.
    """
    now = sum((g.predicted_us if g.measured_us is None else g.measured_us) or 0.0 for g in groups)
    if predicted_us >= now:
        return None
    name = names.group_name(0, spec.mainloop, jaxpr)
    together = Group(
        name=name,
        target="triton",
        kind=spec.mainloop,
        eqns=tuple(sorted(p for g in groups for p in g.eqns)),
        jaxpr=jaxpr,
        spec=dataclasses.replace(spec, name=name),
        predicted_us=predicted_us,
        xla_us=sum(g.xla_us or 0.0 for g in groups),
    )
    return known.settled(together, context) or together
