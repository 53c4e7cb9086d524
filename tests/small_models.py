"""Small models with a whole training step each: name -> (step, arguments).

Together they use the layers, losses and control flow that graph passes rewrite.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

KEY = jax.random.key(0)
LABELS = np.array([1, 0, 3, 2], np.int32)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _step(loss: Callable, optimizer) -> Callable:
    def step(params, state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def initialised(model: nn.Module, *args):
    """Variables of a module without running its initialisers, most of whose time is compilation."""
    rng = np.random.default_rng(0)

    def filled(path, leaf):
        noise = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.shape[0] if leaf.shape else 1, 10))
        is_scale = path[-1].key in ("scale", "var")
        value = is_scale + (0.1 if leaf.ndim < 2 else 1.0) * noise
        return np.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(model.init, *args)
    return jax.tree_util.tree_map_with_path(filled, shapes)


def training(loss: Callable, params, *batch, optimizer=None):
    optimizer = optimizer or optax.adamw(1e-3)
    return _step(loss, optimizer), (params, optimizer.init(params), *batch)


def lstm():
    cell = nn.OptimizedLSTMCell(8)
    x = images(4, 6, 5)
    head = jax.random.normal(KEY, (8, 4)) * 0.3
    carry = cell.initialize_carry(KEY, (4, 5))
    params = {"cell": initialised(cell, KEY, carry, x[:, 0]), "head": head}

    def loss(params, x, labels):
        def body(carry, inputs):
            return cell.apply(params["cell"], carry, inputs)

        _, outputs = lax.scan(body, carry, jnp.swapaxes(x, 0, 1))
        return cross_entropy(outputs[-1] @ params["head"], labels)

    return training(loss, params, x, LABELS)


def _rotated(x):
    """Rotary position embedding: pairs of features turn with the position, each at its own rate."""
    half = x.shape[-1] // 2
    rates = 100.0 ** (-jnp.arange(half) / half)
    angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class _Block(nn.Module):
    dtype: str = "float32"
    rotary: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        size = x.shape[-2]
        h = nn.LayerNorm(dtype=self.dtype)(x)
        q, k, v = jnp.split(
            nn.Dense(3 * 16, dtype=self.dtype)(h).reshape(*h.shape[:2], 4, 12), 3, -1
        )
        if self.rotary:
            q, k = _rotated(q), _rotated(k)
        drop = nn.Dropout(self.dropout, deterministic=not self.dropout)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
        causal = jnp.tril(jnp.ones((size, size), bool))
        scores = jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)
        probabilities = drop(jax.nn.softmax(scores).astype(v.dtype))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", probabilities, v)
        x = x + drop(nn.Dense(16, dtype=self.dtype)(mixed.reshape(*x.shape[:2], 16)))
        h = nn.RMSNorm(dtype=self.dtype)(x)
        h = drop(nn.gelu(nn.Dense(32, dtype=self.dtype)(h)))
        return x + drop(nn.Dense(16, dtype=self.dtype)(h))


class _Gpt(nn.Module):
    dtype: str = "float32"
    remat: bool = False
    rotary: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 16, dtype=self.dtype)
        x = embed(tokens)
        if not self.rotary:
            x = x + nn.Embed(6, 16, dtype=self.dtype)(jnp.arange(6))
        x = nn.Dropout(self.dropout, deterministic=not self.dropout)(x)
        block = nn.remat(_Block) if self.remat else _Block
        for _ in range(2):
            x = block(self.dtype, self.rotary, self.dropout)(x)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x)).astype(jnp.float32)


def gpt(**options):
    model = _Gpt(**options)
    tokens = np.random.default_rng(1).integers(0, 11, (4, 7)).astype(np.int32)
    params = initialised(model, {"params": KEY, "dropout": KEY}, tokens[:, :-1])

    def loss(params, tokens, key=KEY):
        logits = model.apply(params, tokens[:, :-1], rngs={"dropout": key})
        return cross_entropy(logits, tokens[:, 1:])

    # Not Adam: the gradient of a key's bias is 0 but for rounding, which Adam would make 1.
    batch = (tokens, KEY) if model.dropout else (tokens,)
    return training(loss, params, *batch, optimizer=optax.sgd(0.1, momentum=0.9))


def mlp_mixer():
    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                h = jnp.swapaxes(nn.LayerNorm(use_fast_variance=False)(x), 1, 2)
                h = nn.Dense(6)(nn.gelu(nn.Dense(12)(h), approximate=False))
                x = x + jnp.swapaxes(h, 1, 2)
                x = x + nn.Dense(8)(nn.silu(nn.Dense(16)(nn.LayerNorm()(x))))
            return nn.Dense(4)(x.mean(1))

    model, x = Mixer(), images(4, 6, 8)
    params = initialised(model, KEY, x)

    def loss(params, x, labels):
        soft = optax.smooth_labels(jax.nn.one_hot(labels, 4), 0.1)
        return optax.softmax_cross_entropy(model.apply(params, x), soft).mean()

    return training(loss, params, x, LABELS)


def conv_net():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (4, 8):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.GroupNorm(num_groups=2)(x)
            return nn.Dense(4)(x.mean((1, 2)))

    model, x = Net(), images(4, 8, 8, 3)
    variables = initialised(model, KEY, x)

    def step(variables, momentum, x, labels):
        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            log_p = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(log_p, labels[:, None], -1).mean(), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, variables["params"], momentum)
        return {**updated, "params": params}, momentum, value

    return step, (variables, jax.tree.map(jnp.zeros_like, variables["params"]), x, LABELS)


def unet():
    """Down- and upsampling with a skip connection at each size; a loss on every pixel."""

    class Stage(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            return nn.silu(nn.GroupNorm(num_groups=2)(nn.Conv(self.features, (3, 3))(x)))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            skips = []
            for features in (4, 8):
                x = Stage(features)(x)
                skips.append(x)
                x = nn.avg_pool(x, (2, 2), (2, 2))
            x = Stage(8)(x)
            for features, skip in zip((8, 4), reversed(skips), strict=True):
                if features == 8:
                    x = nn.ConvTranspose(features, (2, 2), (2, 2))(x)
                else:
                    x = jax.image.resize(x, skip.shape[:3] + x.shape[3:], "nearest")
                x = Stage(features)(jnp.concatenate([x, skip], -1))
            return nn.Conv(3, (1, 1))(x)

    model, x = Net(), images(2, 8, 8, 3)
    params = initialised(model, KEY, x)

    def loss(params, x, labels):
        return cross_entropy(model.apply(params, x), labels)

    labels = np.random.default_rng(1).integers(0, 3, (2, 8, 8)).astype(np.int32)
    # Not Adam: a bias before a GroupNorm has next to no gradient.
    return training(loss, params, x, labels, optimizer=optax.sgd(0.1))


def vae():
    class Vae(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            mean, log_var = jnp.split(nn.Dense(6)(nn.tanh(nn.Dense(16)(x))), 2, -1)
            z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape)
            return nn.Dense(10)(nn.softplus(nn.Dense(16)(z))), mean, log_var

    model, x = Vae(), images(4, 10)
    params = initialised(model, KEY, x, KEY)

    def loss(params, x, key):
        logits, mean, log_var = model.apply(params, x, key)
        likelihood = optax.sigmoid_binary_cross_entropy(logits, jax.nn.sigmoid(x)).sum(-1)
        divergence = -0.5 * (1 + log_var - mean**2 - jnp.exp(log_var)).sum(-1)
        return (likelihood + divergence).mean()

    return training(loss, params, x, KEY)


def mixed_precision(dtype: str = "bfloat16"):
    """bfloat16 blocks with float32 weights, and a scaled loss whose bad steps are skipped."""
    model = _Gpt(dtype=dtype)
    tokens = np.random.default_rng(1).integers(0, 11, (4, 7)).astype(np.int32)
    params = initialised(model, KEY, tokens[:, :-1])

    def step(params, scale, tokens):
        def loss(params):
            return scale * cross_entropy(model.apply(params, tokens[:, :-1]), tokens[:, 1:])

        value, grads = jax.value_and_grad(loss)(params)
        grads = jax.tree.map(lambda g: g / scale, grads)
        good = jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
        new = jax.tree.map(lambda p, g: jnp.where(good, p - 0.1 * g, p), params, grads)
        return new, jnp.where(good, scale * 2, scale / 2), value / scale

    return step, (params, jnp.float32(256.0), tokens)


def dropout():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.Dropout(0.3, deterministic=False)(nn.relu(nn.Dense(64)(x)))
            return nn.Dense(1)(x)[..., 0]

    model, x = Net(), images(32, 10)
    params = initialised(model, {"params": KEY, "dropout": KEY}, x)

    def loss(params, x, y, key):
        predicted = model.apply(params, x, rngs={"dropout": key})
        return optax.huber_loss(predicted, y).mean() + optax.squared_error(predicted, y).mean()

    return training(loss, params, x, x[:, 0], KEY, optimizer=optax.lion(1e-3))


def two_towers():
    """A contrastive loss: each row of similarities is a cross entropy, and so is each column."""

    def loss(params, x, y):
        a, b = (
            v @ w / jnp.linalg.norm(v @ w, axis=-1, keepdims=True)
            for v, w in zip((x, y), params, strict=True)
        )
        logits = a @ b.T * 5.0
        labels = jnp.arange(logits.shape[0])
        return cross_entropy(logits, labels) + cross_entropy(logits.T, labels)

    params = (images(5, 8), images(7, 8))
    return training(loss, params, images(4, 5), images(4, 7))


def contrastive():
    """Two towers with a learned temperature; the matches are on the diagonal."""

    def loss(params, x, y):
        a, b = (jnp.tanh(v @ w) for v, w in zip((x, y), params["towers"], strict=True))
        a, b = (v * lax.rsqrt(jnp.square(v).sum(-1, keepdims=True) + 1e-6) for v in (a, b))
        logits = a @ b.T * jnp.exp(params["temperature"])
        rows, columns = (jnp.diag(jax.nn.log_softmax(logits, axis)) for axis in (1, 0))
        return -(rows + columns).mean() / 2

    params = {"towers": (images(5, 8), images(7, 8)), "temperature": jnp.float32(1.0)}
    return training(loss, params, images(4, 5), images(4, 7))


def mixture_of_experts():
    def loss(params, x, labels):
        gate = jax.nn.softmax(x @ params["gate"])
        weights, chosen = lax.top_k(gate, 2)
        weights = weights / weights.sum(-1, keepdims=True)
        mix = (jax.nn.one_hot(chosen, 3) * weights[..., None]).sum(1)
        outputs = jnp.einsum("bd,edh->beh", x, params["experts"])
        logits = jnp.einsum("be,beh->bh", mix, jax.nn.gelu(outputs))
        z = jax.nn.logsumexp(logits, -1)
        balance = (gate.mean(0) * mix.mean(0)).sum()
        return cross_entropy(logits, labels) + 1e-2 * (z**2).mean() + balance

    params = {"gate": images(6, 3), "experts": images(3, 6, 4)}
    return training(loss, params, images(4, 6), LABELS)


MODELS = {
    "lstm": lstm,
    "gpt": gpt,
    "gpt_rotary": lambda: gpt(rotary=True),
    "gpt_dropout_everywhere": lambda: gpt(dropout=0.2),
    "gpt_checkpointed": lambda: gpt(remat=True),
    "mlp_mixer": mlp_mixer,
    "conv_net": conv_net,
    "unet": unet,
    "vae": vae,
    "mixed_precision": mixed_precision,
    "dropout": dropout,
    "two_towers": two_towers,
    "contrastive": contrastive,
    "mixture_of_experts": mixture_of_experts,
}
