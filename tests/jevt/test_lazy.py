"""``jevt.lazy`` is the identity wherever ``jevt.jit`` does not give it a meaning."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import F32, close

import jevt
from jevt import _lazy


def marked(x):
    return jevt.lazy(jnp.sin(x)) * x


def plain(x):
    return jnp.sin(x) * x


TRANSFORMATIONS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "hessian": lambda f: jax.hessian(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x),
    "vmap": jax.vmap,
    "vmap_grad": lambda f: jax.vmap(jax.grad(lambda x: f(x).sum())),
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()),
    "scan": lambda f: lambda x: lax.scan(lambda c, r: (c, f(r)), 0.0, x)[1],
    "while": lambda f: lambda x: lax.while_loop(lambda c: c.sum() < 0, f, x),
    "cond": lambda f: lambda x: lax.cond(x[0, 0] < 0, f, lambda x: x, x),
    "map": lambda f: lambda x: lax.map(f, x),
    "export": lambda f: lambda x: jax.export.export(jax.jit(f))(x).call(x),
    "eval_shape": lambda f: lambda x: jnp.zeros(jax.eval_shape(f, x).shape),
}


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, jevt.jit], ids=["eager", "jax", "jevt"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_identity(name, outer):
    transform = TRANSFORMATIONS[name]
    close(outer(transform(marked))(F32), transform(plain)(F32))


def test_of_what_is_known_is_that():
    tree = {"a": 1.0, "b": [F32, None, "text"], "key": jax.random.key(0)}
    result = jevt.lazy(tree)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (result, tree)), strict=True))
    assert jevt.lazy(None) is None


def test_types_are_kept():
    def types(f):
        args = (F32, 1, np.float16(2), jax.random.key(0), np.ones((0, 3), bool), 1j)
        return jax.make_jaxpr(lambda *args: f(args))(*args).out_avals

    assert types(jevt.lazy) == types(lambda x: x)


def test_dropped_by_the_pipeline():
    trace = jevt.jit(marked).explain(F32)
    assert [e.primitive.name for e in trace.stage("inline").jaxpr.eqns] == ["sin", "mul"]


def test_in_a_kept_call_it_is_the_identity():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    inner = jax.jit(marked, out_shardings=where)
    close(jevt.jit(lambda x: jevt.lazy(inner(x)))(F32), plain(F32))


def test_inside_shard_map():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    for check in (True, False):
        f = jax.shard_map(marked, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)
        close(jevt.jit(f)(F32), plain(F32))
        close(f(F32), plain(F32))


def test_context_manager():
    assert not _lazy.is_computing()
    with jevt.compute_lazy():
        assert _lazy.is_computing()
        with jevt.compute_lazy(False):
            assert not _lazy.is_computing()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(_lazy.is_computing()))
        thread.start(), thread.join()
        assert elsewhere == [False]
        assert _lazy.is_computing()
    assert not _lazy.is_computing()
    with pytest.raises(KeyError), jevt.compute_lazy():
        raise KeyError
    assert not _lazy.is_computing()


def test_context_manager_takes_a_bool():
    with pytest.raises(TypeError, match="True or False, got 100"), jevt.compute_lazy(100):
        pass
