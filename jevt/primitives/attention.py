"""``attention`` and ``attention_backward``: scaled dot-product attention as one equation each.

    attention:           q k v [bias]                      -> out statistics
    attention_backward:  q k v [bias] out statistics d_out -> d_q d_k d_v

With S = scale·Q·Kᵀ + bias, P = softmax(S) along the keys and statistics = logsumexp(S),

    out = P·V
    d_v = Pᵀ·d_out,  d_s = P∘(d_out·Vᵀ − rowsum(d_out∘out)),  d_q = scale·d_s·K,  d_k = scale·d_sᵀ·Q

(Dao et al., FlashAttention, 2022, appendix B.) A pass puts them in the place of the equations that
say the same. On CUDA they lower to cuDNN's fused attention, which the pass has asked whether it can
(:mod:`jevt.primitives.cudnn_attention`), the backward pass of few keys to a kernel of ours
(:mod:`jevt.primitives.attention_kernel`); elsewhere to the equations of this file. They come after
differentiation and batching, so they have no rules for either.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jevt import _jax_internals as internals
from jevt.primitives import attention_kernel, cudnn_attention
from jevt.primitives._define import composite

type Layout = Literal["BTNH", "BNTH"]

#: What a masked score gets added: more than scores differ by, and so little that the float32 next
#: to it is near: a kernel takes exponentials of differences of such sums, in a row without any key
#: too, and a distance of 128 or more overflows.
MASKED = {"bfloat16": float(-1 << 26), "float16": float(-2 << 14)}

#: The lowest bias. Lower ones hide a key no better, and a row of them would lose its scores.
LOWEST = float(-1 << 15)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of an attention.

    Attributes:
      batch, queries, keys: B, T and S.
      heads, key_heads: of q, and of k and v; query head n reads key head n // (heads / key_heads).
      width, value_width: head dimension of q and k, and of v.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int
    value_width: int

    @staticmethod
    def of(q: Any, k: Any, v: Any, layout: Layout) -> Shape:
        """The sizes of these operands.

        Raises:
          ValueError: they do not fit together.
        """
        (b, t, n, h), (kb, s, kn, kh), (vb, vs, vn, vh) = (
            _btnh(x.shape, layout) for x in (q, k, v)
        )
        if (kb, vb, kh, vs, vn) != (b, b, h, s, kn) or kn == 0 or n % kn:
            raise ValueError(
                f"attention: expected q [B, T, N, H], k [B, S, K, H] and v [B, S, K, D] with N a"
                f" multiple of K, got {q.shape}, {k.shape} and {v.shape} in layout {layout}"
            )
        return Shape(b, t, s, n, kn, h, vh)


def _btnh(shape: Any, layout: Layout) -> tuple[int, int, int, int]:
    b, x, y, h = shape
    return (b, x, y, h) if layout == "BTNH" else (b, y, x, h)


def _attention_type(
    q: Any, k: Any, v: Any, *bias: Any, scale: float, causal: bool, layout: Layout
) -> tuple[Any, Any]:
    del scale
    shape = Shape.of(q, k, v, layout)
    _check_operands((q, k, v), bias, shape, causal)
    out = internals.array_like(q, (*q.shape[:3], shape.value_width), q.dtype)
    rows = (shape.batch, shape.heads, shape.queries)
    return out, internals.array_like(q, rows, _wide(q.dtype))


def _attention_backward_type(
    q: Any,
    k: Any,
    v: Any,
    *rest: Any,
    scale: float,
    causal: bool,
    layout: Layout,
    capability: int = 0,
) -> tuple[Any, Any, Any]:
    del scale, capability
    *bias, out, statistics, d_out = rest
    shape = Shape.of(q, k, v, layout)
    _check_operands((q, k, v, out, d_out), bias, shape, causal)
    want = (*q.shape[:3], shape.value_width)
    if out.shape != want or d_out.shape != want:
        raise ValueError(f"attention_backward: expected out and d_out of shape {want}")
    if statistics.shape != (shape.batch, shape.heads, shape.queries):
        raise ValueError(f"attention_backward: unexpected statistics of shape {statistics.shape}")
    q_type, k_type, v_type = (internals.array_like(x, x.shape, x.dtype) for x in (q, k, v))
    return q_type, k_type, v_type


def _check_operands(arrays: Any, bias: Any, shape: Shape, causal: bool) -> None:
    if len({x.dtype for x in (*arrays, *bias)}) != 1:
        raise TypeError(f"attention: operands of one type expected, got {[*arrays, *bias]}")
    if len(bias) > 1:
        raise TypeError("attention: at most one bias")
    want = (shape.batch, shape.heads, shape.queries, shape.keys)
    for b in bias:
        if b.ndim != 4 or b.shape[2:] != want[2:] or not _broadcasts(b.shape, want):
            raise ValueError(f"attention: expected a bias that broadcasts to {want}, got {b.shape}")
    if causal and shape.queries != shape.keys:
        raise ValueError("attention: causal with as many queries as keys only")


def _broadcasts(shape: Any, to: tuple[int, ...]) -> bool:
    return all(have in (1, want) for have, want in zip(shape, to, strict=True))


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *bias: jax.Array,
    scale: float,
    causal: bool = False,
    layout: Layout = "BTNH",
) -> tuple[jax.Array, jax.Array]:
    """Attention in plain JAX; the softmax in float32 (float64 for float64 operands).

    Args:
      q: ``[B, T, N, H]``, or ``[B, N, T, H]`` in layout BNTH; so are the others.
      k: ``[B, S, K, H]``; N is a multiple of K.
      v: ``[B, S, K, D]``.
      *bias: nothing, or one of ``[1 or B, 1 or N, T, S]``, added to the scores.
      scale: factor of the scores.
      causal: query t sees keys up to t only; T is S.
      layout: order of the axes.

    Returns:
      out ``[B, T, N, D]`` in q's type, and the logsumexp of the scores ``[B, N, T]``, wide.
    """
    q, k, v = (_grouped(x, k, layout) for x in (q, k, v))
    scores = _scores(q, k, bias, scale, causal)
    statistics = jax.nn.logsumexp(scores, axis=-1)
    p = jax.nn.softmax(scores)
    out = jnp.einsum("bkgts,bskgd->btkgd", p.astype(v.dtype), v, **_sums(q))
    return _ungrouped(out.astype(q.dtype), layout), statistics.reshape(
        statistics.shape[0], -1, statistics.shape[-1]
    )


def backward_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *rest: jax.Array,
    scale: float,
    causal: bool = False,
    layout: Layout = "BTNH",
    capability: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of :func:`reference`'s q, k and v in plain JAX.

    Args:
      q: as there; so are the others.
      k: of the forward pass.
      v: of the forward pass.
      *rest: the bias if there is one, out, the statistics, and the gradient of out.
      scale: factor of the scores.
      causal: query t sees keys up to t only.
      layout: order of the axes.
      capability: not used.

    Returns:
      d_q, d_k and d_v, each like its operand.
    """
    del capability
    *bias, out, statistics, d_out = rest
    q, out, d_out, k, v = (_grouped(x, k, layout) for x in (q, out, d_out, k, v))
    wide = _wide(q.dtype)
    scores = _scores(q, k, bias, scale, causal)
    p = jnp.exp(scores - statistics.reshape(scores.shape[:-1])[..., None])
    d_v = jnp.einsum("bkgts,btkgd->bskd", p.astype(v.dtype), d_out, **_sums(q))
    d_p = jnp.einsum("btkgd,bskgd->bkgts", d_out, v, **_sums(q))
    rows = jnp.einsum("btkgd,btkgd->bkgt", d_out.astype(wide), out.astype(wide))
    d_s = (p * (d_p - rows[..., None])).astype(q.dtype)
    d_q = scale * jnp.einsum("bkgts,bskgh->btkgh", d_s, k, **_sums(q))
    d_k = scale * jnp.einsum("bkgts,btkgh->bskh", d_s, q, **_sums(q))
    d_k, d_v = d_k[..., None, :], d_v[..., None, :]
    d_q, d_k, d_v = (_ungrouped(x.astype(q.dtype), layout) for x in (d_q, d_k, d_v))
    return d_q, d_k, d_v


