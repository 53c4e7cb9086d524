"""Whole steps on a GPU: kernels really run, and give what ``jax.jit`` gives."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jevt

pytestmark = pytest.mark.gpu


class Mixer(nn.Module):
    dtype: jnp.dtype = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = nn.Dense(96, dtype=self.dtype)(x)
        for _ in range(2):
            y = nn.LayerNorm(dtype=self.dtype)(x).swapaxes(1, 2)
            y = nn.Dense(24, dtype=self.dtype)(nn.gelu(nn.Dense(40, dtype=self.dtype)(y)))
            x = x + nn.Dropout(self.dropout, deterministic=deterministic)(y.swapaxes(1, 2))
            y = nn.LayerNorm(dtype=self.dtype)(x)
            x = x + nn.Dense(96, dtype=self.dtype)(nn.gelu(nn.Dense(200, dtype=self.dtype)(y)))
        return nn.Dense(11, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x).mean(1))


def data(batch=64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, 24, 33)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 11, batch), jnp.int32)


def gradient_step(model):
    def step(params, x, y, key):
        def loss_fn(params):
            logits = model.apply(params, x, deterministic=False, rngs={"dropout": key})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
            return losses.mean()

        return jax.value_and_grad(loss_fn)(params)

    return step


def relative_error(got, want):
    flat = [
        np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(t)])
        for t in (got, want)
    ]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


def kernels(step):
    return [g for g in jevt.last_trace(step).plan.groups if g.target == "triton"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_of_a_mixer(dtype, dropout):
    """As near to a float32 run as ``jax.jit``'s, since both round to bfloat16 on the way."""
    with jax.default_matmul_precision("highest"):
        model = Mixer(dtype, dropout)
        x, y = data()
        params = model.init(jax.random.key(0), x)
        args = params, x, y, jax.random.key(1)
        step = jevt.jit(gradient_step(model), backend="triton")
        loss, grads = step(*args)
        jax_loss, jax_grads = jax.jit(gradient_step(model))(*args)
        exact_loss, exact = jax.jit(gradient_step(Mixer(jnp.float32, dropout)))(*args)
    assert {"pointwise", "rowwise", "columnwise"} <= {g.kind for g in kernels(step)}
    if dtype == jnp.float32:
        assert abs(float(loss - jax_loss)) < 1e-5 * abs(float(jax_loss))
        assert relative_error(grads, jax_grads) < 1e-4
    else:
        assert abs(float(loss - exact_loss)) < 1e-2 * abs(float(exact_loss))
        assert relative_error(grads, exact) < 1.1 * relative_error(jax_grads, exact) + 1e-3


def test_training_with_donated_buffers_follows_jax():
    model = Mixer()
    x, y = data()
    optimizer = optax.sgd(0.1, momentum=0.9)

    def train(params, state, x, y):
        loss, grads = gradient_step(model)(params, x, y, jax.random.key(1))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for jit in (lambda f: jevt.jit(f, backend="triton", donate_argnums=(0, 1)), jax.jit):
        step = jit(train)
        params = model.init(jax.random.key(0), x)
        state = optimizer.init(params)
        curve = []
        for _ in range(20):
            params, state, loss = step(params, state, x, y)
            curve.append(float(loss))
        losses.append(curve)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_same_bits_from_run_to_run():
    model = Mixer(jnp.bfloat16, 0.1)
    x, y = data()
    params = model.init(jax.random.key(0), x)
    step = jevt.jit(gradient_step(model), backend="triton")
    first = jax.tree.map(np.asarray, step(params, x, y, jax.random.key(1)))
    assert kernels(step)
    for _ in range(20):
        again = jax.tree.map(np.asarray, step(params, x, y, jax.random.key(1)))
        jax.tree.map(np.testing.assert_array_equal, first, again)


