"""From a group's jaxpr to its :class:`~jevt_kernels.spec.KernelSpec`.

This file alone decides whether a set of equations can be one kernel. ``lowering.builder`` goes
through the equations once, relating axes and collecting visitor nodes; ``lowering.layout`` resolves
axes to the atoms of one iteration space; ``lowering.gemm`` or ``lowering.tiles`` makes tile axes of
them, picks the mainloop, and checks that every output follows it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.extend.core import Jaxpr, Literal, Var

from jevt._jaxpr import aval
from jevt.lowering import bfloat16, binary_cross_entropy, gemm, rules, tiles
from jevt.lowering.builder import Builder
from jevt.lowering.errors import NotFusible
from jevt.lowering.layout import Resolved
from jevt.lowering.sigmoids import share_exponentials
from jevt_kernels import codegen, pressure, visitor
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.spec import KernelSpec, TensorType, UnsupportedKernel

#: Operands of one kernel; CUDA allows 4 KiB of parameters, and registers hold a pointer each.
MAX_OPERANDS = 64


def build(jaxpr: Jaxpr, name: str) -> KernelSpec:
    """The kernel that computes ``jaxpr``.

    Args:
      jaxpr: equations of a group, inputs as invars, needed results as outvars.
      name: identifier for the kernel.

    Raises:
      NotFusible: these equations cannot be one kernel; the message says why.
    """
    _check_operands(jaxpr)
    try:
        spec = _build(jaxpr, name, shared=True)
    except NotFusible:  # x and its own transpose, say, cannot run along the same axes
        spec = _build(jaxpr, name, shared=False)
    try:
        codegen.generate(spec)
    except UnsupportedKernel as error:
        raise NotFusible(str(error)) from None
    wanted = pressure.least(spec)
    if wanted > pressure.MOST:
        raise NotFusible(f"{wanted} registers a thread, {pressure.MOST} at most")
    return spec


def _build(jaxpr: Jaxpr, name: str, *, shared: bool) -> KernelSpec:
    builder = Builder(jaxpr, shared=shared)
    for eqn in jaxpr.eqns:
        builder.equation(eqn)
    for position, var in enumerate(jaxpr.outvars):
        builder.store(position, var)
    return _resolve(builder, name)


def _check_operands(jaxpr: Jaxpr) -> None:
    if not jaxpr.outvars:
        raise NotFusible("nothing outside needs a result of these equations")
    if len(jaxpr.invars) + len(jaxpr.outvars) > MAX_OPERANDS:
        raise NotFusible(f"more than {MAX_OPERANDS} operands")
    for var in (*jaxpr.invars, *jaxpr.outvars):
        rules.check_aval(aval(var))
        if isinstance(var, Var) and aval(var).size == 0:
            raise NotFusible("an operand without elements")
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            if math.prod(getattr(aval(var), "shape", ())) == 0:
                raise NotFusible("an operand without elements")


def _resolve(builder: Builder, name: str) -> KernelSpec:
    group = Resolved(builder)
    layout = gemm.layout(group) if group.contractions else tiles.layout(group)
    atoms = [atom for _, members in layout.tiles for atom in members]
    position_of = {atom: i for i, atom in enumerate(atoms)}
    tile_axes: list[TileAxis] = [
        TileAxis(tile, tuple(position_of[atom] for atom in members))
        for tile, members in layout.tiles
    ]
    space = Space(tuple(atom.size for atom in atoms), tuple(tile_axes))
    nodes: list[visitor.Node] = []
    renamed: dict[int, int] = {}
    for position, original in enumerate(builder.nodes):
        node = visitor.reading(original, renamed)
        if position in builder.addresses:
            found = group.strides[position]
            index = IndexMap(
                tuple(found.get(a, 0) for a in atoms), builder.addresses[position].offset
            )
            node = _at(node, index)
        if isinstance(node, visitor.Reduce):
            *first, last = layout.over[position]
            for direction in first:
                nodes.append(dataclasses.replace(node, over=direction))
                node = dataclasses.replace(node, operand=len(nodes) - 1)
            node = dataclasses.replace(node, over=last)
        if isinstance(node, visitor.Contract) and layout.swapped:
            node = dataclasses.replace(node, lhs=node.rhs, rhs=node.lhs)
        renamed[position] = len(nodes)
        nodes.append(node)
    return KernelSpec(
        name=name,
        mainloop=layout.mainloop,
        space=space,
        tree=_simplified(nodes),
        inputs=tuple(_tensor(var) for var in builder.jaxpr.invars),
        outputs=tuple(_tensor(var) for var in builder.jaxpr.outvars),
    )


def _at(node: visitor.Node, index: IndexMap) -> visitor.Node:
    assert isinstance(node, visitor.Load | visitor.Iota | visitor.Store)
    return dataclasses.replace(node, index=index)


def _tensor(var: Var | Literal) -> TensorType:
    return TensorType(tuple(aval(var).shape), np.dtype(aval(var).dtype))


def _simplified(nodes: list[visitor.Node]) -> visitor.Tree:
    """The tree of the nodes, with less arithmetic to the same results."""
    tree = _compact(share_exponentials(nodes))
    for rewrite in (binary_cross_entropy.simplify, bfloat16.shorten):
        rewritten = rewrite(tree)
        tree = tree if rewritten is tree else _compact(rewritten)
    return tree


def _compact(nodes: Sequence[visitor.Node]) -> visitor.Tree:
    """Merges equal nodes and drops what no store needs."""
    stores = (i for i, node in enumerate(nodes) if isinstance(node, visitor.Store))
    renamed: dict[int, int] = {}
    seen: dict[tuple[str, visitor.Node], int] = {}
    result: list[visitor.Node] = []
    for position in visitor.ancestors(nodes, *stores):
        node = visitor.reading(nodes[position], renamed)
        # repr tells 0.0 from -0.0 and 1 from True, which compare equal.
        key = (repr(node), node)
        if key not in seen:
            seen[key] = len(result)
            result.append(node)
        renamed[position] = seen[key]
    return tuple(result)
