"""Reduction elimination: sums whose result is known without adding anything up, and sums of less.

Purpose: a reduction bounds what a kernel can hold, and each one that goes joins two kernels. (EVT,
ASPLOS 2024, section 4: identities on sums, applied before fusion.)

Invariant: each identity holds in exact arithmetic, and a sum that is not finite because an operand
is not is replaced by something that is not (∞·(1 + 0) may stand for ∞·1 + ∞·0, which is NaN).
Identities that round differently (marked ≈) are used for float32 and float64 alone; results differ
by a few roundings of the sum of magnitudes, which is the error of the sum itself. Narrower types
accumulate in float32, and would be rounded more often. A factor is pulled out on the understanding
that the sum without it is in the type's range, which is why literal factors below 1, as of a mean
that is spelled ``Σ x/n``, stay inside.

The identities; A are the summed axes, n the number of summed elements, c is constant along A:

    Σ_A c             = n·c                          where n is a number of the type
    Σ_A over axes of size 1 = a reshape
    Σ_A B(y)          = n·Σ_A' y                     B repeats y
    Σ_A -x            = -Σ_A x
    Σ_A x             = an equal sum that exists already
    Σ_A (c·x)         ≈ c·Σ_A x,   Σ_A (x/c) ≈ Σ_A x / c
    Σ_A ((c·x)·y)     ≈ c·Σ_A (x·y)                  as in the gradient of a softmax
    Σ_A (x + y)       ≈ Σ_A x + Σ_A y                where both are known
    Σ_A (x - mean_A x) ≈ 0·mean_A x                  0, but NaN where the mean is NaN or infinite
    Σ_A (e / Σ_A e)   ≈ s / s                        a softmax: 1, but NaN where s is 0, ∞ or NaN
    Σ_c (iota_c == i)  = (0 ≤ i < n)                 one-hot, of any type
    Σ_c (iota_c == i ? u : 0) = (0 ≤ i < n ? u : 0)
    Σ_A Σ_B x         ≈ Σ_AB x                       where neither sum is along the contiguous axis
    Σ_A transpose x   = transpose Σ_A' x,   Σ_A rev x ≈ rev Σ_A x
    Σ_i (A·B)_ij      ≈ (Σ_i A)·B                    for an axis i of one operand alone

and those of ``products.py`` and ``picks.py``, on sums of products, of ``choices.py``, and of
``ties.py``.

    before  { lambda ; a:f32[8,5] b:i32[8]. let
                c:bool[8,5] = eq (iota[dimension=1]) (broadcast_in_dim b)
                d:f32[8,5] = convert_element_type c
                e:f32[8,5] = mul d -0.125; f:f32[8] = reduce_sum[axes=(1,)] e in (f,) }
    after   { lambda ; a:f32[8,5] b:i32[8]. let
                c:bool[8] = and (ge b 0) (le b 4); d:f32[8] = convert_element_type c
                f:f32[8] = mul d -0.125 in (f,) }

Known sums are in ``jevt/passes/reductions/known.py``, ``products.py`` and ``picks.py``, reductions
of less in ``smaller.py``, what is left of the gradients of a maximum in ``ties.py``.
"""

from __future__ import annotations

from jax.extend.core import Jaxpr
from jax.extend.core import primitives as p

from jevt.passes._rules import Rules, merged, rewrite
from jevt.passes.canonical import arithmetic, views
from jevt.passes.reductions import ties
from jevt.passes.reductions.choices import chosen, decided
from jevt.passes.reductions.known import eliminated
from jevt.passes.reductions.picks import picked
from jevt.passes.reductions.smaller import (
    contracted,
    nested,
    of_repeated,
    of_view,
    scaled,
    unit_axes,
)

RULES: Rules = merged(
    {
        p.reduce_sum_p: (
            unit_axes,
            eliminated,
            of_view,
            of_repeated,
            picked,
            scaled,
            contracted,
            nested,
            chosen,
        ),
        p.reduce_max_p: (unit_axes,),
        p.reduce_min_p: (unit_axes,),
        p.select_n_p: (decided,),
    },
    ties.RULES,
    views.RULES,
    arithmetic.RULES,
)


def run(jaxpr: Jaxpr) -> Jaxpr:
    """Simplifies the reductions of ``jaxpr`` and of its bodies."""
    return rewrite(jaxpr, RULES)
