"""One number a sequence becomes one a token, in front of an equation that goes by tokens.

before  a:f32[4,6,40] = broadcast_in_dim[broadcast_dimensions=(0,)] k        k:f32[4]
after   l:f32[4,6] = broadcast_in_dim[broadcast_dimensions=(0,)] k
        a:f32[4,6,40] = broadcast_in_dim[broadcast_dimensions=(0, 1)] l
"""

from __future__ import annotations

from jax.extend.core import Jaxpr, Var
from jax.extend.core import primitives as p

from jevt import _jax_internals as internals
from jevt._jaxpr import aval
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import rebuild
from jevt.passes.attention.region import Program
from jevt.passes.chunks.region import Repeating


def repeat(program: Program, obstacle: Repeating) -> Jaxpr:
    """The program in which the operand of an equation has all its rows."""
    eqn = program.eqns[obstacle.position]
    atom, out = eqn.invars[obstacle.index], shape_of(eqn.outvars[0])
    rows = range(*obstacle.span)
    if eqn.primitive is p.broadcast_in_dim_p:
        have = [int(place) for place in eqn.params["broadcast_dimensions"]]
    else:
        have = list(range(len(out)))
    sizes = dict(zip(have, shape_of(atom), strict=True)) | {axis: out[axis] for axis in rows}
    axes = sorted(sizes)
    shape = tuple(sizes[axis] for axis in axes)
    places = tuple(map(axes.index, have))
    whole = Var(internals.array_like(atom.aval, shape, aval(atom).dtype))
    params = {"shape": shape, "broadcast_dimensions": places, "sharding": None}
    first = eqn.replace(
        primitive=p.broadcast_in_dim_p, invars=[atom], outvars=[whole], params=params
    )
    operands = [whole if i == obstacle.index else a for i, a in enumerate(eqn.invars)]
    second = eqn.replace(invars=operands)
    if eqn.primitive is p.broadcast_in_dim_p:
        second = second.replace(params={**eqn.params, "broadcast_dimensions": tuple(axes)})
    eqns = list(program.eqns)
    eqns[obstacle.position : obstacle.position + 1] = [first, second]
    return rebuild(program.jaxpr, eqns, {})
