"""cuDNN's fused attention: what it can do, and the calls.

The conditions are those of JAX's own wrapper (``jax._src.cudnn.fused_attention_stablehlo``) and of
the cuDNN frontend's documentation for scaled dot-product attention.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from jevt import _jax_internals as internals

if TYPE_CHECKING:
    from jevt.primitives.attention import Layout, Shape

#: Oldest version whose backward pass takes a bias at all of the sizes below.
MINIMUM_VERSION = 90000


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention that cuDNN is asked about.

    Attributes:
      shape: its sizes.
      dtype: name of the operands' type.
      biased: whether a bias or a mask is added to the scores.
      trained: whether the backward pass is wanted.
    """

    shape: Shape
    dtype: str
    biased: bool
    trained: bool


def obstacle(case: Case, capability: int) -> str:
    """Why cuDNN has no kernel for this on a GPU of this compute capability (90 for 9.0), or ""."""
    shape = case.shape
    widest = 256 if capability >= 90 else 128
    version = internals.cudnn_version()
    if version is None:
        return "cuDNN is not installed"
    if version < MINIMUM_VERSION:
        return f"cuDNN {version} is older than {MINIMUM_VERSION}"
    if capability < 80:
        return f"cuDNN's fused attention needs compute capability 8.0, this is {capability / 10}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"cuDNN's fused attention takes bfloat16 and float16, this is {case.dtype}"
    if shape.width != shape.value_width:
        return f"heads of {shape.width} for queries and {shape.value_width} for values differ"
    if shape.width > widest or shape.width % 8:
        return f"heads of {shape.width}: not a multiple of 8 up to {widest}"
    if case.trained and case.biased and (shape.queries % 2 or shape.keys % 2):
        return f"{shape.queries} queries and {shape.keys} keys: odd with a bias or mask"
    return ""


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *bias: jax.Array,
    scale: float,
    causal: bool,
    layout: Layout,
) -> Any:
    """As ``attention.reference``, by a cuDNN call."""
    return internals.cudnn_attention(q, k, v, *bias, scale=scale, causal=causal, layout=layout)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *rest: jax.Array,
    scale: float,
    causal: bool,
    layout: Layout,
) -> Any:
    """As ``attention.backward_reference``, by a cuDNN call."""
    return internals.cudnn_attention_backward(
        q, k, v, *rest, scale=scale, causal=causal, layout=layout
    )
