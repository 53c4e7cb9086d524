"""Whether a recognised attention may be replaced: types, roundings, readers, order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._rules import on_same_mesh
from jevt.passes.attention.arrange import arrange
from jevt.passes.attention.match import Match
from jevt.passes.attention.operations import VIEWS, NoMatch
from jevt.passes.attention.region import Program
from jevt.primitives.cudnn_attention import Case

# Algorithms whose products take 16-bit operands, whatever the type of the arrays.
_NARROW_ALGORITHMS = frozenset(
    getattr(lax.DotAlgorithmPreset, name)
    for name in ("BF16_BF16_F32", "F16_F16_F32", "BF16_BF16_BF16", "F16_F16_F16")
)


def check(match: Match, obstacle: Callable[[Case], str]) -> None:
    """Raises :class:`NoMatch` with the reason if the attention has to stay as it is."""
    roles = match.roles
    uses = [roles.q, roles.k, roles.v] + ([roles.d_out] if roles.d_out is not None else [])
    types = {_dtype(use.root) for use in uses}
    if len(types) != 1:
        names = ", ".join(sorted(t.name for t in types))
        raise NoMatch(f"operands of different types: {names}")
    (dtype,) = types
    case = Case(
        arrange(match).shape(),
        dtype.name,
        biased=bool(match.biases or match.masks),
        trained=roles.d_out is not None,
    )
    if reason := obstacle(case):
        raise NoMatch(reason)
    if _is_narrow(dtype):
        _check_roundings(match)
    if not on_same_mesh([use.root for use in uses]):
        raise NoMatch("operands vary over different axes of a mesh")
    places(match)


def _check_roundings(match: Match) -> None:
    """Nothing that the program keeps in float32 may be rounded to 16 bits."""
    program, roles = match.region.program, match.roles
    for part, position in roles.results.items():
        eqn = program.eqns[position]
        inside = next(a for a in eqn.invars if a in match.region.derived)
        if not _is_narrow(_dtype(inside)) and not _is_narrowed(eqn.params["precision"]):
            raise NoMatch(f"the product that gives {part} is computed in {_dtype(inside).name}")
        if not _is_narrow(_dtype(eqn.outvars[0])) and not _is_rounded(program, eqn.outvars[0]):
            raise NoMatch(f"{part} is needed in {_dtype(eqn.outvars[0]).name}")
    for _, bias in match.biases:
        if not _is_narrow(_dtype(bias)):
            raise NoMatch(f"a bias in {_dtype(bias).name}")


def _is_narrowed(precision: Any) -> bool:
    return isinstance(precision, lax.DotAlgorithmPreset) and precision in _NARROW_ALGORITHMS


def _is_rounded(program: Program, var: Var) -> bool:
    """Whether all readers of a value, through views, cast it to 16 bits."""
    if var in program.outputs:
        return False
    for position in program.readers.get(var, ()):
        eqn = program.eqns[position]
        if eqn.primitive is p.convert_element_type_p and _is_narrow(eqn.params["new_dtype"]):
            continue
        if eqn.primitive not in VIEWS or not _is_rounded(program, eqn.outvars[0]):
            return False
    return True


def places(match: Match) -> tuple[int, int]:
    """Positions before which the forward and the backward equation stand.

    Raises:
      NoMatch: an operand comes later than that.
    """
    region, roles = match.region, match.roles
    results = dict(roles.results)
    out = results.pop("out", None)
    backward = min([*results.values(), *region.gradients], default=len(region.program.eqns))
    forward = backward if out is None else min(out, backward)
    needed = [use.root for use in (roles.q, roles.k, roles.v)]
    needed += match.added()
    if any(region.program.maker.get(var, -1) >= forward for var in needed):
        raise NoMatch("the values come later than the gradient")
    if roles.d_out is not None and region.program.maker.get(roles.d_out.root, -1) >= backward:
        raise NoMatch("the gradient of the output comes later than a product with it")
    return forward, backward


def _dtype(atom: Atom) -> np.dtype[Any]:
    aval: Any = atom.aval
    return np.dtype(aval.dtype)


def _is_narrow(dtype: Any) -> bool:
    """Whether a type is bfloat16 or float16."""
    return dtype in (jax.numpy.bfloat16, np.float16)
