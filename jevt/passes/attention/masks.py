"""Masks that depend on positions alone: causal ones, and those that hide nothing.

They are evaluated at their real size, each axis along which nothing changes with size 1, so that a
mask that every example of a batch repeats costs one example.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.lowering.axes import Axes, Factor
from jevt.passes._facts import shape_of
from jevt.passes.attention.labels import Labels, atoms
from jevt.passes.attention.operations import REDUCTIONS, Array, is_known, pointwise
from jevt.passes.attention.region import Program

#: Longest computation of a mask, in equations, and its largest value, in elements.
MAX_EQUATIONS = 60
MAX_ELEMENTS = 1 << 26


def seen_up_to(program: Program, labels: Labels, mask: Var, seen: bool) -> str | list[Factor]:
    """What a mask of positions lets through.

    Args:
      program: where it is computed.
      labels: names of its axes.
      mask: boolean.
      seen: what it is where a key is seen.

    Returns:
      "all", "other", or, if query t sees the keys up to t, the names of the queries' axis.
    """
    value = _Positions(program).value(mask)
    if value is None:
        return "other"
    value = value if seen else ~value
    if value.all():
        return "all"
    axes: Axes = labels.axes[mask]
    varying = [i for i, size in enumerate(value.shape) if size != 1]
    if len(varying) != 2:
        return "other"
    i, j = varying
    matrix = value.reshape(value.shape[i], value.shape[j])
    if matrix.shape[0] != matrix.shape[1]:
        return "other"
    triangle = np.tri(matrix.shape[0], dtype=bool)
    if np.array_equal(matrix, triangle):
        return atoms((axes[i],))
    return atoms((axes[j],)) if np.array_equal(matrix, triangle.T) else "other"


def shows_some_key(
    program: Program, labels: Labels, mask: Var, seen: bool, keys: Collection[Factor]
) -> bool:
    """Whether a mask of positions lets every query see a key."""
    value = _Positions(program).value(mask)
    if value is None:
        return False
    axes = labels.axes[mask]
    along = tuple(i for i, axis in enumerate(axes) if set(atoms((axis,))) & set(keys))
    return bool((value if seen else ~value).any(axis=along).all())


class _Positions:
    """Values that depend on no input, with axes of size 1 where nothing changes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.known: dict[Var, Array | None] = {}

    def value(self, atom: Atom) -> Array | None:
        if isinstance(atom, Literal):
            return np.asarray(atom.val)
        if atom not in self.known:
            self.known[atom] = None
            eqn = self.program.definition(atom)
            if eqn is not None and len(self.known) <= MAX_EQUATIONS:
                self.known[atom] = self._evaluate(eqn)
        return self.known[atom]

    def _evaluate(self, eqn: JaxprEqn) -> Array | None:
        shape = shape_of(eqn.outvars[0])
        if eqn.primitive is p.iota_p:
            return None if eqn.invars else _iota(shape, int(eqn.params["dimension"]))
        if not is_known(eqn) or eqn.primitive in REDUCTIONS:
            return None
        operands = [self.value(atom) for atom in eqn.invars]
        if any(operand is None for operand in operands):
            return None
        arrays = [operand for operand in operands if operand is not None]
        if math.prod(np.broadcast_shapes(*(a.shape for a in arrays if a.ndim))) > MAX_ELEMENTS:
            return None
        if eqn.primitive is p.transpose_p:
            return arrays[0].transpose(eqn.params["permutation"])
        if eqn.primitive is p.broadcast_in_dim_p:
            return _broadcast(arrays[0], shape, eqn.params["broadcast_dimensions"])
        if eqn.primitive in (p.reshape_p, p.squeeze_p):
            return _reshape(arrays[0], shape_of(eqn.invars[0]), shape)
        with np.errstate(all="ignore"):
            return pointwise(eqn)(*(_of_rank(a, len(shape)) for a in arrays))


def _iota(shape: Sequence[int], dimension: int) -> Array:
    thin = [1] * len(shape)
    thin[dimension] = shape[dimension]
    return np.arange(shape[dimension]).reshape(thin)


def _of_rank(array: Array, rank: int) -> Array:
    return array.reshape((1,) * rank) if array.ndim == 0 else array


def _broadcast(array: Array, shape: Sequence[int], dimensions: Any) -> Array:
    thin = [1] * len(shape)
    for source, target in enumerate(dimensions):
        thin[int(target)] = array.shape[source]
    return array.reshape(thin)


def _reshape(array: Array, old: Sequence[int], new: Sequence[int]) -> Array | None:
    if array.size == 1:
        return array.reshape((1,) * len(new))
    if [s for s in old if s != 1] == [s for s in new if s != 1]:
        sizes = iter(thin for thin, size in zip(array.shape, old, strict=True) if size != 1)
        return array.reshape([1 if size == 1 else next(sizes) for size in new])
    if math.prod(new) > MAX_ELEMENTS:
        return None
    return np.broadcast_to(array, old).reshape(new)
