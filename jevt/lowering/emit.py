"""From a plan to the jaxpr that is lowered: each Triton group becomes one ``jevt_kernel`` equation.

``jevt_kernel`` carries the group's own jaxpr beside its :class:`KernelSpec`. On CUDA it lowers to a
jax-triton call; on every other platform to the group's equations, which XLA then fuses as it likes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Primitive, Var, jaxpr_as_fun, new_jaxpr_eqn, no_effects
from jax.interpreters import mlir

from jevt import _jaxpr
from jevt._context import Context
from jevt._jaxpr import aval
from jevt.lowering import checking, compiling, waiting
from jevt.lowering import stored as storing
from jevt.lowering.alias import donated_aliases, donated_inputs, partners
from jevt.lowering.errors import JevtWarning
from jevt.lowering.naming import canonical, common_scope
from jevt.partition.plan import Group, Plan
from jevt.partition.printing import all_groups
from jevt_kernels import interpreter, launch
from jevt_kernels.spec import Config, KernelSpec, TensorType

kernel_p = Primitive("jevt_kernel")
kernel_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class _Parameters:
    """The parameters of ``jevt_kernel``.

    Attributes:
      jaxpr: the group's equations.
      spec: its kernel.
      config: how it is launched; None for the default.
      interpret: whether Triton's interpreter runs it where there is no GPU.
      capability: compute capability of the GPU; 0 for the one that is there.
      check: the group's name if its results are checked, "" else.
    """

    jaxpr: Jaxpr
    spec: KernelSpec
    config: Config | None
    interpret: bool
    capability: int
    check: str

    def equations(self, *args: Any) -> list[Any]:
        """The group as XLA runs it."""
        return jaxpr_as_fun(self.jaxpr)(*args)

    def checked(self, results: Iterable[Any], args: tuple[Any, ...]) -> list[Any]:
        """The results of the kernel, checked if that is wanted."""
        found = list(results)
        if self.check:
            expected = self.equations(*args)
            checking.compare(found, expected, args, self.spec, self.config, self.jaxpr, self.check)
        return found


@kernel_p.def_impl
def _impl(*args: Any, **params: Any) -> Any:
    return jax.jit(lambda *xs: kernel_p.bind(*xs, **params))(*args)


@kernel_p.def_abstract_eval
def _abstract_eval(*avals: Any, **params: Any) -> list[Any]:
    return [v.aval for v in _Parameters(**params).jaxpr.outvars]


def _equations(*args: Any, **params: Any) -> list[Any]:
    """The group left to XLA, or run through Triton's interpreter."""
    kernel = _Parameters(**params)
    if kernel.interpret:
        return kernel.checked(interpreter.call(kernel.spec, *args, config=kernel.config), args)
    return kernel.equations(*args)


def _triton(*args: Any, **params: Any) -> list[Any]:
    kernel = _Parameters(**params)
    capability = kernel.capability or None
    results = launch.call(kernel.spec, *args, config=kernel.config, compute_capability=capability)
    return kernel.checked(results, args)


mlir.register_lowering(kernel_p, mlir.lower_fun(_equations, multiple_results=True))
mlir.register_lowering(kernel_p, mlir.lower_fun(_triton, multiple_results=True), platform="cuda")


def lower(plan: Plan, context: Context, *, top: bool = True) -> tuple[Jaxpr, Plan]:
    """Rewrites ``plan.jaxpr`` to its groups.

    Args:
      plan: what to lower; bodies of control flow are lowered by their nested plans.
      context: for whom.
      top: whether ``plan.jaxpr`` is the whole program, whose donated inputs may be overwritten.

    Returns:
      The jaxpr, and the plan as it was really carried out: a group whose kernel failed to compile
      has gone back to XLA, with the reason, and a warning was given.
    """
    bodies: dict[tuple[int, int], Jaxpr] = {}
    nested: list[tuple[tuple[int, int], Plan]] = []
    for key, body in plan.nested:
        bodies[key], carried_out = lower(body, context, top=False)
        nested.append((key, carried_out))
    donated = donated_inputs(plan.jaxpr, context) if top else frozenset[Var]()
    plan = dataclasses.replace(plan, groups=waiting.in_order(plan.groups, donated))
    free = _free_at(plan, donated)
    wanted = partners(plan.jaxpr, donated)
    groups = tuple(_final(position, plan, inputs, wanted) for position, inputs in enumerate(free))
    gpu = context.platform == "cuda"
    if gpu:
        groups = _compiled(groups, context.device.compute_capability)
    planned, plan = plan, dataclasses.replace(plan, groups=groups, nested=tuple(nested))
    if top:
        _warn(planned, plan)
    eqns: list[JaxprEqn] = []
    stored = storing.behind_barriers(plan.jaxpr, groups) if gpu else frozenset[Var]()
    barriers: dict[Var, Var] = {}
    for group in groups:
        if group.target == "triton":
            eqns.append(_kernel_equation(plan, group, context))
            continue
        own = [_with_bodies(plan.jaxpr.eqns[i], i, bodies) for i in group.eqns]
        product = storing.is_product(group)
        eqns += storing.emit(own, stored, barriers) if product else own
    return plan.jaxpr.replace(eqns=eqns), plan


