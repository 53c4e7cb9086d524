"""Steps with lazy outputs under transformations, in other programs, ahead of time, on a mesh."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from lazy_steps import W, X, Y, is_lazy, make_step, zeros
from programs import close

import jevt

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("direct_call_first", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        jax.jit,
        lambda f: jax.jit(jax.jit(f)),
        lambda f: jax.vmap(f, in_axes=(None, 0, 0)),
        lambda f: lambda *a: jax.jvp(lambda w: f(w, *a[1:]), (W,), (W,))[0],
        lambda f: lambda *a: jax.value_and_grad(lambda w: f(w, *a[1:])[1]["loss"])(a[0]),
        lambda f: lambda *a: lax.map(lambda x: f(a[0], *x), (a[1], a[2])),
        lambda f: lambda *a: zeros(jax.eval_shape(f, *a)),
        lambda f: lambda *a: zeros(f.eval_shape(*a)),
        lambda f: lambda *a: f.lower(*a).compile()(*a),
        lambda f: lambda *a: f.trace(*a).lower().compile()(*a),
        lambda f: lambda *a: jax.export.export(f)(*a).call(*a),
        lambda f: lambda *a: jax.core.eval_jaxpr(jax.make_jaxpr(f)(*a), [], *a),
    ],
    ids=[
        *("jit", "jit_jit", "vmap", "jvp", "grad", "map", "eval_shape", ".eval_shape"),
        *(".lower", ".trace", "export", "jaxpr"),
    ],
)
def test_transformed_enclosed_and_compiled_ahead_of_time(use, direct_call_first):
    step = jevt.jit(make_step())
    args = W, X[:, None], Y[:, None]
    if direct_call_first:
        assert any(is_lazy(step(*args)))
    got, want = use(step)(*args), use(jax.jit(make_step(lambda x: x)))(*args)
    assert not any(is_lazy(got))
    close(got, want)
    assert any(is_lazy(step(*args)))


def test_enclosed_by_another_step_it_is_that_steps_output():
    inner = jevt.jit(make_step())
    outer = jevt.jit(lambda w, *args: inner(w + 0, *args))
    assert is_lazy(outer(W, X, Y)) == [False, True, True]
    close(jax.device_get(outer(W, X, Y)), jax.jit(make_step())(W, X, Y))


def test_without_jit():
    step = jevt.jit(make_step())
    with jax.disable_jit():
        out = step(W, X, Y)
    assert not any(is_lazy(out))
    close(out, jax.jit(make_step())(W, X, Y))


def test_looking_for_nans():
    step = jevt.jit(lambda x: (jnp.log(x), jevt.lazy(jnp.log(x).sum())))
    step(X + 1)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        step(-1 - X)
    with jax.debug_nans(True):
        _, total = jevt.jit(lambda x: (x, jevt.lazy(jnp.log(x).sum())))(-1 - X)
        with pytest.raises(FloatingPointError, match="nan"):
            float(total)


_SEVERAL_DEVICES = """
    import warnings
    import jax, jax.numpy as jnp, numpy as np, jevt
    from jax.sharding import NamedSharding, PartitionSpec as P, AxisType

    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    x = jnp.arange(32.0).reshape(8, 4)

    def f(w, x):
        y = jnp.tanh(x @ w)
        return w - y.mean(0), {"loss": jevt.lazy(jnp.sin(y).sum()), "y": jevt.lazy(y * 2)}

    def check(step, *args):
        want = jax.jit(f)(w, x)
        w2, metrics = step(*args)
        assert isinstance(metrics["loss"], jevt.LazyArray)
        np.testing.assert_allclose(w2, want[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], want[1]["loss"], rtol=1e-5)
        return metrics["y"].sharding

    w = jnp.linspace(-1, 1, 16).reshape(4, 4)
    # Sharded arguments; shardings as options, of arguments of the host, prefixes and whole trees.
    check(jevt.jit(f), jax.device_put(w, whole), jax.device_put(x, split))
    outputs = (whole, {"loss": whole, "y": split})
    placed = jevt.jit(f, in_shardings=(whole, split), out_shardings=outputs)
    assert check(placed, w, x).is_equivalent_to(split, 2)
    assert check(placed, np.asarray(w), np.asarray(x)).is_equivalent_to(split, 2)
    prefix = jevt.jit(f, out_shardings=whole)
    assert check(prefix, w, jax.device_put(x, split)).is_equivalent_to(whole, 2)
    placed = jevt.jit(f, in_shardings=(whole, split), out_shardings=(whole, None))
    check(placed, w, x)

    # Inside shard_map it is the identity; around it the step's.
    def mapped(w, x):
        def local(w, x):
            y = jnp.tanh(x @ w)
            return jevt.lazy(jax.lax.psum(jnp.sin(y).sum(), "d"))
        loss = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())(w, x)
        return w * 2, jevt.lazy(loss)

    w2, loss = jevt.jit(mapped)(w, jax.device_put(x, split))
    assert isinstance(loss, jevt.LazyArray)
    np.testing.assert_allclose(loss, jnp.sin(jnp.tanh(x @ w)).sum(), rtol=1e-5)

    # Sharding in types, read where the mesh is not set any more.
    explicit = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        we = jax.device_put(w, NamedSharding(explicit, P()))
        xe = jax.device_put(x, NamedSharding(explicit, P("d")))
        _, metrics = jevt.jit(f)(we, xe)
    np.testing.assert_allclose(metrics["loss"], f(w, x)[1]["loss"], rtol=1e-5)

    # A device as an option.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        step = jevt.jit(f, device=jax.devices()[2])
    _, metrics = step(w, x)
    assert metrics["loss"].devices() == {jax.devices()[2]}
"""


def test_several_devices():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(_SEVERAL_DEVICES)],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
