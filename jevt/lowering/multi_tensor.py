"""Groups that do the same for tensors of their own, as one group of the multi_tensor mainloop.

What they share, such as a learning rate, is one input of the group.

    before  { lambda ; p:f32[8,4] g:f32[8,4] r:f32[]. let a = mul r g; b = sub p a in (b,) }
            { lambda ; q:f32[9] r:f32[] h:f32[9]. let c = mul r h; d = sub q c in (d,) }
    after   { lambda ; p g r q h. let a = mul r g; b = sub p a; c = mul r h; d = sub q c in (b, d) }
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import Jaxpr, Literal, Var

from jevt import _jaxpr
from jevt._jaxpr import aval
from jevt.lowering.errors import NotFusible
from jevt_kernels import codegen, multi_tensor
from jevt_kernels.spec import KernelSpec, UnsupportedKernel


def join(
    parts: Sequence[Jaxpr], specs: Sequence[KernelSpec], name: str
) -> tuple[Jaxpr, KernelSpec]:
    """The parts' equations one after the other, and the kernel that computes them.

    Args:
      parts: groups; none reads what another one makes.
      specs: their kernels.
      name: of the kernel.

    Raises:
      NotFusible: they do not do the same, or are too many for one launch.
    """
    try:
        spec = multi_tensor.merge(specs, [part.invars for part in parts], name)
        codegen.generate(spec)
    except (ValueError, UnsupportedKernel) as error:
        raise NotFusible(str(error)) from None
    return _jaxpr.together(parts), spec


def split(jaxpr: Jaxpr) -> list[Jaxpr]:
    """The parts of equations that have nothing to do with each other, by their first equation.

    Two equations belong together if one reads what the other makes, or if they share an input that
    is no scalar. What several parts share, such as a learning rate, is an input of each.
    """
    leader = list(range(len(jaxpr.eqns)))

    def find(position: int) -> int:
        while leader[position] != position:
            leader[position] = leader[leader[position]]
            position = leader[position]
        return position

    made = {v: p for p, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    first: dict[Var, int] = {}
    for position, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if isinstance(atom, Literal) or (atom not in made and aval(atom).size <= 1):
                continue
            a, b = find(position), find(made.get(atom, first.setdefault(atom, position)))
            leader[max(a, b)] = min(a, b)
    members: dict[int, list[int]] = {}
    for position in range(len(jaxpr.eqns)):
        members.setdefault(find(position), []).append(position)
    return [_part(jaxpr, positions) for positions in members.values()]


def _part(jaxpr: Jaxpr, positions: Sequence[int]) -> Jaxpr:
    eqns = [jaxpr.eqns[p] for p in positions]
    made = {v for eqn in eqns for v in eqn.outvars}
    read = (v for eqn in eqns for v in eqn.invars if isinstance(v, Var) and v not in made)
    return _jaxpr.make(
        list(dict.fromkeys(read)),
        [v for v in jaxpr.outvars if isinstance(v, Var) and v in made],
        eqns,
    )
