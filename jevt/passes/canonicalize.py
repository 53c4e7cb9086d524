"""Canonicalisation: few spellings of what programs and JAX's differentiation write in many.

Purpose: one form for the partitioner, the recognisers and the kernels to know, and nothing left of
what differentiation computes for cases that cannot occur. (EVT, ASPLOS 2024, section 4: the graph
is brought to normal form before reductions are eliminated and patterns matched.)

Invariant: every value is what it was, NaN, infinities and signs of zero included, but for the
roundings that the rules' docstrings name, none of which is coarser than before. Equations that
lose their readers are left to dead-code elimination; new equations keep the source, scopes and
settings of the one they stand for. Inside ``shard_map``, and under explicit sharding, a rule that
would mix values of different types gives up.

    before  { lambda ; a:f32[8,4]. let
                b:f32[8] = reduce_sum[axes=(1,)] (exp a); c:f32[8] = abs b; d:bool[8] = ge b 0.0
                e:f32[8] = div 0.125 c; f:f32[8] = select_n d e 0…; g:f32[8] = select_n d 0… e
                h:f32[8] = neg f; i:f32[8] = add_any g h in (i, …) }
    after   { lambda ; a:f32[8,4]. let
                b:f32[8] = reduce_sum[axes=(1,)] (exp a); e:f32[8] = div 0.125 b in (e, …) }

The rules are in ``jevt/passes/canonical/``, by topic; ``jevt/passes/_rules.py`` applies them.
"""

from __future__ import annotations

from jax.extend.core import Jaxpr

from jevt.passes._rules import merged, rewrite
from jevt.passes.canonical import (
    arithmetic,
    casts,
    dots,
    logistic,
    pads,
    positions,
    reversals,
    selects,
    views,
)

RULES = merged(
    views.RULES,
    positions.RULES,
    reversals.RULES,
    arithmetic.RULES,
    casts.RULES,
    selects.RULES,
    logistic.RULES,
    pads.RULES,
    dots.RULES,
)


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Brings the equations of ``jaxpr`` and of its bodies to canonical form."""
    return rewrite(jaxpr, RULES)
