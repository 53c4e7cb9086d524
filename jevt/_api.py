"""``jevt.jit``, ``explain`` and ``last_trace``: what a user touches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypedDict, Unpack, overload

import jax
from jax.extend import source_info_util

from jevt import _call, _config, _lazy, _on_demand, pipeline, tracing
from jevt import _jax_internals as internals
from jevt._config import Tune
from jevt._context import Backend
from jevt.passes import lazy_outputs
from jevt.report.trace import Trace

# Equations come from the user's lines, not from the lines here through which tracing passes.
for _module_file in (__file__, _call.__file__, _on_demand.__file__, tracing.__file__):
    source_info_util.register_exclusion(_module_file)

# Options of jax.jit that decide how a function is traced; the others decide how it is compiled.
_TRACING_OPTIONS = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames")

_OWNER = "_jevt_owner"  # attribute of what `jit` returns


class JitOptions(TypedDict, total=False):
    """The options of ``jax.jit``, which keep their meaning."""

    in_shardings: Any
    out_shardings: Any
    static_argnums: int | Sequence[int] | None
    static_argnames: str | Iterable[str] | None
    donate_argnums: int | Sequence[int] | None
    donate_argnames: str | Iterable[str] | None
    keep_unused: bool
    device: Any
    inline: Any
    compiler_options: dict[str, Any] | None


class Jitted[**P, R](Protocol):
    """What ``jevt.jit`` returns: ``jax.jit``'s object with two more methods."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Trace:
        """How the call with these arguments is compiled; XLA compiles and runs nothing of it.

        The result prints itself; ``.plan.to_svg()`` and ``.plan.to_dot()`` draw its plan.
        """

    def compute_lazy(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The call with outputs marked by ``jevt.lazy`` computed in the same program."""

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Traced: ...

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered: ...

    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...

    def clear_cache(self) -> None: ...


@overload
def jit[**P, R](
    fun: Callable[P, R],
    /,
    *,
    backend: Backend = ...,
    strict: bool = ...,
    tune: Tune | None = ...,
    **jit_options: Unpack[JitOptions],
) -> Jitted[P, R]: ...


@overload
def jit[**P, R](
    fun: None = None,
    /,
    *,
    backend: Backend = ...,
    strict: bool = ...,
    tune: Tune | None = ...,
    **jit_options: Unpack[JitOptions],
) -> Callable[[Callable[P, R]], Jitted[P, R]]: ...


def jit(
    fun: Callable[..., Any] | None = None,
    /,
    *,
    backend: Backend = "auto",
    strict: bool = False,
    tune: Tune | None = None,
    **jit_options: Unpack[JitOptions],
) -> Any:
    """Compiles a training step as one graph, with fused groups as generated Triton kernels.

    A replacement for ``jax.jit``, with or without arguments: ``@jevt.jit``,
    ``@jevt.jit(strict=True)``.

    Args:
      fun: the function; pure, of arrays in pytrees, as for ``jax.jit``.
      backend: how fused groups run. "auto": Triton on a GPU where the cost model predicts that it
        is faster, XLA elsewhere. "triton": every group that can be a kernel is one. "xla": none is.
        "interpret": as "triton", by Triton's interpreter on the CPU (slow; for tests).
      strict: raise instead of leaving something to XLA for another reason than the cost model's.
      tune: "off": kernels' measured times are used where the store of this GPU has them; nothing is
        measured. "on": what it lacks is measured when a program is compiled on a GPU, kernels in
        several configurations and XLA, and kept there. None: as ``JEVT_TUNE`` says, by default
        "off".
      **jit_options: those of ``jax.jit``, passed through: ``static_argnums``, ``static_argnames``,
        ``donate_argnums``, ``donate_argnames``, ``keep_unused``, ``inline``, ``in_shardings``,
        ``out_shardings``, ``compiler_options``, ``device``.

    Returns:
      A ``jax.jit`` object of the same signature, with ``.trace``, ``.lower``, ``.eval_shape``,
      ``.clear_cache``, and ``.explain(*args, **kwargs)``, which returns a ``jevt.Trace``.

    Raises:
      ConfigError: an option or a ``JEVT_*`` environment variable has an illegal value.
      TypeError: an unknown option, or ``fun`` is not a function.
      StrictError: (when called) under ``strict``, with the groups that fell back.
    """
    _config.reject_unknown("jevt.jit", set(jit_options) - set(_jit_option_names()), _option_names())
    options = _config.make_options(backend, strict, tune)
    if fun is None:
        return functools.partial(_jit, options=options, jit_options=jit_options)
    return _jit(fun, options, jit_options)


def last_trace(fun: Callable[..., Any]) -> Trace:
    """The trace of the last compilation of a function returned by ``jevt.jit``.

    Raises:
      TypeError: ``fun`` does not come from ``jevt.jit``.
      LookupError: it has not been compiled yet.
    """
    owner = _owner(fun)
    if owner.last is None:
        raise LookupError(
            f"jevt.last_trace: {owner.name} has not been compiled on its own yet. Call it first, or"
            f" use {owner.name}.explain(*args). Inside another jevt.jit it is part of that trace."
        )
    return owner.last


def explain(fun: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Trace:
    """``fun.explain(*args, **kwargs)``: how that call is compiled."""
    _owner(fun)
    trace: Trace = fun.explain(*args, **kwargs)  # type: ignore[attr-defined]
    return trace


def _jit(fun: Callable[..., Any], options: _config.Options, jit_options: JitOptions) -> Any:
    if not callable(fun):
        raise TypeError(
            f"jevt.jit expects a function as its only positional argument, got {fun!r}. Options are"
            " given by keyword: @jevt.jit(backend='xla')."
        )
    jax.jit(fun)  # raises where it cannot take the function: generators, coroutines
    owner = _call.Owner(_name(fun), options)
    tracing_options = {k: v for k, v in jit_options.items() if k in _TRACING_OPTIONS}

    @functools.wraps(fun, updated=())
    def step(*args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_disable_jit or tracing.is_nan_hunt(args, kwargs):
            return fun(*args, **kwargs)
        traced = tracing.trace(fun, args, kwargs, tracing_options)
        owner.has_lazy |= any(lazy_outputs.marked(traced.jaxpr))
        donated = [v for v, d in zip(traced.jaxpr.invars, traced.donated, strict=True) if d]
        recorder = _call.Recorder(owner, frozenset(donated))
        outputs = _call.jevt_call_p.bind(
            *traced.operands, call_jaxpr=traced.jaxpr, recorder=recorder
        )
        return jax.tree.unflatten(traced.out_tree, outputs)

    step.__name__ = owner.name
    complete: Any = jax.jit(step, **jit_options)
    on_demand = _on_demand.OnDemand(fun, complete, owner, jit_options)
    jitted = internals.with_slow_path(complete, on_demand.slow_path)

    def explain(*args: Any, **kwargs: Any) -> Trace:
        traced = complete.trace(*args, **kwargs)
        if owner.has_lazy and not _lazy.is_computing():
            traced = on_demand.reduced.trace(*args, **kwargs)
        return _explain(traced)

    def compute_lazy(*args: Any, **kwargs: Any) -> Any:
        with _lazy.compute_lazy():
            return jitted(*args, **kwargs)

    def clear_cache() -> None:
        for program in (complete, on_demand.reduced):
            program.clear_cache()
        type(jitted).clear_cache(jitted)

    jitted.explain = explain
    jitted.compute_lazy = compute_lazy
    jitted.clear_cache = clear_cache
    setattr(jitted, _OWNER, owner)
    return jitted


def _explain(traced: jax.stages.Traced) -> Trace:
    """The trace of a traced call, which lowering leaves unless it did so earlier."""
    call = next(e for e in traced.jaxpr.eqns if e.primitive is _call.jevt_call_p)
    recorder: _call.Recorder = call.params["recorder"]
    if recorder.trace is None:
        traced.lower()
    if recorder.trace is None:  # nothing of it is needed, so nothing was lowered
        jaxpr, options = call.params["call_jaxpr"], recorder.owner.options
        donated = tuple(v in recorder.donated for v in jaxpr.invars)
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        context = pipeline.make_context(options, (platform,), donated, False)
        recorder.record(pipeline.compile(jaxpr, context, recorder.owner.name, options.environment))
    assert recorder.trace is not None
    return recorder.trace


def _owner(fun: Callable[..., Any]) -> _call.Owner:
    owner = getattr(fun, _OWNER, None)
    if not isinstance(owner, _call.Owner):
        raise TypeError(f"Expected a function returned by jevt.jit, got {fun!r}.")
    return owner


def _name(fun: Callable[..., Any]) -> str:
    while isinstance(fun, functools.partial):
        fun = fun.func
    return getattr(fun, "__name__", type(fun).__name__)


@functools.cache
def _jit_option_names() -> tuple[str, ...]:
    """As the installed JAX has them, without its own deprecated ``backend``."""
    parameters = inspect.signature(jax.jit).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "backend")


def _option_names() -> tuple[str, ...]:
    return ("backend", "strict", "tune", *_jit_option_names())
