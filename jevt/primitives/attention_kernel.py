"""Our kernel of attention's backward pass: where it is taken rather than cuDNN's, and the call.

On an H100 (JAX 0.11.2, Triton 3.6, cuDNN 9.19), in µs, alone and within the steps of ViT and BERT,
which run at the card's power limit:

=====  =====  =============  ===========  ===========
batch  heads  queries, keys  cuDNN        our kernel
=====  =====  =============  ===========  ===========
128    12     256            410, 427     217, 235
32     16     512            379, 386     348, 392
=====  =====  =============  ===========  ===========

With two tiles it is no faster within a step, but adds up in a fixed order and needs less memory.
(To add up the gradients for biases on the way took 81 and 32 µs more, about what a kernel takes
that reads them again.)

It computes tiles of 256 keys whole, so that with fewer keys it loses what it gains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jevt.primitives import cudnn_attention
from jevt.primitives._define import compile_ahead
from jevt.primitives.cudnn_attention import Case
from jevt_kernels import attention_backward as kernels
from jevt_kernels.attention_backward import KEYS, LONGEST, WIDTH, Sizes
from jevt_kernels.gluon_kernels import CAPABILITY

if TYPE_CHECKING:
    from jevt.primitives.attention import Layout, Shape

#: Fewest (batch, head): two for each multiprocessor of an H100.
FEWEST = 2 * kernels.PROGRAMS

#: The part of its tiles that keys have to fill, by how many tiles there are.
FILLED = {1: 0.6, 2: 0.95}


def obstacle(case: Case, capability: int, *, causal: bool) -> str:
    """Why the backward pass is cuDNN's on a GPU of this compute capability (90 for 9.0), or ""."""
    shape = case.shape
    if capability != CAPABILITY:
        return f"the kernel needs compute capability {CAPABILITY / 10}, this is {capability / 10}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, this is {case.dtype}"
    if case.biased or causal:
        return "the kernel takes no bias and no mask"
    if (shape.width, shape.value_width) != (WIDTH, WIDTH):
        return f"the kernel takes heads of {WIDTH}, not of {shape.width} and {shape.value_width}"
    if shape.key_heads != shape.heads:
        return f"{shape.key_heads} heads of keys for {shape.heads} of queries"
    if max(shape.queries, shape.keys) > LONGEST:
        return f"{shape.queries} queries and {shape.keys} keys: more than {LONGEST}"
    sizes = sizes_of(shape)
    if sizes.total < FEWEST:
        return f"{sizes.total} heads in all: fewer than {FEWEST}"
    if shape.keys < FILLED[sizes.tiles] * sizes.tiles * KEYS:
        return f"{shape.keys} keys fill too little of {sizes.tiles} tiles of {KEYS}"
    if shape.queries < FILLED[1] * KEYS:
        return f"{shape.queries} queries for each tile of keys"
    return ""


def sizes_of(shape: Shape) -> Sizes:
    """The kernel's sizes of an attention."""
    return Sizes(shape.batch, shape.heads, shape.queries, shape.keys)


def backward(
    *operands: jax.Array,
    shape: Shape,
    scale: float,
    causal: bool,
    layout: Layout,
    capability: int,
) -> Any:
    """As ``attention.backward_reference``, by our kernel or by a cuDNN call.

    Args:
      *operands: q, k, v, a bias perhaps, out, statistics and d_out.
      shape: their sizes.
      scale: factor of the scores.
      causal: query t sees keys up to t only.
      layout: order of the axes.
      capability: compute capability of the GPU; 0 leaves it to cuDNN.
    """
    dtype = np.dtype(operands[0].dtype)
    biased = len(operands) > 6
    case = Case(shape, dtype.name, biased=biased, trained=True)
    if not obstacle(case, capability, causal=causal):
        kernel = kernels.attention_backward(sizes_of(shape), dtype, scale=scale, layout=layout)
        what = "an attention's backward pass runs through cuDNN: its kernel"
        if compile_ahead([kernel], capability, what):
            return kernels.call(kernel, *operands, compute_capability=capability)
    return cudnn_attention.backward(*operands, scale=scale, causal=causal, layout=layout)
