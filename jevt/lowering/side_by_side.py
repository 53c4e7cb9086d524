"""Groups that do the same for tensors of one shape, as one group of the mainloop that each has.

    before  { lambda ; p:f32[64,8]. let a = reduce_sum p over 0 in (a,) }
            { lambda ; q:f32[64,8]. let b = reduce_sum q over 0 in (b,) }
    after   { lambda ; p q. let a = reduce_sum p over 0; b = reduce_sum q over 0 in (a, b) }

The builder would not relate the axes of tensors that no equation relates; here they run along the
same ones because the kernels' iteration spaces are equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.extend.core import Jaxpr, Var

from jevt import _jaxpr
from jevt.lowering.errors import NotFusible
from jevt_kernels import codegen, visitor
from jevt_kernels.spec import KernelSpec, TensorType, UnsupportedKernel


def join(
    parts: Sequence[Jaxpr], specs: Sequence[KernelSpec], name: str
) -> tuple[Jaxpr, KernelSpec]:
    """The parts' equations one after the other, and the kernel that computes them.

    Args:
      parts: groups; none reads what another one makes.
      specs: their kernels, of one mainloop and one iteration space.
      name: of the kernel.

    Raises:
      NotFusible: their iteration spaces differ, or they are too much for one kernel.
    """
    first = specs[0]
    if any((s.mainloop, s.space) != (first.mainloop, first.space) for s in specs):
        raise NotFusible("kernels of different iteration spaces")
    inputs: dict[Var, TensorType] = {}
    outputs: list[TensorType] = []
    nodes: list[visitor.Node] = []
    for part, spec in zip(parts, specs, strict=True):
        inputs |= dict(zip(part.invars, spec.inputs, strict=True))
        at = {var: position for position, var in enumerate(inputs)}
        renamed: dict[int, int] = {}
        for position, original in enumerate(spec.tree):
            node = visitor.reading(original, renamed)
            if isinstance(node, visitor.Load | visitor.Lookup):
                node = dataclasses.replace(node, input=at[part.invars[node.input]])
            elif isinstance(node, visitor.Segment):
                raise NotFusible("sums of segments have a kernel each")
            elif isinstance(node, visitor.Store):
                node = dataclasses.replace(node, output=len(outputs) + node.output)
            renamed[position] = len(nodes)
            nodes.append(node)
        outputs += spec.outputs
    joined = dataclasses.replace(
        first, name=name, tree=tuple(nodes), inputs=tuple(inputs.values()), outputs=tuple(outputs)
    )
    try:
        codegen.generate(joined)
    except UnsupportedKernel as error:
        raise NotFusible(str(error)) from None
    return _jaxpr.together(parts), joined
