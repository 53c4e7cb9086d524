"""``jevt_call``: a primitive that carries a traced step as it was written.

Transformations must see the original equations: what has been rewritten into kernels can be neither
differentiated nor batched. So ``jevt.jit`` binds this primitive while tracing, ``grad``, ``vmap``,
``checkpoint`` and dead-code elimination transform the jaxpr that it carries, and only its lowering
runs the pipeline, for the platform that is being lowered for.

    call_jaxpr: the jaxpr. It has no constants: whatever was captured is an operand.
    recorder:   whose call this is; compared by identity, so that it never merges two functions.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jax.extend.core import Jaxpr, Primitive, Var, register_call_primitive_rules
from jax.interpreters import mlir

from jevt import _jax_internals as internals
from jevt import pipeline
from jevt._config import Options
from jevt.lowering.errors import JevtWarning as JevtWarning

if TYPE_CHECKING:
    from jevt.report.trace import Trace

# The rules for jvp, linearize, transpose, batching, partial evaluation, checkpoint, mutable arrays
# and dead code are JAX's own for a call. They keep the call, so `jax.jit(jax.grad(f))` of a jevt
# function has its forward and its backward pass compiled by jevt.
jevt_call_p: Primitive = Primitive("jevt_call")
register_call_primitive_rules(jevt_call_p)
internals.check_as_a_call(jevt_call_p)


class Owner:
    """What a function returned by ``jevt.jit`` remembers.

    Attributes:
      name: of the function.
      options: of it.
      last: trace of its last compilation.
      has_lazy: whether ``jevt.lazy`` has marked one of its outputs, in any of its traces.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        self.last: Trace | None = None
        self.has_lazy = False


class Recorder:
    """One trace of a function: the destination of the traces that its lowerings leave.

    Attributes:
      owner: the function.
      donated: the jaxpr's inputs whose buffers may be overwritten. Variables, not positions,
        because dead-code elimination drops inputs, and because a transformed jaxpr has other
        variables: its inputs are not the caller's buffers any more.
      lazy: names of the outputs that have been left out of the jaxpr.
      trace: of the last lowering.
    """

    def __init__(
        self, owner: Owner, donated: frozenset[Var] = frozenset(), lazy: tuple[str, ...] = ()
    ) -> None:
        self.owner = owner
        self.donated = donated
        self.lazy = lazy
        self.trace: Trace | None = None

    def __repr__(self) -> str:
        return self.owner.name

    def record(self, trace: Trace) -> None:
        self.trace = self.owner.last = trace


class Marked(Exception):
    """The step that is called directly has lazy outputs, and is not to be compiled whole."""


class _Calls(threading.local):
    owner: Owner | None = None


_calls = _Calls()


@contextlib.contextmanager
def called_directly(owner: Owner | None) -> Iterator[None]:
    """Within it, lowering a call of ``owner`` raises ``Marked`` if it has lazy outputs."""
    previous, _calls.owner = _calls.owner, owner
    try:
        yield
    finally:
        _calls.owner = previous


def _lower(ctx: Any, *args: Any, call_jaxpr: Jaxpr, recorder: Recorder) -> Any:
    if recorder.owner is _calls.owner and recorder.owner.has_lazy:
        raise Marked
    trace = _compile(ctx, call_jaxpr, recorder)
    if trace is not None:
        recorder.record(trace)
    jaxpr = call_jaxpr if trace is None else trace.lowered
    consts = [
        mlir.ir_constant(c, const_lowering=ctx.const_lowering, aval=v.aval)
        for c, v in zip(jaxpr.consts, jaxpr.constvars, strict=True)
    ]
    # In place rather than as a function, so that profiles show the scopes of the user's program.
    results, tokens = mlir.jaxpr_subcomp(
        ctx.module_context,
        jaxpr,
        ctx.name_stack,
        ctx.tokens_in,
        consts,
        *args,
        dim_var_values=ctx.dim_var_values,
        const_lowering=ctx.const_lowering,
        outer_traceback=ctx.traceback,
    )
    ctx.set_tokens_out(tokens)
    return results


mlir.register_lowering(jevt_call_p, _lower, cacheable=False)


def _compile(ctx: Any, jaxpr: Jaxpr, recorder: Recorder) -> Trace | None:
    """The pipeline's trace, or None where the program has to be lowered as it is."""
    owner, module = recorder.owner, ctx.module_context
    # A program for several platforms has one such variable: which of them it runs on.
    if len(module.shape_poly_state.dim_vars) > (len(module.platforms) > 1):
        reason = (
            f"{owner.name} has symbolic sizes (jax.export), and nothing can be planned without"
            " sizes. It runs as under jax.jit; export it for given sizes to have it compiled."
        )
        if owner.options.strict:
            raise pipeline.StrictError(f"jevt.jit(strict=True): {reason}")
        warnings.warn(reason, JevtWarning, stacklevel=2)
        return None
    context = pipeline.make_context(
        owner.options,
        platforms=module.platforms,
        donated=tuple(v in recorder.donated for v in jaxpr.invars),
        partitioned=_is_partitioned(module.axis_context),
    )
    try:
        return pipeline.compile(
            jaxpr,
            context,
            name=owner.name,
            environment=owner.options.environment,
            lazy=recorder.lazy,
        )
    except pipeline.StrictError:
        raise
    except Exception as error:  # a defect of jevt must not break the program
        if owner.options.strict:
            raise
        warnings.warn(
            f"jevt could not compile {owner.name}; it runs as under jax.jit."
            " jevt.jit(strict=True) shows the whole traceback of the error:"
            f" {type(error).__name__}: {error}",
            JevtWarning,
            stacklevel=2,
        )
        return None


def _is_partitioned(axis_context: Any) -> bool:
    """Whether XLA will split this program over devices by itself, outside of manual axes."""
    if isinstance(axis_context, mlir.SPMDAxisContext):
        manual = axis_context.manual_axes
        return math.prod(n for axis, n in axis_context.mesh.shape.items() if axis not in manual) > 1
    if isinstance(axis_context, mlir.ShardingContext):
        return axis_context.num_devices > 1
    return False
