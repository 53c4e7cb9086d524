"""Batch norms of matrix products, without the product in memory. For GPUs.

Purpose: where y = x·W has many more columns than x has, as the last convolution of a bottleneck
(four times as many), a step moves little but y and what has its size: y is written for its
statistics, read to be normalised, read with the cotangent g for the norm's sums, and read again to
make dy, which is written and read by two products. All of that follows from x and g, by arrays of
W's size. With s = Σx and c the sums without what the means contribute, over M rows,

    xx = xᵀx - s·sᵀ/M                 [C, C], one reading of x
    xy = xx·W                         [C, N]
    mean = s·W/M,  variance = Σ W∘xy / M,  rstd = 1/√(variance + ε)
    xg = xᵀg - s·(Σg)ᵀ/M              [C, N], a product in the place of that for dW
    Σ g(y - mean) = Σ W∘xg

and, with k = rstd·γ and t = rstd²·Σg(y - mean)/M, dy = k∘(g - Σg/M - t∘(y - mean)) gives

    dW = xᵀdy = k∘(xg - t∘xy)
    dX = dy·Wᵀ = g·Aᵀ + x·B - e       A = k∘W,  B = -(t∘W)·Aᵀ,  e = (A·Σg + Bᵀs)/M

So y is read by nothing but what normalises it, which can be the epilogue of the product, dy is
never made, and dX is a sum of products, for one kernel (:mod:`.add_products`).

Invariant: the same values but for rounding, of which there is no more. y and dy were rounded to
bfloat16 and are not; A and t∘W are. What x·B takes away of g·Aᵀ is taken of A as it is rounded,
and B is multiplied in two parts of 8 bits, so that little may be left (dX is as exact as before
whatever g is, or more). e is made of what is multiplied, so that dX adds up to 0 over all rows as
it should. The means are subtracted from sums in float32 before W is multiplied, with three parts of
8 bits of xx: the variance loses to cancellation what E[y²] - mean² loses, and no more where columns
of x nearly depend on each other (up to a part in common that is 100 times the rest and no part of
y: then the variance's error is 2e-3, where y's rounding makes it 6e-4). (With means of 100
deviations the errors of statistics, dW and dγ are 1e-3 to 4e-3, and were 4e-2 to 3e-1.) The
rounding of A and t∘W is the same for all rows, where that of dy is another in each.

Left alone: where it does not pay, by the bytes, operations and launches that the device's model has
for both, in particular where N < 2·C; float16, in which A and t∘W could underflow; float32 and
float64; norms that take the variance in two passes; biases between product and norm; y or dy that
somebody else reads; norms whose gradient is not here, or of which x or W needs none.

    before  { lambda ; x:bf16[4096,64] w:bf16[64,256] g:bf16[4096,256] …. let
                y:bf16[4096,256] = dot_general x w; z:f32[4096,256] = convert_element_type y
                m v r = norm_statistics[axes=(0,)] z; n = mul (sub z m) r; …
                h:f32[4096,256] = convert_element_type g; d a b = norm_gradient[axes=(0,)] z m r h
                e:bf16[4096,256] = convert_element_type d
                dx = dot_general e w; dw = dot_general x e in (n, a, b, dx, dw) }
    after   { lambda ; x:bf16[4096,64] w:bf16[64,256] g:bf16[4096,256] …. let
                y:bf16[4096,256] = dot_general x w; z:f32[4096,256] = convert_element_type y
                xx:f32[64,64] = …; xy:f32[64,256] = …; m:f32[256] = …; r:f32[256] = …
                n = mul (sub z m) r; …
                xg:f32[64,256] = dot_general x g; a:f32[256] = reduce_sum h; b:f32[256] = …
                k:bf16[64,256] = …; p:bf16[64,64] = …; q:bf16[64,64] = …; e:f32[1,64] = …
                l = add (add (dot_general g k) (dot_general x p)) (dot_general x q)
                dx = convert_element_type (sub l e); dw:bf16[64,256] = …
              in (n, a, b, dx, dw) }
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax.extend.core import Jaxpr, Var

from jevt._context import Context
from jevt._jaxpr import Atom
from jevt.passes._readers import Readers
from jevt.passes._remarks import Note
from jevt.passes._replace import Replacements, replace
from jevt.passes._rules import Graph
from jevt.passes.normed_products.match import NormedProduct, find
from jevt.passes.normed_products.price import saved_us
from jevt.passes.normed_products.write import Writer


def run(jaxpr: Jaxpr, context: Context, note: Note = lambda _: None) -> Jaxpr:
    """Rewrites the batch norms of products of ``jaxpr`` and of its bodies.

    Args:
      jaxpr: with norms as composites.
      context: for whom it is compiled.
      note: receives how many norms were rewritten.
    """
    taken: list[NormedProduct] = []
    result = replace(jaxpr, context, functools.partial(_replacements, taken))
    if taken:
        note(f"batch norms of products: {len(taken)} without the product in memory")
    return result


def _replacements(
    taken: list[NormedProduct], jaxpr: Jaxpr, context: Context, outermost: bool
) -> Replacements:
    del outermost
    result: dict[Var, Callable[[Graph], Atom]] = {}
    for found in find(jaxpr, Readers(jaxpr)):
        if saved_us(found, context.device) <= 0.0:
            continue
        taken.append(found)
        writer = Writer(found)
        result[found.statistics.outvars[0]] = writer.statistics
        result[found.gradient.outvars[0]] = writer.sums
        result[found.to_w.outvars[0]] = writer.to_w
        result[found.to_x.outvars[0]] = writer.to_x
    return result
