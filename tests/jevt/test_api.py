"""``jevt.jit`` is ``jax.jit`` to its users.

Every test here also holds for ``jax.jit``, except where it says what jevt adds.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from programs import F32, PROGRAMS, close

import jevt


@pytest.fixture(params=[jax.jit, jevt.jit], ids=["jax", "jevt"])
def jit(request):
    return request.param


@pytest.mark.parametrize("name", PROGRAMS)
def test_same_results_as_jax(name):
    fun, args = PROGRAMS[name]
    close(jevt.jit(fun)(*args), jax.jit(fun)(*args))


def test_decorator_forms():
    @jevt.jit
    def plain(x):
        return x + 1

    @jevt.jit()
    def empty(x):
        return x + 1

    @jevt.jit(backend="xla", static_argnums=1)
    def options(x, n):
        return x + n

    assert plain(1) == empty(1) == options(1, 1) == 2


def test_is_a_jit_object(jit):
    def step(x: float, *, scale: int = 2) -> float:
        """Doc."""
        return x * scale

    jitted = jit(step)
    assert type(jitted) is type(jax.jit(step))
    assert (jitted.__name__, jitted.__doc__) == ("step", "Doc.")
    assert jitted.__qualname__ == step.__qualname__
    assert jitted.__wrapped__.__doc__ == "Doc."
    assert inspect.signature(jitted) == inspect.signature(step)
    assert inspect.unwrap(jitted) is step


def test_pytrees_and_keywords(jit):
    @jit
    def f(a, *rest, key, **more):
        return {"sum": a["x"] + a["y"][0] + sum(rest) + key, "more": more, "none": None}

    out = f({"x": 1.0, "y": (2.0,)}, 3.0, 4.0, key=5.0, z=jnp.ones(2), b=[7])
    assert out["sum"] == 15.0
    assert set(out["more"]) == {"z", "b"} and out["none"] is None
    np.testing.assert_array_equal(out["more"]["z"], np.ones(2))


def test_static_arguments(jit):
    calls = []

    @functools.partial(jit, static_argnums=0, static_argnames="mode")
    def f(n, x, *, mode="a"):
        calls.append((n, mode))
        return x * n if mode == "a" else x - n

    assert f(2, 3.0) == 6.0
    assert f(2, 4.0) == 8.0
    assert f(3, 3.0) == 9.0
    assert f(3, 3.0, mode="b") == 0.0
    assert f(n=3, x=3.0, mode="b") == 0.0
    assert calls[:3] == [(2, "a"), (3, "a"), (3, "b")]


def test_static_argument_that_is_a_pytree_or_a_function(jit):
    @functools.partial(jit, static_argnums=(0, 1))
    def f(activation, sizes, x):
        return activation(x) * sizes[0] * sizes[1]

    assert f(jnp.sin, (2, 3), 0.5) == jnp.sin(0.5) * 6


def test_static_names_from_signature(jit):
    f = jit(lambda x, n: x**n, static_argnames=("n",))
    assert f(2.0, 3) == 8.0 and f(2.0, n=3) == 8.0


def test_methods(jit):
    class Model:
        scale = 3.0

        @functools.partial(jit, static_argnums=0)
        def __call__(self, x):
            return x * self.scale

    assert Model()(2.0) == 6.0


def test_partial_and_callable_object(jit):
    class Adder:
        def __call__(self, x, y):
            return x + y

    assert jit(functools.partial(Adder(), 1))(2) == 3
    assert jit(functools.partial(lambda x, *, y: x - y, y=1))(2) == 1
    assert jit(jit(lambda x: x + 1))(2) == 3


def test_retraces_on_new_shapes_and_types_only(jit):
    calls = []

    @jit
    def f(x):
        calls.append(x.shape)
        return x.sum()

    for x in (np.ones(3, np.float32), np.zeros(3, np.float32), np.ones(4, np.float32)):
        f(x)
    f(np.ones(3, np.int32))
    f(np.ones(3, np.int32))
    assert len(calls) == 3
    f.lower(np.ones(3, np.int32)), f.trace(np.ones(3, np.int32))
    assert len(calls) == 3
    f.clear_cache()
    f(np.ones(3, np.int32))
    assert len(calls) == 4


def test_dispatch_stays_in_cpp():
    """After the first call no Python of jevt or JAX runs."""
    import sys

    f = jevt.jit(lambda x: x + 1)
    x = jnp.ones(3)
    f(x)
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code) if event == "call" else None)
    try:
        f(x)
    finally:
        sys.setprofile(None)
    assert [c for c in seen if "jax" in c.co_filename or "jevt" in c.co_filename] == []


def test_aot_stages(jit):
    f = jit(lambda x, n: {"y": x * n}, static_argnums=1)
    x = jnp.ones((2, 3))
    traced = f.trace(x, 2)
    assert traced.out_info["y"].shape == (2, 3)
    compiled = traced.lower().compile()
    np.testing.assert_array_equal(compiled(x)["y"], 2 * x)
    np.testing.assert_array_equal(f.lower(x, 2).compile()(x)["y"], 2 * x)
    assert f.eval_shape(x, 2)["y"].dtype == jnp.float32
    assert f.lower(jax.ShapeDtypeStruct((5, 3), jnp.bfloat16), 2).out_info["y"].shape == (5, 3)
    assert "jit_" in f.lower(x, 2).as_text()


def test_donation(jit):
    @functools.partial(jit, donate_argnums=0, donate_argnames="more")
    def f(state, x, *, more):
        return jax.tree.map(lambda s: s + x, state), more * 2

    state, more = {"a": jnp.ones(8), "b": jnp.zeros(8)}, jnp.ones(4)
    x = jnp.float32(1)
    new, _ = f(state, x, more=more)
    np.testing.assert_array_equal(new["a"], 2 * np.ones(8))
    assert state["a"].is_deleted() and state["b"].is_deleted() and more.is_deleted()
    assert not x.is_deleted()
    with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
        f(state, x, more=jnp.ones(4))
    # The error has left nothing behind.
    np.testing.assert_array_equal(f(new, x, more=jnp.ones(4))[0]["a"], 3 * np.ones(8))


def test_keep_unused(jit):
    drops = jit(lambda x, unused: x + 1).lower(1.0, jnp.ones(3))
    keeps = jit(lambda x, unused: x + 1, keep_unused=True).lower(1.0, jnp.ones(3))
    assert "tensor<3xf32>" not in drops.as_text()
    assert "tensor<3xf32>" in keeps.as_text()
    assert keeps.compile()(1.0, jnp.ones(3)) == 2.0


def test_inline(jit):
    inner = jit(lambda x: jnp.sin(x) + 1, inline=True)
    assert jax.jit(lambda x: inner(x) * 2)(0.5) == (jnp.sin(0.5) + 1) * 2


def test_shardings(jit):
    mesh = jax.make_mesh((1,), ("d",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("d",), ()))
    f = jit(lambda x: (x * 2, x.sum()), in_shardings=split, out_shardings=(split, whole))
    y, total = f(jnp.ones(4))
    assert y.sharding == split and total.sharding == whole and total == 4


def test_disable_jit_runs_the_plain_function(jit):
    seen = []

    @functools.partial(jit, static_argnums=1)
    def f(x, n):
        seen.append(x)
        return x * n if x > 0 else x  # needs the value

    with jax.disable_jit():
        assert f(2.0, 3) == 6.0
    assert seen == [2.0]


def test_closure_over_arrays_and_outer_tracers(jit):
    table = jnp.arange(4.0)

    @jax.jit
    def outer(x, y):
        inner = jit(lambda v: v * y + table[: v.shape[0]])
        return inner(x) + lax.map(lambda r: jit(lambda: r * y)(), x)

    x, y = jnp.ones(4), jnp.float32(3)
    np.testing.assert_array_equal(outer(x, y), 3 * x + table + 3 * x)
    gradient = jax.grad(lambda y: jit(lambda v: (v * y).sum())(x))(2.0)
    assert gradient == 4.0


def test_nothing_runs_twice(jit):
    traces, runs = [], []

    @jit
    def f(x):
        traces.append(1)
        jax.debug.callback(lambda v: runs.append(float(v)), x)
        return x + 1

    f(1.0), f(2.0)
    jax.effects_barrier()
    assert len(traces) == 1 and runs == [1.0, 2.0]


def test_mutable_arrays(jit):
    @jit
    def f(ref, x):
        ref[...] += x
        local = jax.new_ref(x)
        local[0] = 5.0
        return local[...]

    ref = jax.new_ref(jnp.ones(3))
    np.testing.assert_array_equal(f(ref, 2 * jnp.ones(3)), [5, 2, 2])
    np.testing.assert_array_equal(ref[...], 3 * np.ones(3))


def test_debug_nans(jit):
    f = jit(lambda x: jnp.log(x) * 2)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        f(-1.0)


def test_export(jit):
    exported = jax.export.export(jit(lambda x: jnp.sin(x) + 1))(jnp.ones(3))
    np.testing.assert_allclose(exported.call(jnp.ones(3)), np.sin(1) + 1, rtol=1e-6)


def test_export_with_symbolic_sizes(jit):
    (n,) = jax.export.symbolic_shape("n")
    arg = jax.ShapeDtypeStruct((n,), jnp.float32)
    expected = pytest.warns(jevt.JevtWarning, match="<lambda> has symbolic sizes")
    with expected if jit is jevt.jit else contextlib.nullcontext():
        exported = jax.export.export(jit(lambda x: jnp.sin(x).sum()))(arg)
    np.testing.assert_allclose(exported.call(jnp.ones(5)), 5 * np.sin(1), rtol=1e-6)
    with pytest.raises(jevt.StrictError, match="symbolic sizes.*for given sizes"):
        jax.export.export(jevt.jit(jnp.sin, strict=True))(arg)


def test_compiler_options(jit):
    f = jit(lambda x: x * 2, compiler_options={"xla_cpu_enable_fast_math": True})
    assert f(2.0) == 4.0
    with pytest.raises(Exception, match="no_such_option"):
        jit(lambda x: x * 2, compiler_options={"no_such_option": True})(2.0)


@pytest.mark.filterwarnings("ignore:backend and device argument on jit is deprecated")
def test_device(jit):
    device = jax.devices("cpu")[0]
    assert jit(lambda x: x * 2, device=device)(jnp.ones(3)).devices() == {device}


def test_export_for_several_platforms():
    """It is planned, for the reports, and left to XLA: there is one text for all of them."""
    f = jevt.jit(lambda x: x * 2 + 1, backend="triton")
    exported = jax.export.export(f, platforms=("cpu", "cuda"))(np.ones(3000, np.float32))
    np.testing.assert_array_equal(exported.call(np.full(3000, 2.0, np.float32)), 5)
    (group,) = jevt.last_trace(f).plan.groups
    assert group.reason == "backend: xla on cpu leaves all to XLA"


def test_x64(jit):
    with jax.enable_x64(True):
        f = jit(lambda x: (x * 2 + np.pi, jnp.full(3, 0.1, jnp.float64) * x, jnp.arange(3)[1] * 7))
        a, b, c = f(np.float64(1) / 3)
        assert a == 2 / 3 + np.pi and b.dtype == np.float64 and b[0] == 0.1 * (1 / 3)
        assert c.dtype == np.int64


def test_function_can_be_freed():
    def make():
        f = jevt.jit(lambda x: x * 2)
        f(1.0)
        return weakref.ref(jevt.last_trace(f).stages[1].jaxpr), weakref.ref(f)

    references = make()
    jax.clear_caches()
    gc.collect()
    assert [r() for r in references] == [None, None]


# Errors: jax.jit's own, and none leaves anything behind.


def test_non_array_argument(jit):
    f = jit(lambda x: x)
    with pytest.raises(TypeError, match=r"problematic value is of type <class 'str'>.*path x"):
        f("text")
    assert f(1) == 1


def test_non_array_result(jit):
    f = jit(lambda x: "text" if x.shape == () else x)
    with pytest.raises(TypeError, match="text|str"):
        f(1.0)
    np.testing.assert_array_equal(f(np.ones(2)), np.ones(2))


def test_value_dependent_control_flow_names_the_argument(jit):
    def my_step(x, threshold):
        return x if threshold > 0 else -x

    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        jit(my_step)(1.0, 2.0)
    assert "my_step at" in str(error.value) and "value of the argument threshold" in str(
        error.value
    )


def test_unhashable_static_value(jit):
    f = jit(lambda x, n: x, static_argnums=1)
    with pytest.raises(ValueError, match="[Nn]on-hashable static argument"):
        f(1.0, [1])
    assert f(1.0, 1) == 1.0


def test_static_argument_out_of_range(jit):
    with pytest.raises(ValueError, match="static_argnums"):
        jit(lambda x: x, static_argnums=3)
    with pytest.raises(ValueError, match="static_argnames"):
        jit(lambda x: x, static_argnames="y")


def test_missing_and_extra_arguments(jit):
    f = jit(lambda x: x)
    with pytest.raises(
        TypeError, match="missing 1 required positional argument|missing a required argument"
    ):
        f()
    with pytest.raises(TypeError, match="positional argument"):
        f(1, 2)


def test_error_inside_the_function_leaves_nothing(jit):
    fail = True

    @jit
    def f(x):
        if fail:
            raise KeyError("mine")
        return x + 1

    with pytest.raises(KeyError, match="mine"):
        f(1.0)
    fail = False
    assert f(1.0) == 2.0


def test_leaked_tracer(jit):
    leaked = []
    jit(lambda x: leaked.append(x) or x * 1)(1.0)
    with pytest.raises(jax.errors.UnexpectedTracerError, match="x"):
        jit(lambda y: y + leaked[0])(1.0)


# What jevt adds.


def test_illegal_options():
    with pytest.raises(jevt.ConfigError, match=r"'auto', .* or 'interpret'.*mean 'triton'"):
        jevt.jit(lambda x: x, backend="trition")
    with pytest.raises(jevt.ConfigError, match="jax.device_put"):
        jevt.jit(backend="gpu")
    with pytest.raises(jevt.ConfigError, match="strict must be True or False, got 1"):
        jevt.jit(strict=1)
    with pytest.raises(TypeError, match=r"unexpected option 'bakend'. Did you mean 'backend'"):
        jevt.jit(bakend="xla")
    with pytest.raises(TypeError, match=r"'static_argnum'. Did you mean 'static_argnums'"):
        jevt.jit(lambda x: x, static_argnum=1)
    with pytest.raises(TypeError, match=r"expects a function .*'triton'.*backend='xla'"):
        jevt.jit("triton")
    with pytest.raises(TypeError, match="generator"):

        @jevt.jit
        def generator(x):
            yield x


def test_interpret_needs_its_variable(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(jevt.ConfigError, match="TRITON_INTERPRET=1"):
        jevt.jit(lambda x: x, backend="interpret")


def test_explain_compiles_without_running():
    runs = []

    @jevt.jit
    def f(x):
        jax.debug.callback(lambda: runs.append(1))
        return jax.nn.relu(x) * 2

    trace = f.explain(jnp.ones(3))
    assert runs == []
    assert isinstance(trace, jevt.Trace) and trace.name == "f"
    assert jevt.last_trace(f) is trace
    assert jevt.explain(f, jnp.ones(3)) is trace
    f(jnp.ones(3))
    assert jevt.last_trace(f) is trace, "the plan explained is the plan that runs"
    other = f.explain(jnp.ones(4))
    assert other is not trace and jevt.last_trace(f) is other
    assert f.explain(jnp.ones(3)) is trace


def test_explain_with_static_arguments_and_keywords():
    f = jevt.jit(lambda x, n, *, y: x * n + y, static_argnums=1)
    assert len(f.explain(1.0, 2, y=3.0).stages[0].jaxpr.invars) == 2


def test_explain_of_nothing():
    assert jevt.jit(lambda x: ()).explain(1.0).lowered.eqns == []
    assert jevt.jit(lambda x: x).explain(1.0).lowered.eqns == []


def test_last_trace_errors():
    f = jevt.jit(lambda x: x * 2)
    with pytest.raises(LookupError, match=r"not been compiled.*explain"):
        jevt.last_trace(f)
    with pytest.raises(TypeError, match=r"returned by jevt.jit"):
        jevt.last_trace(lambda x: x)
    with pytest.raises(TypeError, match=r"returned by jevt.jit"):
        jevt.explain(jax.jit(lambda x: x), 1.0)


def test_wrapping_does_not_copy_ownership():
    inner = jevt.jit(lambda x: x * 2)
    outer = jevt.jit(inner)
    outer(1.0)
    assert jevt.last_trace(outer) is outer.explain(1.0)
    with pytest.raises(LookupError):
        jevt.last_trace(inner)


def test_last_trace_of_a_method():
    class Model:
        @functools.partial(jevt.jit, static_argnums=0)
        def step(self, x):
            return x * 2

    model = Model()
    model.step(1.0)
    assert jevt.last_trace(model.step).name == "step"


@pytest.mark.parametrize("backend", ["auto", "xla", "triton"])
def test_every_backend_runs_everywhere(backend):
    def f(x):
        return jax.nn.softmax(x) * 2

    close(jevt.jit(f, backend=backend)(F32), jax.jit(f)(F32))