def _grouped(x: jax.Array, k: jax.Array, layout: Layout) -> jax.Array:
    """As ``[B, T, K, N/K, H]``."""
    if layout == "BNTH":
        x, k = jnp.swapaxes(x, 1, 2), jnp.swapaxes(k, 1, 2)
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1])


def _ungrouped(x: jax.Array, layout: Layout) -> jax.Array:
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return jnp.swapaxes(x, 1, 2) if layout == "BNTH" else x


def _scores(q: jax.Array, k: jax.Array, bias: Any, scale: float, causal: bool) -> jax.Array:
    """``[B, K, N/K, T, S]``, wide."""
    scores = jnp.einsum("btkgh,bskgh->bkgts", q, k, **_sums(q)) * scale
    for b in bias:
        heads = (1, 1) if b.shape[1] == 1 else scores.shape[1:3]
        scores = scores + b.reshape(b.shape[0], *heads, *b.shape[2:]).astype(scores.dtype)
    if causal:
        scores = jnp.where(jnp.tri(scores.shape[-2], dtype=bool), scores, -jnp.inf)
    return scores


def _sums(like: jax.Array) -> dict[str, Any]:
    return {"preferred_element_type": _wide(like.dtype)}


def _wide(dtype: Any) -> Any:
    return np.dtype(dtype if dtype == np.float64 else np.float32)


def _backward_on_cuda(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *rest: jax.Array,
    scale: float,
    causal: bool,
    layout: Layout,
    capability: int = 0,
) -> Any:
    """As :func:`backward_reference`; ``capability`` is the GPU's, 0 for cuDNN whatever it is."""
    shape = Shape.of(q, k, v, layout)
    operands = (q, k, v, *rest)
    return attention_kernel.backward(
        *operands, shape=shape, scale=scale, causal=causal, layout=layout, capability=capability
    )


attention_p = composite(
    "attention", _attention_type, reference, cudnn_attention.forward, several=True
)
attention_backward_p = composite(
    "attention_backward",
    _attention_backward_type,
    backward_reference,
    _backward_on_cuda,
    several=True,
)
