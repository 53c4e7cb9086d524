"""Sums of segments with pointwise work on their results, in the kernel that adds them up.

    fused_segment_sum:   the sum's operands, extras … -> results …

The epilogue is a jaxpr of pointwise equations and broadcasts: from the sum ``[R, F]`` and the
extras, which are ``[R, F]``, or broadcast to it, to results ``[R, F]``. In the kernel the sum is
not rounded before it; elsewhere it is, as the equations say.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.lowering import rules
from jevt.lowering.errors import NotFusible
from jevt.primitives._define import define
from jevt.primitives.segments import (
    call,
    fused_segment_sum_p,
    reference,
    segment_sum_p,
    spec_of,
    type_of,
)
from jevt_kernels import codegen
from jevt_kernels.index_map import IndexMap
from jevt_kernels.spec import KernelSpec, TensorType, UnsupportedKernel
from jevt_kernels.visitor import Compute, Constant, Load, Node, Store


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """Pointwise equations after a sum; no jaxpr among others, because it is no body to optimise.

    Attributes:
      jaxpr: from the sum and the extras to the results.
      text: the same as text, by which two are equal.
    """

    jaxpr: Jaxpr = dataclasses.field(compare=False)
    text: str

    @staticmethod
    def of(jaxpr: Jaxpr) -> Epilogue:
        return Epilogue(jaxpr, str(jaxpr))

    def __str__(self) -> str:
        return self.text


def _types(*operands: Any, epilogue: Epilogue, **params: Any) -> list[Any]:
    extras = len(epilogue.jaxpr.invars) - 1
    total = segment_sum_p.abstract_eval(*operands[: len(operands) - extras], **params)[0]
    want = [aval(v) for v in epilogue.jaxpr.invars]
    got = [total, *operands[len(operands) - extras :]]
    if [(a.shape, a.dtype) for a in want] != [(a.shape, a.dtype) for a in got]:
        raise ValueError(f"fused_segment_sum: expected a sum and extras {want}, got {got}")
    return [v.aval for v in epilogue.jaxpr.outvars]


def along(eqn: JaxprEqn) -> tuple[int, ...] | None:
    """Which of rows and columns the operand of a view to two axes runs along; None for others.

    Views are broadcasts, and reshapes of one axis to a row or a column.
    """
    if eqn.primitive is p.broadcast_in_dim_p:
        return tuple(map(int, eqn.params["broadcast_dimensions"]))
    if eqn.primitive is p.reshape_p and len(aval(eqn.invars[0]).shape) == 1:
        shape = aval(eqn.outvars[0]).shape
        if len(shape) == 2 and 1 in shape:
            return (1,) if shape[0] == 1 else (0,)
    return None


def with_epilogue(spec: KernelSpec, epilogue: Jaxpr) -> KernelSpec:
    """The kernel of a sum with an epilogue.

    Args:
      spec: the kernel of the sum, whose operands the extras follow.
      epilogue: from the sum ``[R, F]`` and the extras to results ``[R, F]``.

    Raises:
      NotFusible: an equation has no kernel form, or an extra is not seen along rows and columns.
    """
    rows, features = spec.outputs[0].shape
    _, _, width, _ = spec.space.sizes
    nodes: list[Node] = list(spec.tree[:-1])  # all but the store
    inputs = list(spec.inputs)
    total, *extras = epilogue.invars
    values: dict[Var, int] = {total: len(nodes) - 1}
    sources: dict[Var, tuple[int, tuple[int, ...]]] = {}  # operand, and the result's axes it has

    def load(number: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
        strides, step = [0, 0], 1
        for axis, size in reversed(tuple(zip(axes, shape, strict=True))):
            if size not in (1, (rows, features)[axis]):
                raise NotFusible(f"an extra of shape {shape} along axes {axes}")
            strides[axis] = step if size > 1 else 0
            step *= size
        along_rows, along_columns = strides
        index = IndexMap((along_rows, along_columns * width, along_columns, 0))
        nodes.append(Load(number, index))
        return len(nodes) - 1

    def node_of(atom: Atom) -> int:
        if isinstance(atom, Literal):
            nodes.append(Constant(np.asarray(atom.val).item(), np.dtype(aval(atom).dtype)))
            return len(nodes) - 1
        if atom not in values:
            number, axes = sources[atom]
            values[atom] = load(number, inputs[number].shape, axes)
        return values[atom]

    for extra in extras:
        sources[extra] = len(inputs), tuple(range(2))[: len(aval(extra).shape)]
        inputs.append(type_of(aval(extra)))
    for eqn in epilogue.eqns:
        axes, source = along(eqn), eqn.invars[0]
        if axes is not None and isinstance(source, Var) and source in sources:
            sources[eqn.outvars[0]] = sources[source][0], axes
            continue
        values.update(_computed(eqn, [node_of(a) for a in eqn.invars], nodes))
    store = IndexMap((features, width, 1, 0))
    stores = [Store(i, node_of(a), store) for i, a in enumerate(epilogue.outvars)]
    return dataclasses.replace(
        spec,
        name="segment_sum_fused",
        tree=(*nodes, *stores),
        inputs=tuple(inputs),
        outputs=tuple(
            TensorType((rows, features), np.dtype(aval(a).dtype)) for a in epilogue.outvars
        ),
        comment=f"{spec.comment}\n{epilogue}",
    )


def _computed(eqn: JaxprEqn, operands: list[int], nodes: list[Node]) -> dict[Var, int]:
    """Adds the nodes of a pointwise equation; returns where its results are."""
    if rules.classify(eqn).kind != "pointwise":
        raise NotFusible(f"{eqn.primitive.name} is not pointwise")
    operation = rules.POINTWISE[eqn.primitive](eqn)
    if operation.op == "copy":
        return {eqn.outvars[0]: operands[0]}
    constants = []
    for constant in operation.constants:
        nodes.append(Constant(constant, np.dtype("int32")))
        constants.append(len(nodes) - 1)
    results = {}
    for result, var in enumerate(eqn.outvars):
        dtype = np.dtype(aval(var).dtype)
        nodes.append(Compute(operation.op, (*operands, *constants), dtype, result))
        results[var] = len(nodes) - 1
    return results


def obstacle(operands: Any, epilogue: Jaxpr, *, dtype: Any, fills: bool) -> str:
    """Why a sum and its epilogue are no kernel, "" if they are.

    Args:
      operands: types of the sum's operands.
      epilogue: from the sum and the extras to the results.
      dtype: of the sum.
      fills: as of ``segment_sum``.
    """
    try:
        codegen.generate(with_epilogue(spec_of(operands, dtype=dtype, fills=fills), epilogue))
    except (NotFusible, UnsupportedKernel) as error:
        return str(error)
    return ""


def _split(operands: tuple[Any, ...], epilogue: Epilogue) -> tuple[tuple[Any, ...], ...]:
    count = len(operands) - (len(epilogue.jaxpr.invars) - 1)
    return operands[:count], operands[count:]


def _reference(
    *operands: jax.Array, epilogue: Epilogue, dtype: Any, fills: bool, capability: int
) -> Any:
    of_sum, extras = _split(operands, epilogue)
    total = reference(*of_sum, dtype=dtype, fills=fills, capability=capability)
    return jax.core.eval_jaxpr(epilogue.jaxpr, (), total, *extras)


def _kernel(
    *operands: jax.Array, epilogue: Epilogue, dtype: Any, fills: bool, capability: int
) -> Any:
    of_sum, extras = _split(operands, epilogue)
    spec = with_epilogue(spec_of(of_sum, dtype=dtype, fills=fills), epilogue.jaxpr)
    results = call(spec, of_sum, extras, capability)
    if results is None:
        return _reference(
            *operands, epilogue=epilogue, dtype=dtype, fills=fills, capability=capability
        )
    return list(results)


define(fused_segment_sum_p, _types, _reference, _kernel)