def _free_at(plan: Plan, donated: frozenset[Var]) -> list[frozenset[Var]]:
    """For each group, the donated inputs that it is the last to read."""
    last: dict[Var, int] = {}
    for position, group in enumerate(plan.groups):
        last.update((v, position) for v in group.jaxpr.invars if v in donated)
    for atom in plan.jaxpr.outvars:
        if isinstance(atom, Var):
            last.pop(atom, None)
    free: list[set[Var]] = [set() for _ in plan.groups]
    for var, position in last.items():
        free[position].add(var)
    return [frozenset(f) for f in free]


def _final(position: int, plan: Plan, free: frozenset[Var], wanted: Mapping[Var, Var]) -> Group:
    """The group with its final kernel: named, and with outputs in place where they may be."""
    group = plan.groups[position]
    if group.target != "triton" or group.spec is None:
        return group
    spec = canonical(group.spec, group.jaxpr, _stacks(plan, group))
    spec = dataclasses.replace(spec, aliases=donated_aliases(spec, group.jaxpr, free, wanted))
    group = dataclasses.replace(group, spec=spec)
    return group if spec.members else _waiting(group, spec, plan, position)


def _compiled(groups: Sequence[Group], capability: int) -> tuple[Group, ...]:
    """The groups with those left to XLA whose final kernels do not compile."""
    kernels = [(g.spec, g.config) for g in groups if g.target == "triton" and g.spec is not None]
    errors = compiling.compile_all(kernels, capability)

    def settled(group: Group) -> Group:
        if group.target != "triton" or group.spec is None:
            return group
        error = errors.get((group.spec, group.config))
        if error is None:
            return group
        reason = f"kernel did not compile: {launch.described(error)}"
        return dataclasses.replace(group, target="xla", reason=reason, fallback=True, config=None)

    return tuple(map(settled, groups)) if errors else tuple(groups)


def _waiting(group: Group, spec: KernelSpec, plan: Plan, position: int) -> Group:
    """The group with operands that it does not read, so that it follows those who made them."""
    overwritten = [group.jaxpr.invars[i] for i, _ in spec.aliases]
    operands = waiting.awaited(plan, position, overwritten)
    types = (TensorType(aval(v).shape, np.dtype(aval(v).dtype)) for v in operands)
    spec = dataclasses.replace(spec, inputs=(*spec.inputs, *types))
    jaxpr = group.jaxpr.replace(invars=[*group.jaxpr.invars, *operands])
    return dataclasses.replace(group, spec=spec, jaxpr=jaxpr)


def _warn(planned: Plan, plan: Plan) -> None:
    """One warning for each reason for which kernels that were planned do not compile.

    Where nothing compiles at all (no jax-triton, a GPU that is too old) the reason is the same for
    all of them.
    """
    names: dict[str, list[str]] = {}
    for before, after in zip(all_groups(planned), all_groups(plan), strict=True):
        if before.target == "triton" != after.target:
            names.setdefault(after.reason, []).append(after.name)
    for reason, (first, *others) in names.items():
        which = f"{len(others) + 1} groups ({first}, …) run" if others else f"group {first} runs"
        warnings.warn(f"jevt: {which} through XLA: {reason}", JevtWarning, stacklevel=2)


def _stacks(plan: Plan, group: Group) -> list[source_info_util.NameStack]:
    return [plan.jaxpr.eqns[i].source_info.name_stack for i in group.eqns]


def _kernel_equation(plan: Plan, group: Group, context: Context) -> JaxprEqn:
    params = {
        "jaxpr": group.jaxpr,
        "spec": group.spec,
        "config": group.config,
        "interpret": context.backend == "interpret",
        "capability": context.device.compute_capability,
        "check": group.name if context.check else "",
    }
    last = plan.jaxpr.eqns[group.eqns[-1]]
    scope = common_scope(_stacks(plan, group)).extend(group.name)
    source = source_info_util.SourceInfo(last.source_info.traceback, scope)
    return new_jaxpr_eqn(
        group.jaxpr.invars, group.jaxpr.outvars, kernel_p, params, no_effects, source, last.ctx
    )


def _with_bodies(eqn: JaxprEqn, position: int, bodies: Mapping[tuple[int, int], Jaxpr]) -> JaxprEqn:
    mine = [bodies.get((position, i)) for i, _ in enumerate(_bodies_of(eqn))]
    if not any(body is not None for body in mine):
        return eqn
    replacements = iter(mine)

    def replace(old: Jaxpr) -> Jaxpr:
        new = next(replacements)
        return old if new is None else new

    return _jaxpr.map_subjaxprs(eqn, replace)


def _bodies_of(eqn: JaxprEqn) -> Iterable[Jaxpr]:
    return (body for _, _, body in _jaxpr.subjaxprs(eqn))
