"""Steps of optax's optimizers on a Flax model: a few launches for all updates, in place, right."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jevt
from jevt.lowering import emit

OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
}

#: Those with norms of whole tensors.
NORMED = {
    "lamb": optax.lamb(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
}

#: Those that scale all gradients by the norm of all.
CLIPPED = {
    "alone": optax.clip_by_global_norm(0.1),
    "sgd": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)),
    "adamw": NORMED["clipped"],
}

#: Tensors that the one launch updates. The model has six; a product or a sum that makes the
#: gradient of one may update it in its own kernel.
UPDATED = 4


class Model(nn.Module):
    dtype: np.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, dtype=self.dtype, param_dtype=self.dtype)(x)
        x = jnp.tanh(nn.LayerNorm(dtype=self.dtype, param_dtype=self.dtype)(x))
        return nn.Dense(16, dtype=self.dtype, param_dtype=self.dtype)(x)


def training(optimizer, dtype=np.float32):
    model = Model(dtype)
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(dtype)
    params = model.init(jax.random.key(0), x)

    def loss(params):
        return (model.apply(params, x).astype(jnp.float32) ** 2).mean()

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, optimizer.init(params))


def updates(trace):
    """The launches that update several tensors at a time."""
    kernels = [e for e in trace.stages[-1].jaxpr.eqns if e.primitive is emit.kernel_p]
    specs = [e.params["spec"] for e in kernels]
    return [spec for spec in specs if spec.mainloop == "multi_tensor"]


def lowered(step, arguments, **options):
    jitted = jevt.jit(step, **options)
    text = jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text, jevt.last_trace(jitted)


def given(optimizer, dtype=np.float32, shapes=((48, 32), (64, 16), (80,))):
    """A step with given gradients."""
    generator = np.random.default_rng(0)
    params, grads = ([generator.normal(size=s).astype(dtype) for s in shapes] for _ in range(2))

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, optimizer.init(params), grads)


def close(got, want, tolerance):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == theirs.dtype
        x, y = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_launch_in_place(name):
    step, arguments = training(OPTIMIZERS[name])
    text, trace = lowered(step, arguments, donate_argnums=(0, 1))
    (spec,) = updates(trace)
    assert len(spec.members) == UPDATED
    assert len(spec.aliases) == len(spec.outputs)
    groups = [g for g in trace.plan.groups if g.target == "triton"]
    assert text.count("@triton_kernel_call_ffi(") == len(groups)
    assert not trace.warnings
    # Nothing of that kind is left: beside it only scalars are.
    left = [g for g in trace.plan.groups if g.kind == "pointwise" and g.target == "xla"]
    assert all(g.reason == "cost model: scalars only" for g in left)


@pytest.mark.cuda_lowering
def test_each_result_takes_the_buffer_that_it_is_returned_in():
    """Another one of the same type would have to be copied afterwards."""
    step, arguments = training(OPTIMIZERS["adamw"])
    _, trace = lowered(step, arguments, donate_argnums=(0, 1))
    (group,) = [g for g in trace.plan.groups if g.kind == "multi_tensor"]
    program = trace.stages[-1].jaxpr
    leaves = len(program.outvars)
    returned = dict(zip(program.outvars, program.invars[-leaves:], strict=True))
    pairs = [(group.jaxpr.invars[i], group.jaxpr.outvars[o]) for i, o in group.spec.aliases]
    assert len(pairs) == 3 * UPDATED
    assert all(returned[output] is source for source, output in pairs)


@pytest.mark.cuda_lowering
def test_without_donation_nothing_is_in_place():
    step, arguments = training(OPTIMIZERS["adamw"])
    _, trace = lowered(step, arguments)
    (spec,) = updates(trace)
    assert spec.aliases == ()
    assert len(spec.outputs) == 3 * UPDATED


@pytest.mark.cuda_lowering
def test_clipping_is_part_of_the_update():
    """Of all tensors but one, which the kernel that finishes the norm updates."""
    step, arguments = given(NORMED["clipped"])
    _, trace = lowered(step, arguments, donate_argnums=(0, 1))
    sums, rest = updates(trace)
    assert (len(sums.members), len(sums.outputs), len(sums.aliases)) == (2, 2, 0)
    assert (len(rest.members), len(rest.outputs), len(rest.aliases)) == (2, 6, 6)


#: Tensors of one program and of several.
MANY = ((300, 128), (128,), (256, 80), (80,), (64, 3), (48, 16, 16), (16,), (2048,), (96,))


@pytest.mark.cuda_lowering
@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_by_the_norm_of_many(name):
    """Two launches for the norm of however many tensors, and one that updates them in place."""
    step, arguments = given(CLIPPED[name], shapes=MANY)
    text, trace = lowered(step, arguments, donate_argnums=(0, 1))
    sums, rest = updates(trace)
    states = {"alone": 0, "sgd": 1, "adamw": 2}[name]
    assert (len(sums.members), len(sums.outputs), len(sums.aliases)) == (9, 9, 0)
    assert len(rest.outputs) == len(rest.aliases) == 9 * (1 + states)
    assert text.count("@triton_kernel_call_ffi(") == 3
    assert not trace.warnings


def reporting(dtype=np.float32, shapes=MANY):
    """A step that reports the norm of its gradients, which nothing waits for."""
    optimizer = OPTIMIZERS["adamw"]
    plain, arguments = given(optimizer, dtype, shapes)

    def step(params, state, grads):
        return *plain(params, state, grads), optax.tree.norm(grads)

    return step, arguments


@pytest.mark.cuda_lowering
def test_a_norm_that_is_reported_comes_with_the_updates():
    """Which read the gradients in any case, and stay in place."""
    step, arguments = reporting()
    text, trace = lowered(step, arguments, donate_argnums=(0, 1))
    (spec,) = updates(trace)
    assert (len(spec.members), len(spec.outputs), len(spec.aliases)) == (9, 36, 27)
    assert text.count("@triton_kernel_call_ffi(") == 2
    assert not trace.warnings


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_values_beside_a_norm(dtype):
    step, arguments = reporting(dtype)
    fused, plain = jevt.jit(step, backend="interpret"), jax.jit(step)
    tolerance = 1e-5 if dtype == np.float32 else 2e-2
    close(fused(*arguments), plain(*arguments), tolerance)
    (spec,) = updates(jevt.last_trace(fused))
    assert len(spec.outputs) == 36


@pytest.mark.interpret
@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_values(name):
    """Against float64, parameters of two types; the same bits each time."""
    step, arguments = given(CLIPPED[name], shapes=(*MANY, *MANY[:7]))
    half = [x.astype(jnp.bfloat16) if k >= 9 else x for k, x in enumerate(arguments[0])]
    arguments = half, CLIPPED[name].init(half), arguments[2]
    fused = jevt.jit(step, backend="interpret")
    got = fused(*arguments)
    assert [len(s.members) for s in updates(jevt.last_trace(fused)) if not s.outputs[0].shape] == [
        16
    ]
    with jax.enable_x64():
        exact = [np.asarray(x, np.float64) for x in jax.tree.leaves(arguments)]
        exact = jax.tree.unflatten(jax.tree.structure(arguments), exact)
        want, _ = jax.jit(step)(exact[0], CLIPPED[name].init(exact[0]), exact[2])
    for k, (mine, theirs) in enumerate(zip(got[0], want, strict=True)):
        x, y = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        assert mine.dtype == half[k].dtype
        assert np.linalg.norm(x - y) <= (1e-5 if k < 9 else 1e-2) * np.linalg.norm(y)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(fused(*arguments)), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_are_those_of_jax_jit(name, dtype):
    step, arguments = training(OPTIMIZERS[name], dtype)
    fused, plain = jevt.jit(step, backend="interpret"), jax.jit(step)
    got, want = fused(*arguments), plain(*arguments)
    assert sum(len(spec.members) for spec in updates(jevt.last_trace(fused))) >= 4
    tolerance = 1e-5 if dtype == np.float32 else 2e-2
    close(got, want, tolerance)
    close(fused(*want), plain(*want), tolerance)  # with moments that are not zero


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NORMED)
def test_values_with_norms(name, dtype):
    """(LAMB of a tensor is one kernel with its norms, where these fit.)"""
    step, arguments = given(NORMED[name], dtype)
    fused, plain = jevt.jit(step, backend="interpret"), jax.jit(step)
    close(fused(*arguments), plain(*arguments), 1e-5 if dtype == np.float32 else 1e-2)
    assert bool(updates(jevt.last_trace(fused))) == (name == "clipped")


@pytest.mark.interpret
def test_check_runs_each_update_beside_its_equations(monkeypatch):
    monkeypatch.setenv("JEVT_CHECK", "1")
    step, arguments = training(OPTIMIZERS["sgd"])
    fused = jevt.jit(step, backend="interpret")
    jax.block_until_ready(fused(*arguments))
    jax.effects_barrier()
    assert len(updates(jevt.last_trace(fused))) == 1
