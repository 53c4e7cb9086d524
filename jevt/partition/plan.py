"""The plan: which equations of a jaxpr run together, as what, and why."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jax.extend.core import Jaxpr

from jevt._context import Context
from jevt_kernels.spec import Config, KernelSpec

type Target = Literal["triton", "xla"]


@dataclasses.dataclass(frozen=True)
class Group:
    """A set of equations that run as one unit.

    Attributes:
      name: stable within the plan: position, kind and the innermost named scope.
      target: "triton" when it becomes one generated kernel, "xla" when its equations stay as they
        are.
      kind: the mainloop's name for Triton groups and for candidates that the cost model left to
        XLA, "attention" for a call of its own, "opaque" for an equation that no mainloop takes.
      eqns: positions in ``Plan.jaxpr.eqns``, ascending.
      jaxpr: the group as a function of its inputs (invars) to its outputs (outvars).
      spec: the kernel; None for opaque groups.
      predicted_us: by the roofline for ``target``; None where unknown (opaque groups).
      xla_us: predicted time of the same equations left to XLA.
      measured_us: for ``target``, from the tuning store; None when never measured.
      reason: why the group is not a Triton kernel; "" when it is.
      fallback: the reason is not a decision of the cost model or of a measurement.
      config: the kernel's fastest configuration, from the tuning store; None for the mainloop's
        first choice.
    """

    name: str
    target: Target
    kind: str
    eqns: tuple[int, ...]
    jaxpr: Jaxpr
    spec: KernelSpec | None = None
    predicted_us: float | None = None
    xla_us: float | None = None
    measured_us: float | None = None
    reason: str = ""
    fallback: bool = False
    config: Config | None = None


@dataclasses.dataclass(frozen=True)
class Solution:
    """What the solver said.

    Attributes:
      status: "optimal", "feasible", "greedy" (no solution in time) or "trivial" (nothing to
        decide).
      objective_us: predicted time of the chosen partition's memory traffic and launches.
      bound_us: proven lower bound of the same; equals the objective when optimal.
      seconds: wall time.
      rounds: number of solves, more than 1 when lazily added constraints were needed.
      stopped: what ended the search for some component before its optimum was proven: "work", the
        limit on the solver's own count of its work, which is the same in every run, or "clock", the
        time limit, after which another run may give another plan.
    """

    status: Literal["optimal", "feasible", "greedy", "trivial"]
    objective_us: float
    bound_us: float
    seconds: float
    rounds: int = 1
    stopped: Literal["", "work", "clock"] = ""

    @property
    def gap(self) -> float:
        """Relative distance between objective and bound; 0 when proven optimal."""
        return 0.0 if not self.objective_us else max(0.0, 1 - self.bound_us / self.objective_us)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A partition of the equations of ``jaxpr``.

    Attributes:
      jaxpr: the program that was partitioned.
      groups: in an order in which they can run; every equation is in exactly one.
      solution: the solver's account.
      nested: plans of the bodies of control-flow equations, by equation position and body position.
      context: the circumstances that it was made for.
    """

    jaxpr: Jaxpr
    groups: tuple[Group, ...]
    solution: Solution
    nested: tuple[tuple[tuple[int, int], Plan], ...] = ()
    context: Context | None = None

    def to_dot(self) -> str:
        """The plan as a drawing in Graphviz's language, see :mod:`jevt.report.drawing`."""
        from jevt.report import drawing

        return drawing.to_dot(self)

    def to_svg(self) -> str:
        """The drawing as SVG; needs Graphviz's program ``dot``.

        Raises:
          RuntimeError: it is not there, or failed.
        """
        from jevt.report import drawing

        return drawing.to_svg(self)
