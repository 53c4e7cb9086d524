"""From a Python function to a jaxpr whose constants are operands.

Tracing is left to ``jax.jit`` itself, so that everything a user sees of it, from argument names in
errors to the handling of static arguments, is what he knows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr

from jevt import _jax_internals as internals


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced call.

    Attributes:
      jaxpr: without constants; its invars are ``operands``.
      operands: captured arrays, captured outer tracers, then the leaves of the arguments.
      donated: for each operand, whether its buffer may be overwritten.
      out_tree: structure of the result.
    """

    jaxpr: Jaxpr
    operands: tuple[Any, ...]
    donated: tuple[bool, ...]
    out_tree: Any


def trace(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Traced:
    """Traces ``fun(*args, **kwargs)`` once.

    Args:
      fun: the user's function.
      args: as an enclosing ``jax.jit`` passes them: static arguments as they are, all
        leaves of the others tracers.
      kwargs: likewise.
      options: ``jax.jit``'s ``static_*`` and ``donate_*`` options.
    """
    # A new callable for each call: jax.jit's cache of traces is keyed by it, and the enclosing jit
    # already has the one that `clear_cache` and a changed shape must see.
    traced = jax.jit(functools.partial(fun), **options).trace(*args, **kwargs)
    leaves = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, jax.core.Tracer)]
    captured = [*traced.jaxpr.consts, *internals.captured(traced)]
    jaxpr = traced.jaxpr.with_consts(())
    if len(captured) + len(leaves) != len(jaxpr.invars):
        raise TypeError(
            f"jevt.jit({internals.program_name(jaxpr)}): expected"
            f" {len(jaxpr.invars) - len(captured)} arrays among the arguments, got {len(leaves)}."
            " A static argument must not contain tracers: pass it as an ordinary argument instead."
        )
    donated = [leaf.donated for leaf in jax.tree.leaves(traced.args_info, is_leaf=_is_info)]
    return Traced(
        jaxpr=jaxpr,
        operands=(*captured, *leaves),
        donated=(*(False for _ in captured), *donated),
        out_tree=traced.out_tree,
    )


def is_nan_hunt(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``jax.jit`` runs the function unjitted, to find where a NaN comes from."""
    if not (jax.config.jax_debug_nans or jax.config.jax_debug_infs):
        return False
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs)))


def _is_info(x: object) -> bool:
    return hasattr(x, "donated")
