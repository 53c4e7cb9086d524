"""From which inputs lazy outputs are computed, and what happens when these are gone."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazy_steps import W, X, Y, is_lazy, make_step
from programs import close

import jevt


def test_donated_inputs():
    step = jevt.jit(make_step(), donate_argnums=0)
    w, metrics = step(W + 0, X, Y)
    with pytest.raises(jevt.DonatedInputError) as error:
        float(metrics["loss"])
    message = str(error.value)
    assert "result[1]['loss'] of step" in message and "but w has been deleted" in message
    for way in ("1. compute it with the step", "2. read it before", "3. mark fewer"):
        assert way in message
    assert "do not donate 'w'" in message and "jevt.compute_lazy()" in message
    with pytest.raises(jevt.DonatedInputError):
        jax.device_get(metrics)
    w, metrics = step.compute_lazy(w, X, Y)
    assert float(metrics["loss"]) == metrics["loss"]


def test_donated_inputs_that_the_lazy_outputs_do_not_need():
    @functools.partial(jevt.jit, donate_argnames="state")
    def step(state, x):
        return state + x.mean(0)[:3], jevt.lazy(jnp.sin(x).sum())

    state = W[0] + 0
    _, total = step(state, X)
    assert state.is_deleted()
    close(total.value, jnp.sin(X).sum())


def test_error_names_the_argument():
    @functools.partial(jevt.jit, donate_argnames="state")
    def step(x, *, state):
        total = (state["params"][0] * x).sum() + state["scale"]
        return jax.tree.map(lambda s: s * 2, state), jevt.lazy(total)

    state = {"params": [X + 0], "scale": jnp.float32(1) + 0}
    _, total = step(X, state=state)
    with pytest.raises(jevt.DonatedInputError, match=r"state\['params'\]\[0\] and 1 more") as error:
        str(total)
    assert "do not donate 'state'" in str(error.value)


def test_only_needed_inputs_are_kept_alive_and_until_the_read():
    step = jevt.jit(lambda state, x: (state * 2, jevt.lazy(x.sum())))
    state, x = jnp.ones(3), jnp.ones(4)
    references = weakref.ref(state), weakref.ref(x)
    _, total = step(state, x)
    del state, x
    gc.collect()
    assert references[0]() is None and references[1]() is not None
    assert total == 4
    gc.collect()
    assert references[1]() is None


def test_numpy_inputs_may_be_overwritten():
    step = jevt.jit(lambda x, y, n: (x + y, jevt.lazy((x * y).sum() * n)), static_argnums=2)
    memory = np.zeros(1024, np.uint8)
    start = -memory.ctypes.data % 64  # aligned, so that a CPU device could use it in place
    x, y = memory[start : start + 256].view(np.float32), np.full(64, 2.0)
    for _ in range(2):
        x[:], y[:] = 1, 2
        _, total = step(x, y, 3)
        x[:] = y[:] = 100
        assert total == 64 * 2 * 3


def test_static_arguments_and_keywords():
    @functools.partial(jevt.jit, static_argnums=(0, 2), static_argnames="mode")
    def step(sizes, x, scale, *rest, mode, **more):
        total = (x * sizes[0] + sum(rest)).sum() * scale + more["b"] - more["a"]
        return x, jevt.lazy(total if mode == "a" else -total)

    def call(f, mode):
        return f((2, np.float32(3)), X, 2, 1.0, X * 2, mode=mode, b=5.0, a=np.arange(2.0))

    for mode in "ab":
        close(call(step, mode)[1].value, call(inspect.unwrap(step), mode)[1])


def test_marks_that_depend_on_a_static_argument():
    @functools.partial(jevt.jit, static_argnums=1)
    def step(x, lazy):
        total = jnp.sin(x).sum()
        return x * 2, jevt.lazy(total) if lazy else total

    assert is_lazy(step(X, False)) == [False, False]
    assert is_lazy(step(X, True)) == [False, True]
    assert is_lazy(step(X, False)) == [False, False]
    assert len(step.explain(X, False).lowered.outvars) == 2
    assert is_lazy(step(X[:2], False)) == [False, False]
    close(step(X, True)[1].value, step(X, False)[1])


def test_methods_partials_and_lists_of_scalars():
    class Model:
        scale = 3.0

        @functools.partial(jevt.jit, static_argnums=0)
        def __call__(self, x):
            return x, jevt.lazy(x.sum() * self.scale)

    assert Model()(2.0)[1] == 6.0
    step = jevt.jit(functools.partial(lambda k, xs: jevt.lazy(sum(xs) * k), 2))
    assert step([1, 2.0, np.float32(3), jnp.float32(4)]) == 20


def test_captured_arrays():
    table, constants = jnp.arange(4.0), np.arange(4.0, dtype=np.float32)
    step = jevt.jit(lambda x: (x * table, jevt.lazy((x + table * constants).sum())))
    close(step(X)[1].value, (X + table * constants).sum())


def test_random_bits_are_those_of_the_step():
    def f(key, x):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return x * mask, jevt.lazy((x * mask).sum())

    out, total = jevt.jit(f)(jax.random.key(3), X)
    close(total.value, out.sum())


def test_lazy_arrays_as_inputs():
    step = jevt.jit(lambda x: (x * 2, jevt.lazy(jnp.sin(x))))
    _, a = step(X)
    _, b = step(a)
    close(b.value, jnp.sin(jnp.sin(X)))
    close(jax.jit(lambda a, b: a + b)(*step(X)), 2 * X + jnp.sin(X))
    losses = [step(x)[1] for x in (X, X + 1)]
    close(jnp.mean(jnp.stack(losses)), jnp.mean(jnp.sin(jnp.stack([X, X + 1]))))
    close(jax.tree.map(jnp.mean, {"a": losses[0]}), {"a": jnp.sin(X).mean()})


def test_read_in_another_context():
    """The second program is that of the call, whatever surrounds the read."""
    with jax.enable_x64(True):
        step = jevt.jit(lambda x: (x, jevt.lazy(x + jnp.full(3, 1e-12, jnp.float64))))
        _, total = step(np.ones(3))
    assert total.dtype == np.float64
    assert np.asarray(total)[0] == 1 + 1e-12
    step = jevt.jit(lambda x: (x, jevt.lazy(x.sum())))
    _, inside = step(X)
    close(jax.jit(lambda x: x + inside)(X), X + X.sum())
    _, eagerly = step(X)
    with jax.disable_jit():
        close(eagerly.value, X.sum())


def test_called_while_something_is_traced():
    step = jevt.jit(lambda x: (x, jevt.lazy(x.sum())))

    @jax.jit
    def f(x):
        with jax.ensure_compile_time_eval():
            _, total = step(X)
        return x + total + step(np.ones(2))[1]

    close(f(1.0), 3.0 + X.sum())
    assert is_lazy(step(X)) == is_lazy(step(np.ones(2))) == [False, True]
