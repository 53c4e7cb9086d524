"""Programs that every graph pass is run on: name -> (function, arguments).

Small, and together they use the constructs that a train step may contain.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

F32 = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)


@jax.custom_jvp
def _softplus(x):
    return jnp.logaddexp(x, 0.0)


@_softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return _softplus(x), jax.nn.sigmoid(x) * t


@jax.custom_vjp
def _clip_gradient(x):
    return x * 1.0


_clip_gradient.defvjp(
    lambda x: (_clip_gradient(x), x), lambda x, g: (jnp.clip(g, -0.5, 0.5) + 0 * x,)
)


def _mlp_loss(params, x, y):
    for w, b in params[:-1]:
        x = jax.nn.gelu(x @ w + b)
    w, b = params[-1]
    logits = x @ w + b
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, logits.shape[-1]), -1))


def _params():
    rng = np.random.default_rng(0)
    sizes = [4, 8, 5]
    return [
        (rng.normal(size=(a, b)).astype(np.float32), np.zeros(b, np.float32))
        for a, b in itertools.pairwise(sizes)
    ]


def _sgd_step(params, x, y):
    loss, grads = jax.value_and_grad(_mlp_loss)(params, x, y)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def _layer_norm(x, scale, bias):
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-6) * scale + bias


def _dropout(x, key):
    keep = jax.random.bernoulli(key, 0.75, (64, 32))
    return jnp.where(keep, jnp.broadcast_to(x[:1, :1], (64, 32)) / 0.75, 0)


def _scan(x):
    def body(carry, row):
        carry = jnp.sin(carry) + jax.nn.relu(row) + jnp.sin(carry)
        return carry, (carry * 2.0, jnp.cos(carry))

    carry, (doubled, _) = lax.scan(body, jnp.zeros(4), x)
    return carry, doubled


def _while(x):
    return lax.while_loop(
        lambda s: jnp.all(jax.nn.relu(s[1]) < 10.0),
        lambda s: (s[0] + 1, jax.nn.relu(s[1]) * 1.5 + 1.0),
        (0, x),
    )


def _cond(x):
    return lax.cond(
        x[0, 0] > 0, lambda v: jax.nn.relu(v) + 1.0, lambda v: jnp.exp(v) + jnp.exp(v), x
    )


def _switch(x):
    return lax.switch(jnp.int32(1), [jnp.sin, jax.nn.softplus, lambda v: v], x)


def _remat(x):
    @jax.checkpoint
    def layer(v):
        return jnp.sin(jnp.sin(v) @ jnp.ones((4, 4)))

    return jax.grad(lambda v: layer(layer(v)).sum())(x)


def _constants(x):
    table = jnp.arange(16, dtype=jnp.float32).reshape(4, 4)
    return x @ table[1:2].T + jnp.sqrt(2.0) * jnp.full((3, 1), 2.5) + jnp.arange(3)[:, None]


def _captured(x):
    table = jnp.asarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    inner = jax.jit(lambda v: v * table)
    return inner(x) + inner(x + 1)


def _integers(x):
    i = jnp.arange(12, dtype=jnp.int32).reshape(3, 4) * 3
    return (i // 5, i % 7, (i << 2) ^ 5, i > 6, jnp.argmax(x, -1), x.astype(jnp.int8))


PROGRAMS = {
    "mlp_step": (_sgd_step, (_params(), F32, np.array([0, 3, 4]))),
    "layer_norm": (_layer_norm, (F32, np.ones(4, np.float32), np.zeros(4, np.float32))),
    "layer_norm_grad": (
        jax.grad(lambda *a: _layer_norm(*a).sum() ** 2, (0, 1, 2)),
        (F32, np.ones(4, np.float32), np.zeros(4, np.float32)),
    ),
    "softmax_bf16": (lambda x: jax.nn.softmax(x.astype(jnp.bfloat16)), (F32,)),
    "custom_jvp": (jax.value_and_grad(lambda x: _softplus(x).sum()), (F32,)),
    "custom_vjp": (jax.value_and_grad(lambda x: (_clip_gradient(x) ** 3).sum()), (F32,)),
    "custom_vjp_forward": (_clip_gradient, (F32,)),
    "dropout": (_dropout, (F32, jax.random.key(7))),
    "old_style_key": (_dropout, (F32, jax.random.PRNGKey(7))),
    "scan": (_scan, (F32,)),
    "scan_grad": (jax.grad(lambda x: _scan(x)[1].sum()), (F32,)),
    "while": (_while, (F32,)),
    "cond": (_cond, (F32,)),
    "switch": (_switch, (F32,)),
    "remat": (_remat, (F32,)),
    "constants": (_constants, (F32,)),
    "captured": (_captured, (F32,)),
    "integers": (_integers, (F32,)),
    "vmap_of_jit": (jax.vmap(jax.jit(lambda r: jax.nn.softmax(r) * 2.0)), (F32,)),
    "complex": (lambda x: jnp.abs(jnp.fft.fft(x + 1j * x)), (F32,)),
    "empty": (lambda x: jnp.zeros((0, 3)) + x[:0, :3], (F32,)),
    "no_outputs": (lambda x: (), (F32,)),
    "identity": (lambda x: (x, 1.0, x), (F32,)),
}


def close(got, want):
    """Equal trees of arrays, up to what XLA's freedom to fuse changes."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (v if hasattr(v, "shape") else jnp.asarray(v) for v in (a, b))
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype.kind in "fcV":
            tolerance = 1e-2 if a.dtype.itemsize == 2 else 2e-6
            a, b = (v.astype(np.complex128 if v.dtype.kind == "c" else np.float64) for v in (a, b))
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(a, b)
