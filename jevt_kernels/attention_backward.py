"""The backward pass of attention with few keys, by one kernel for GPUs of sm_90.

With S = scale·Q·Kᵀ, lse = logsumexp(S) along the keys, P = exp(S - lse) and O = P·V,

    dV = Pᵀ·dO,  delta = rowsum(dO∘O),  dS = P∘(dO·Vᵀ - delta),  dQ = scale·dS·K,  dK = scale·dSᵀ·Q

(Dao et al., FlashAttention, 2022, appendix B). One program has all keys of a (batch, head), 256 at
a time, and walks the queries: with no more keys than that, each operand is read once and dQ is
complete when it leaves the registers; with more, dQ is added up in a workspace. There are no atomic
additions, so results are the same bits from run to run. Scores, P, delta and all sums are float32;
P and dS are rounded to the operands' type before their products.

:mod:`jevt_kernels.attention_backward_gluon` is the kernel, and says how its warps share the work.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jevt_kernels import gluon_kernels
from jevt_kernels.gluon_kernels import GluonKernel, Operand, View
from jevt_kernels.spec import TensorType, UnsupportedKernel

type Layout = Literal["BTNH", "BNTH"]

#: Elements of a head, the only number that the kernel takes.
WIDTH = 64

#: Most queries, and most keys.
LONGEST = 512

#: Keys of a tile, and queries of a block.
KEYS = 256
QUERIES = 32

#: Programs: one for each multiprocessor of an H100, whose shared memory it fills.
PROGRAMS = 132

_DTYPES = ("bfloat16", "float16")
_FLOAT = np.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of an attention without bias and mask.

    Attributes:
      batch, heads: of all operands.
      queries, keys: T and S, 1 to :data:`LONGEST`.
    """

    batch: int
    heads: int
    queries: int
    keys: int

    @property
    def total(self) -> int:
        """Of (batch, head)."""
        return self.batch * self.heads

    @property
    def blocks(self) -> int:
        """Of queries."""
        return -(-self.queries // QUERIES)

    @property
    def tiles(self) -> int:
        """Of keys."""
        return -(-self.keys // KEYS)


def attention_backward(
    sizes: Sizes, dtype: np.dtype, *, scale: float, layout: Layout = "BTNH"
) -> GluonKernel:
    """The kernel of q, k, v, o, dO and lse that gives dQ, dK and dV.

    Args:
      sizes: of the operands.
      dtype: theirs, bfloat16 or float16.
      scale: factor of the scores.
      layout: q, o and dO are ``[B, T, N, 64]``, k and v ``[B, S, N, 64]`` in layout BTNH, the axes
        of positions and heads the other way round in layout BNTH.

    Returns:
      A kernel of operands as above and of lse ``float32[B · N · T']``, T' being T rounded up to
      blocks, infinite beyond T. Its last output is a workspace.

    Raises:
      UnsupportedKernel: sizes or types that it does not take.
    """
    if dtype.name not in _DTYPES:
        raise UnsupportedKernel(f"expected operands of {' or '.join(_DTYPES)}, got {dtype.name}")
    if not (0 < sizes.queries <= LONGEST and 0 < sizes.keys <= LONGEST and sizes.total > 0):
        raise UnsupportedKernel(f"expected 1 to {LONGEST} queries and keys, got {sizes}")
    programs = min(PROGRAMS, sizes.total)

    def operand(length: int, rows: int) -> Operand:
        if layout == "BTNH":
            shape: tuple[int, ...] = (sizes.batch, length, sizes.heads, WIDTH)
            seen = (sizes.batch, length, sizes.heads * WIDTH)
        else:
            shape = (sizes.batch, sizes.heads, length, WIDTH)
            seen = (sizes.total, length, WIDTH)
        view = View(seen, (seen[1] * seen[2], seen[2], 1), (1, rows, WIDTH))
        return Operand(TensorType(shape, dtype), view)

    q, k = operand(sizes.queries, QUERIES), operand(sizes.keys, KEYS)
    padded = sizes.total * sizes.blocks * QUERIES
    lse = Operand(TensorType((padded,), _FLOAT), View((padded,), (1,), (QUERIES,)))
    d_k = operand(sizes.keys, KEYS // 2)
    held = programs * sizes.blocks * QUERIES * WIDTH if sizes.tiles > 1 else 1
    return GluonKernel(
        name="attention_backward",
        module="jevt_kernels.attention_backward_gluon",
        inputs=(q, k, k, q, q, lse),
        outputs=(q, d_k, d_k, Operand(TensorType((held,), _FLOAT))),
        constants=(
            ("scale", float(scale)),
            ("heads", sizes.heads if layout == "BTNH" else 1),
            ("total", sizes.total),
            ("queries", sizes.queries),
            ("keys", sizes.keys),
            ("programs", programs),
            # On an H100: 217 µs against 237 with one tile of keys, 405 against 348 with two.
            ("ahead", int(sizes.tiles == 1)),
        ),
        programs=programs,
        num_warps=4,
        flops=2 * 5 * sizes.total * sizes.queries * sizes.keys * WIDTH,
    )


def call(
    kernel: GluonKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    compute_capability: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v. Traceable; the program must be lowered for CUDA.

    Args:
      kernel: made by :func:`attention_backward`.
      q: of the forward pass; so are k and v.
      k: see there.
      v: see there.
      out: what the forward pass gave.
      lse: ``float32[B, N, T]``, the natural logarithms of the sums of exponentials.
      d_out: the gradient of out.
      compute_capability: of the GPU, 90 for sm_90.

    Returns:
      Gradients like q, k and v.

    Raises:
      TypeError, UnsupportedKernel, ImportError: as ``gluon_kernels.call`` does.
    """
    if beyond := -lse.shape[-1] % QUERIES:
        # Rows of 0, which fill up a block, have no weights then.
        lse = jnp.pad(lse, ((0, 0), (0, 0), (0, beyond)), constant_values=math.inf)
    operands = (q, k, v, out, d_out, lse.reshape(-1))
    d_q, d_k, d_v, _ = gluon_kernels.call(kernel, *operands, compute_capability=compute_capability)
    return d_q, d_k, d_v
