"""The only file that touches private parts of JAX, jax-triton and Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax._src import core as _core
from jax.extend.core import Jaxpr, JaxprEqn, Var


def make_jaxpr(invars: Sequence[Var], outvars: Sequence[Any], eqns: Sequence[JaxprEqn]) -> Jaxpr:
    """A jaxpr without constants, its effects joined from its equations."""
    effects = _core.join_effects(*(eqn.effects for eqn in eqns))
    debug = _core.lu._missing_debug_info("jevt")
    return Jaxpr([], list(invars), list(outvars), list(eqns), effects, debug_info=debug)
