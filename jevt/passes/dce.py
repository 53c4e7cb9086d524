"""Dead-code elimination: what no output needs and no effect requires is dropped.

Purpose: differentiation and inlining leave equations whose results nobody reads; they would enlarge
the graph to be partitioned.

Invariant: inputs, outputs and effectful equations stay. Unused results of loops and branches are
dropped within them too, carries of ``scan`` included.

    before  { lambda ; a:f32[8]. let b:f32[8] = sin a; _:f32[8] = cos a in (b,) }
    after   { lambda ; a:f32[8]. let b:f32[8] = sin a in (b,) }

The walk and the rules, one a primitive, are JAX's own
(``jax.interpreters.partial_eval.dce_jaxpr``), so that a primitive registered by anybody is treated
as its author meant.
"""

from __future__ import annotations

from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Drops dead equations of ``jaxpr`` and of its bodies; the jaxpr itself if there are none."""
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    # JAX's rules rebuild equations that carry jaxprs even where nothing is dead.
    return live if _size(live) != _size(jaxpr) else jaxpr


def _size(jaxpr: Jaxpr) -> tuple[int, ...]:
    """Numbers of equations, operands and results, bodies included: what elimination lowers."""
    eqns, operands, results = 0, 0, 0
    stack = [jaxpr]
    while stack:
        for eqn in stack.pop().eqns:
            eqns, operands, results = (
                eqns + 1,
                operands + len(eqn.invars),
                results + len(eqn.outvars),
            )
            for value in eqn.params.values():
                values = value if isinstance(value, tuple) else (value,)
                stack.extend(v for v in values if isinstance(v, Jaxpr))
    return eqns, operands, results
