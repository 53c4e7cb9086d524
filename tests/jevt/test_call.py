"""``jevt_call`` under every transformation and inside every construct of JAX."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from programs import F32, PROGRAMS, close

import jevt
from jevt import _call, pipeline

ROOT = Path(__file__).parents[2]


def loss(x):
    return jnp.sum(jax.nn.relu(x + 0.1) * jnp.sin(x) / jnp.exp(x).sum())


TRANSFORMATIONS = {
    "grad": jax.grad,
    "value_and_grad": jax.value_and_grad,
    "grad_of_grad": lambda f: jax.grad(lambda x: jax.grad(f)(x).sum()),
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "hessian": jax.hessian,
    "vmap": jax.vmap,
    "vmap_of_grad": lambda f: jax.vmap(jax.grad(f)),
    "grad_of_vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x).sum()),
    "vmap_twice": lambda f: jax.vmap(jax.vmap(f)),
    "vmap_last_axis": lambda f: jax.vmap(f, in_axes=1),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "checkpoint_twice": lambda f: jax.grad(jax.checkpoint(jax.checkpoint(f))),
    "checkpoint_dots": lambda f: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.checkpoint_dots)
    ),
    "checkpoint_everything": lambda f: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable)
    ),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (2 * x,)),
    "vjp_under_vmap": lambda f: jax.vmap(lambda x: jax.vjp(f, x)[1](1.0)[0]),
    "linear_transpose": lambda f: lambda x: jax.linear_transpose(jax.linearize(f, x)[1], x)(1.0),
    "scan": lambda f: lambda x: lax.scan(lambda c, r: (c + f(r), f(r) * c), 0.0, x),
    "grad_of_scan": lambda f: jax.grad(lambda x: lax.scan(lambda c, r: (c + f(r), ()), 0.0, x)[0]),
    "map": lambda f: lambda x: lax.map(f, x),
    "while": lambda f: lambda x: lax.while_loop(lambda s: f(s) > 1.0, lambda s: s * 0.5, x),
    "cond": lambda f: lambda x: lax.cond(x[0, 0] < 0, f, lambda v: v.sum(), x),
    "grad_of_cond": lambda f: jax.grad(lambda x: lax.cond(x[0, 0] < 0, f, lambda v: v.sum(), x)),
    "eval_shape": lambda f: lambda x: jnp.zeros(jax.eval_shape(f, x).shape),
    "make_jaxpr": lambda f: lambda x: jax.core.eval_jaxpr(jax.make_jaxpr(f)(x), [], x),
    "none": lambda f: f,
}


@pytest.mark.parametrize("outer", [None, jax.jit, jevt.jit], ids=["eager", "jax", "jevt"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformation(name, outer):
    transform = TRANSFORMATIONS[name]
    inner = jevt.jit(loss)
    fun = transform(inner)
    close((outer(fun) if outer else fun)(F32), transform(loss)(F32))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_inside_an_outer_function(name):
    fun, args = PROGRAMS[name]
    inner = jevt.jit(fun)
    close(jevt.jit(lambda *a: jax.tree.map(lambda x: x, inner(*a)))(*args), jax.jit(fun)(*args))


def test_grad_under_jit_is_compiled_by_jevt():
    """Forward and backward pass are calls of their own, whose lowering runs the pipeline."""
    f = jevt.jit(loss)
    jaxpr = jax.make_jaxpr(jax.grad(f))(F32)
    calls = [e for jit in jaxpr.eqns for e in jit.params.get("jaxpr", jaxpr).eqns]
    assert [e.primitive for e in calls].count(_call.jevt_call_p) == 2
    jax.jit(jax.grad(f))(F32)
    assert jevt.last_trace(f).stages


def test_inner_calls_are_inlined_by_an_outer_one():
    inner = jevt.jit(lambda x: jnp.sin(x) * 2.0)
    outer = jevt.jit(lambda x: inner(inner(x)) + 1.0)
    names = [e.primitive.name for e in outer.explain(1.0).stage("inline").jaxpr.eqns]
    assert names == ["sin", "mul", "sin", "mul", "add"]


def test_custom_derivatives_inside_are_used():
    @jax.custom_vjp
    def f(x):
        return x * 2.0

    f.defvjp(lambda x: (f(x), None), lambda _, g: (g * 100.0,))
    step = jevt.jit(lambda x: f(x) * 1.0)
    assert jax.grad(step)(1.0) == 100.0
    assert jax.jit(jax.grad(step))(1.0) == 100.0
    assert jax.grad(jax.checkpoint(step))(1.0) == 100.0
    assert jevt.jit(jax.grad(step))(1.0) == 100.0


def test_checkpoint_policy_sees_inside():
    """What a policy saves is not computed again."""
    f = jevt.jit(lambda x: jnp.sin(jnp.sin(x)))
    saved = jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable)
    nothing = jax.checkpoint(f)

    def sines(fun):
        return str(jax.make_jaxpr(jax.grad(fun))(1.0)).count("= sin ")

    assert sines(saved) < sines(nothing)


def test_dead_outputs_and_inputs_are_pruned():
    f = jevt.jit(lambda x, y: (jnp.sin(x), jnp.cos(y)))
    jaxpr = jax.make_jaxpr(lambda x, y: f(x, y)[0])(1.0, 2.0)
    live, used = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True])
    (eqn,) = live.eqns
    assert used == [True, False]
    assert "cos" not in str(eqn)


def test_donation_follows_variables():
    f = jevt.jit(lambda unused, x, y: (x + y, y), donate_argnums=1)
    (call,) = f.trace(0.0, 1.0, 2.0).jaxpr.eqns
    recorder, jaxpr = call.params["recorder"], call.params["call_jaxpr"]
    assert [v in recorder.donated for v in jaxpr.invars] == [False, True, False]
    assert f.explain(0.0, jnp.ones(3), jnp.ones(3)).context.donated == (True, False)


def test_ordered_effects_keep_their_order():
    log = []

    def note(tag, value):
        log.append((tag, float(value)))

    inner = jevt.jit(lambda x: io("inner", x) + 1.0)

    def io(tag, x):
        return jax.experimental.io_callback(
            lambda v: (note(tag, v), np.float32(v))[1],
            jax.ShapeDtypeStruct((), jnp.float32),
            x,
            ordered=True,
        )

    @jevt.jit
    def step(x):
        x = io("a", x)
        x = inner(x)
        x, _ = lax.scan(lambda c, _: (io("loop", c) + 1.0, ()), x, None, length=2)
        return io("b", x)

    assert step(jnp.float32(0)) == 3.0
    jax.effects_barrier()
    assert log == [("a", 0), ("inner", 0), ("loop", 1), ("loop", 2), ("b", 3)]


def test_debug_prints_in_order(capfd):
    @jevt.jit
    def step(x):
        jax.debug.print("first {}", x, ordered=True)
        y = jevt.jit(lambda v: (jax.debug.print("second {}", v, ordered=True), v * 2)[1])(x)
        jax.debug.print("third {}", y, ordered=True)
        jax.debug.print("unordered {}", y)
        return y

    step(1.0), step(2.0)
    jax.effects_barrier()
    lines = capfd.readouterr().out.split("\n")
    assert [s for s in lines if s and "unordered" not in s] == [
        "first 1.0", "second 1.0", "third 2.0", "first 2.0", "second 2.0", "third 4.0",
    ]  # fmt: skip
    assert sorted(s for s in lines if "unordered" in s) == ["unordered 2.0", "unordered 4.0"]


def test_pure_callback():
    f = jevt.jit(
        lambda x: (
            jax.pure_callback(
                lambda v: np.asarray(v) * 2, jax.ShapeDtypeStruct((3,), jnp.float32), x
            )
            + 1
        )
    )
    np.testing.assert_array_equal(f(jnp.ones(3)), 3 * np.ones(3))


def test_checkify():
    @jevt.jit
    def f(x):
        checkify.check(x > 0, "x must be positive, got {}", x)
        return jnp.log(x)

    error, _ = checkify.checkify(f)(1.0)
    error.throw()
    error, _ = checkify.checkify(f)(-1.0)
    with pytest.raises(checkify.JaxRuntimeError, match="x must be positive"):
        error.throw()


def test_evaluates_as_a_primitive():
    jaxpr = jax.make_jaxpr(jevt.jit(lambda x: (jnp.sin(x), x * 2)))(1.0)
    close(jax.core.eval_jaxpr(jaxpr, [], 0.5), [jnp.sin(0.5), jnp.float32(1.0)])


def test_scopes_reach_the_compiled_program():
    @jevt.jit
    def step(x):
        with jax.named_scope("attention"):
            return jax.nn.softmax(x @ x)

    text = step.lower(jnp.ones((4, 4))).compile().as_text()
    assert 'op_name="jit(step)/attention/dot_general"' in text
    assert "jevt_call/" not in text
    assert "_api.py" not in text and "test_call.py" in text


def test_lowered_text_of_an_unfused_step_is_that_of_jax():
    def f(x):
        return jnp.sin(x) @ x + 1.0

    x = jnp.ones((4, 4))
    assert jevt.jit(f, backend="xla").lower(x).as_text() == jax.jit(f).lower(x).as_text()


def test_a_defect_of_the_pipeline_does_not_break_the_program(monkeypatch):
    def broken(jaxpr):
        raise IndexError("a defect")

    monkeypatch.setattr(pipeline, "GRAPH_PASSES", (("broken", broken),))
    f = jevt.jit(lambda x: x * 2)
    with pytest.warns(jevt.JevtWarning, match=r"runs as under jax.jit.*IndexError: a defect"):
        assert f(2.0) == 4.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f(3.0) == 6.0
    with pytest.raises(IndexError, match="a defect"):
        jevt.jit(lambda x: x * 2, strict=True)(2.0)


def test_strict_lists_what_fell_back(monkeypatch):
    import dataclasses

    def refuse(jaxpr, context):
        plan = partition(jaxpr, context)
        groups = [
            dataclasses.replace(g, fallback=True, reason="no rule for it") for g in plan.groups
        ]
        return dataclasses.replace(plan, groups=tuple(groups))

    partition = pipeline.partition
    monkeypatch.setattr(pipeline, "partition", refuse)
    f = jevt.jit(jnp.sin, strict=True)
    for _ in range(2):
        with pytest.raises(
            jevt.StrictError, match="1 groups of sin(.|\n)*no rule for it(.|\n)*drop strict"
        ):
            f(1.0)
    assert jevt.jit(jnp.sin)(0.0) == 0.0


def test_recorders_are_distinct():
    """Two functions with the same jaxpr keep their own options and traces."""
    f, g = jevt.jit(jnp.sin, backend="xla"), jevt.jit(jnp.sin)
    jax.jit(lambda x: f(x) + g(x))(1.0)
    assert jevt.last_trace(f).context.backend == "xla"
    assert jevt.last_trace(g).context.backend == "auto"


_SEVERAL_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np, jevt
    from jax.sharding import NamedSharding, PartitionSpec as P

    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.arange(32.0).reshape(8, 4)
    split = jax.device_put(x, NamedSharding(mesh, P("d")))

    def f(x):
        return jax.nn.softmax(x) * 2 + jax.random.normal(jax.random.key(0), x.shape)

    # Automatic partitioning: known to the pipeline, and sharded as jax.jit shards it.
    step = jevt.jit(f)
    y, want = step(split), jax.jit(f)(split)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    assert y.sharding.is_equivalent_to(want.sharding, 2)
    assert jevt.last_trace(step).context.partitioned
    step(x)
    assert not jevt.last_trace(step).context.partitioned

    # shard_map outside and inside of jevt; psum, axis_index and constants that vary by device.
    def local(x):
        i = jax.lax.axis_index("d")
        h = jax.nn.relu(x) * (i + 1) + jnp.full(x.shape, 2.0) * 3.0
        h, _ = jax.lax.scan(lambda c, r: (jnp.sin(c) + jnp.sin(c) + r, ()), h[0], h)
        return h[None] + jax.lax.psum(h, "d")

    def mapped(fun, **kw):
        return jax.shard_map(fun, mesh=mesh, in_specs=P("d"), out_specs=P("d"), **kw)

    want = jax.jit(mapped(local))(split)
    for check_vma in (True, False):
        kw = {"check_vma": check_vma}
        inside = jevt.jit(local)
        np.testing.assert_allclose(jax.jit(mapped(inside, **kw))(split), want, rtol=1e-6)
        assert not jevt.last_trace(inside).context.partitioned
        np.testing.assert_allclose(jevt.jit(mapped(local, **kw))(split), want, rtol=1e-6)
        np.testing.assert_allclose(jevt.jit(mapped(jevt.jit(local), **kw))(split), want, rtol=1e-6)

    def total(fun):
        return lambda x: mapped(fun)(x).sum()

    want = jax.grad(total(local))(split)
    strict = jevt.jit(jax.grad(total(local)), strict=True)  # what JAX puts in is nothing unknown
    np.testing.assert_allclose(strict(split), want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(total(jevt.jit(local))))(split), want, rtol=1e-5)

    # Dropout inside shard_map: the same bits.
    def dropout(x):
        key = jax.random.key(jax.lax.axis_index("d"))
        return x * jax.random.bernoulli(key, 0.5, (64, 32)).sum()

    want = jax.jit(mapped(dropout))(split)
    np.testing.assert_array_equal(jevt.jit(mapped(dropout))(split), want)

    # Options of jax.jit that place values; a nested jit with shardings keeps them.
    where = NamedSharding(mesh, P(None, "d"))
    inner = jax.jit(lambda x: x * 2, out_shardings=where)
    outer = jevt.jit(lambda x: inner(x))
    assert outer(split).sharding.is_equivalent_to(where, 2)
    assert [e.primitive.name for e in jevt.last_trace(outer).stage("inline").jaxpr.eqns] == ["jit"]
    placed = jevt.jit(f, in_shardings=NamedSharding(mesh, P("d")), out_shardings=where)
    assert placed(x).sharding.is_equivalent_to(where, 2)
    constrained = jevt.jit(lambda x: jax.lax.with_sharding_constraint(x * 2, where) + 1)
    np.testing.assert_array_equal(constrained(split), x * 2 + 1)

    # Sharding in types.
    explicit = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        xe = jax.device_put(x, NamedSharding(explicit, P("d")))
        np.testing.assert_allclose(jevt.jit(f)(xe), jax.jit(f)(xe), rtol=1e-6)
        g = jax.grad(lambda v: jevt.jit(lambda u: jnp.sin(u) * jnp.full(u.shape, 2.0))(v).sum())
        np.testing.assert_allclose(g(xe), 2 * jnp.cos(x), rtol=1e-6)
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
