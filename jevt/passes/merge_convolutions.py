"""Convolutions of one input become one convolution with all their filters. For GPUs.

Purpose: a text CNN convolves its documents with windows of several widths, 32 filters each. cuDNN
is slow with few filters, and reads the documents once for each width. With x for the documents,

    y_i[b, o, f]   = Σ x[b, o·s + j·d - low_i, c] · w_i[f, j, c]       over j < K_i and c
    dw_i[c, j, f]  = Σ x[b, o·s + j·d - low_i, c] · dy_i[b, o, f]      over b and o

The forward ones have as many results, and their windows fit into one that begins where the first of
them does: the others are padded with zeros. The gradients of weights are, to JAX, convolutions
with windows dy_i of one size (and s for d), whose results fit into one longer result, of which
each is a part. In both cases filters are concatenated, and results are slices of the one result.
XML-CNN's three of widths 2, 4 and 8 took 461 µs forward on an H100, and 544 µs for the gradients;
as one convolution 251 µs, and 291 with the concatenation.

Invariant: the same sums in the same precision, and zeros times elements that the shorter window
does not reach: one that is not finite makes those results NaN. Equations that read results are
moved behind the last operand.

Merged are those that the cost model predicts to be faster so, by 10 µs and a tenth at least; two at
a time, those first that gain most. cuDNN is taken to reach cuBLAS's rate with 128 filters, with
fewer as much less (an H100: 151 TFLOPS with 32, 490 with 96). Left alone:

* 128 filters and more;
* windows and results that both differ, as without padding; different strides, dilations, layouts;
* float32 in its highest precision and float64, which have no tensor cores to fill;
* convolutions that depend on each other, groups, dilated inputs.

Gradients of the input are a sum, not parts of one result, and nothing asks for those of a first
layer.

    before  { lambda ; a:bf16[64,512,300] b:bf16[3,300,32] c:bf16[5,300,32]. let
                d:bf16[64,512,32] = conv_general_dilated[padding=((1, 1),)] a b
                e:bf16[64,512,32] = conv_general_dilated[padding=((2, 2),)] a c
                in (d, e) }
    after   { lambda ; a:bf16[64,512,300] b:bf16[3,300,32] c:bf16[5,300,32]. let
                f:bf16[5,300,32] = pad[padding_config=((1, 1, 0), …)] b 0.0
                g:bf16[5,300,64] = concatenate[dimension=2] f c
                h:bf16[64,512,64] = conv_general_dilated[padding=((2, 2),)] a g
                d:bf16[64,512,32] = slice[start_indices=(0, 0, 0) …] h
                e:bf16[64,512,32] = slice[start_indices=(0, 0, 32) …] h
                in (d, e) }
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax.extend.core import Jaxpr, Var

from jevt._context import Context, Device
from jevt._jaxpr import Atom
from jevt.passes._gather import gathered
from jevt.passes._readers import Readers
from jevt.passes._replace import Replacements, replace
from jevt.passes._rules import Graph, on_same_mesh
from jevt.passes.merged_convolutions.match import Merged, alike
from jevt.passes.merged_convolutions.price import joined
from jevt.passes.merged_convolutions.write import Writer


def run(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """Merges the convolutions of ``jaxpr`` and of its bodies for the device of ``context``."""
    return replace(jaxpr, context, _replacements, _arranged)


def _arranged(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """The jaxpr with the convolutions that are merged in a row."""
    return gathered(jaxpr, [places for _, places in _found(jaxpr, context.device)])


def _replacements(jaxpr: Jaxpr, context: Context, outermost: bool) -> Replacements:
    del outermost
    result: dict[Var, Callable[[Graph], Atom]] = {}
    for merged, places in _found(jaxpr, context.device):
        independent = merged.results.isdisjoint(eqn.invars[1] for eqn in merged.eqns)
        if independent and max(places) - min(places) < len(places):
            write = Writer(merged).write
            result |= {eqn.outvars[0]: functools.partial(write, eqn) for eqn in merged.eqns}
    return result


def _found(jaxpr: Jaxpr, device: Device) -> list[tuple[Merged, list[int]]]:
    """Convolutions that are faster as one, and their positions."""
    classes = [e for e in alike(jaxpr) if on_same_mesh([a for eqn in e for a in eqn.invars])]
    if not classes:
        return []
    readers = Readers(jaxpr)
    positions = {id(eqn): place for place, eqn in enumerate(jaxpr.eqns)}
    found = [merged for eqns in classes for merged in joined(eqns, readers, device)]
    return [(merged, [positions[id(eqn)] for eqn in merged.eqns]) for merged in found]