def test_dropout_masks_are_those_of_jax():
    def dropout(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0.0)

    x = jnp.ones((1003, 517))
    step = jevt.jit(dropout, backend="triton")
    got = step(x, jax.random.key(3))
    assert [g.kind for g in kernels(step)] == ["pointwise"]
    np.testing.assert_array_equal(got, jax.jit(dropout)(x, jax.random.key(3)))


def test_short_table_gradient():
    def gradient(table, index, cotangent):
        return jax.vjp(lambda t: t[index], table)[1](cotangent)[0]

    rng = np.random.default_rng(0)
    index = jnp.asarray(rng.integers(0, 3, 4096), jnp.int32)
    cotangent = jnp.asarray(rng.standard_normal((4096, 256)), jnp.bfloat16)
    table = jnp.zeros((3, 256), jnp.bfloat16)
    got = jevt.jit(gradient)(table, index, cotangent)
    want = gradient(table.astype(jnp.float32), index, cotangent.astype(jnp.float32))
    assert relative_error(got, want) < 4e-3


def test_check_mode_finds_nothing_wrong(monkeypatch):
    monkeypatch.setenv("JEVT_CHECK", "1")
    model = Mixer(jnp.float32, 0.1)
    x, y = data()
    params = model.init(jax.random.key(0), x)
    step = jevt.jit(gradient_step(model), backend="triton")
    jax.block_until_ready(step(params, x, y, jax.random.key(1)))
    jax.effects_barrier()
    assert kernels(step)


def test_scan_over_layers_runs_kernels_in_the_body():
    def layers(x, scales):
        def body(carry, scale):
            mean = carry.mean(-1, keepdims=True)
            variance = jnp.square(carry - mean).mean(-1, keepdims=True)
            return carry + (carry - mean) * jax.lax.rsqrt(variance + 1e-6) * scale, ()

        return jax.lax.scan(body, x, scales)[0]

    x = jax.random.normal(jax.random.key(0), (300, 700))
    scales = jnp.linspace(0.5, 1.5, 4 * 700).reshape(4, 700)
    step = jevt.jit(layers, backend="triton")
    assert relative_error(step(x, scales), jax.jit(layers)(x, scales)) < 1e-5
    (body,) = [plan for _, plan in jevt.last_trace(step).plan.nested]
    assert [g.kind for g in body.groups if g.target == "triton"] == ["rowwise"]


def test_shard_map_runs_kernels_per_device():
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=axis_types)
    spec = jax.sharding.PartitionSpec("data")
    function = jax.shard_map(jax.nn.softmax, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.random.normal(jax.random.key(0), (64 * len(jax.devices()), 700))
    step = jevt.jit(function, backend="triton")
    assert relative_error(step(x), jax.jit(function)(x)) < 1e-5


def test_lazy_loss():
    model = Mixer()
    x, y = data()
    params = model.init(jax.random.key(0), x)
    plain = gradient_step(model)

    def marked(*args):
        loss, gradients = plain(*args)
        return jax.tree.map(lambda p, g: p - 0.1 * g, args[0], gradients), jevt.lazy(loss)

    args = x, y, jax.random.key(1)
    with jax.default_matmul_precision("highest"):
        want, _ = jax.jit(plain)(params, *args)
        step = jevt.jit(marked, backend="triton", donate_argnums=0)
        kept = jevt.jit(marked, backend="triton")
        _, loss = kept(params, *args)
        assert isinstance(loss, jevt.LazyArray) and kernels(kept)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        new, loss = step(jax.tree.map(jnp.copy, params), *args)
        with pytest.raises(jevt.DonatedInputError):
            float(loss)
        _, loss = step.compute_lazy(jax.tree.map(jnp.copy, params), *args)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        assert float(step.compute_lazy(new, *args)[1]) < float(want)


def test_numpy_inputs_of_lazy_outputs_may_be_overwritten():
    step = jevt.jit(lambda x: (x * 2, jevt.lazy(x.sum())), backend="triton")
    for size in (64, 5_000_000):
        x = np.ones(size, np.float32)
        _, total = step(x)
        x[:] = 5
        assert total == size
