"""Attention in many spellings: forward passes, masks, and what the tests of raising share."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Jaxpr, check_jaxpr

from jevt._context import Context
from jevt.partition.cost import DEVICES
from jevt.passes import cse, dce, raise_attention, sink_constants
from jevt.pipeline import GRAPH_PASSES

CUDA = Context("cuda", "auto", False, (), DEVICES["H200"])


def raised(
    fun: Callable, *args, obstacle=lambda case, context: "", context=CUDA
) -> tuple[Jaxpr, list[str]]:
    """The canonical jaxpr of ``fun`` after the pass, and what the pass notes."""
    jaxpr = jax.make_jaxpr(fun)(*args)
    for _, graph_pass in GRAPH_PASSES:
        jaxpr = graph_pass(jaxpr)
    jaxpr = sink_constants.run(jaxpr)
    notes: list[str] = []
    result = raise_attention.run(jaxpr, context, notes.append, obstacle)
    result = dce.run(cse.run(result))
    check_jaxpr(result)
    assert result.out_avals == jaxpr.out_avals
    again = raise_attention.run(result, context, obstacle=obstacle)
    assert again is result, "not idempotent"
    return result, notes


def names(jaxpr: Jaxpr) -> list[str]:
    """Primitives, bodies included."""
    result = []
    for eqn in jaxpr.eqns:
        result.append(eqn.primitive.name)
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple) else (value,):
                result += names(item) if isinstance(item, Jaxpr) else []
    return result


def training(attend: Callable) -> Callable:
    """``(*operands, d_out) -> (out, *gradients)``."""

    def step(*args):
        *operands, d_out = args
        out, vjp = jax.vjp(attend, *operands)
        return out, *vjp(d_out)

    return step


def arrays(*shapes, dtype=jnp.float32):
    """Normal numbers."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def operands(layout="BTNH", *, heads=4, key_heads=4, queries=6, keys=10, dtype=jnp.float32):
    """q, k, v and d_out in a layout, of batch 3 and width 8."""
    q, k = (3, queries, heads, 8), (3, keys, key_heads, 8)
    if layout == "BNTH":
        q, k = ((b, n, t, h) for b, t, n, h in (q, k))
    return arrays(q, k, k, q, dtype=dtype)


# Softmaxes over the last axis.


def unshifted(x):
    e = jnp.exp(x)
    return e / e.sum(-1, keepdims=True)


def differentiated_maximum(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reciprocal(x):
    e = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
    return e * (1.0 / e.sum(-1, keepdims=True))


def from_logarithm(x):
    return jnp.exp(jax.nn.log_softmax(x))


def from_logsumexp(x):
    return jnp.exp(x - jax.nn.logsumexp(x, axis=-1, keepdims=True))


def in_float32(x):
    return jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype)


SOFTMAXES = {
    "jax": jax.nn.softmax,
    "unshifted": unshifted,
    "differentiated maximum": differentiated_maximum,
    "reciprocal": reciprocal,
    "log_softmax": from_logarithm,
    "logsumexp": from_logsumexp,
    "in float32": in_float32,
}

# What is done to the scores, given a function of q and k that makes them.
SCALES = {
    "times after": lambda scores, q, k: scores(q, k) * 0.3,
    "divided after": lambda scores, q, k: scores(q, k) / 3.0,
    "root after": lambda scores, q, k: scores(q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype),
    "q before": lambda scores, q, k: scores(q * 0.3, k),
    "both before": lambda scores, q, k: scores(q * 0.5, k / 2.0),
    "none": lambda scores, q, k: scores(q, k),
    "negative": lambda scores, q, k: -0.2 * scores(q, k),
}

# Layouts: products, scores first.
LAYOUTS = {
    "BTNH": ("btnh,bsnh->bnts", "bnts,bsnh->btnh"),
    "BNTH": ("bnth,bnsh->bnts", "bnts,bnsh->bnth"),
}


def einsum(layout="BTNH", softmax=jax.nn.softmax, scale=SCALES["times after"], mask=None):
    """Attention of q, k and v; ``mask`` changes the scores."""
    scores_of, mixed = LAYOUTS[layout]

    def attend(q, k, v):
        scores = scale(lambda q, k: jnp.einsum(scores_of, q, k), q, k)
        return jnp.einsum(mixed, softmax(mask(scores) if mask else scores), v)

    return attend


def linen(dtype=jnp.float32, **options):
    """Flax linen's module on x: step and arguments."""
    module = nn.MultiHeadDotProductAttention(4, dtype=dtype, param_dtype=dtype, **options)
    (x, d_out) = arrays((3, 6, 16), (3, 6, 16), dtype=dtype)
    params = module.init(jax.random.key(0), x)

    def attend(params, x):
        return module.apply(params, x, mask=nn.make_causal_mask(x[..., 0]))

    return training(attend), (params, x, d_out)


def nnx_module(dtype=jnp.float32, **options):
    """The same of Flax nnx."""
    module = nnx.MultiHeadAttention(
        4, 16, dtype=dtype, param_dtype=dtype, decode=False, rngs=nnx.Rngs(0), **options
    )
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    (x, d_out) = arrays((3, 6, 16), (3, 6, 16), dtype=dtype)

    def attend(params, x):
        mask = nnx.make_causal_mask(x[..., 0])
        return nnx.merge(graph, params, rest)(x, mask=mask)

    return training(attend), (params, x, d_out)
