"""The only file of ``jevt`` that touches private parts of JAX.

(``jevt_kernels/compat.py`` is the one of the kernel library.) Everything here exists under the
same name in JAX 0.11 and 0.12.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jax._src import (
    ad_checkpoint,
    checkify,
    core,
    custom_batching,
    custom_derivatives,
    named_sharding,
    shard_map,
)
from jax._src import effects as _effects
from jax._src.api import Inline
from jax._src.random import prng
from jax.extend.core import Jaxpr, JaxprEqn, Primitive, primitives
from jax.extend.random import threefry_prng_impl
from jax.sharding import NamedSharding, PartitionSpec

remat_p: Primitive = ad_checkpoint.remat_p
custom_vmap_call_p: Primitive = custom_batching.custom_vmap_p
remat_opt_p: Primitive = custom_derivatives.remat_opt_p
shard_map_p: Primitive = shard_map.shard_map_p
random_wrap_p: Primitive = prng.random_wrap_p
random_unwrap_p: Primitive = prng.random_unwrap_p
iota_2x32_shape_p: Primitive = prng.iota_2x32_shape_p

# What a nested ``jax.jit`` must not say if its equations are to run as part of their caller.
_KEPT_BY_XLA = (Inline.XLA_EARLY, Inline.XLA_LATE)


def check_as_a_call(primitive: Primitive) -> None:
    """Makes ``checkify`` treat a primitive with a ``call_jaxpr`` as JAX's own call."""

    def rule(*args: Any, call_jaxpr: Jaxpr, **_: Any) -> Any:
        return checkify.error_checks[primitives.closed_call_p](*args, call_jaxpr=call_jaxpr)

    checkify.error_checks[primitive] = rule


def captured(traced: Any) -> list[Any]:
    """The outer tracers that a traced function closed over: leading operands of its jaxpr."""
    return list(traced._consts)  # noqa: SLF001


def is_plain_jit(eqn: JaxprEqn) -> bool:
    """Whether a ``jit`` equation is just its jaxpr: no shardings, layouts, compiler options."""
    params = eqn.params
    return (
        all(s is named_sharding.UNSPECIFIED for s in params["in_shardings"])
        and all(s is named_sharding.UNSPECIFIED for s in params["out_shardings"])
        and all(layout is None for layout in params["in_layouts"])
        and all(layout is None for layout in params["out_layouts"])
        and not params["compiler_options_kvs"]
        and params["inline"] not in _KEPT_BY_XLA
    )


def touches_refs(eqns: Iterable[JaxprEqn]) -> bool:
    """Whether an equation reads or writes a mutable reference, which must not be renamed."""
    return any(isinstance(e, _effects.JaxprInputEffect) for eqn in eqns for e in eqn.effects)


def is_threefry(key_aval: Any) -> bool:
    """Whether an array of keys belongs to JAX's default generator."""
    return key_aval.dtype._impl is threefry_prng_impl  # noqa: SLF001


def manual_axes_of(aval: Any) -> frozenset[Any]:
    """Mesh axes over which a value varies inside ``shard_map``."""
    return frozenset(aval.manual_axis_type.vur)


def program_name(jaxpr: Jaxpr) -> str:
    """Name of the Python function that a jaxpr was traced from."""
    name: str = jaxpr.debug_info.func_name
    return name


def array_like(aval: Any, shape: tuple[int, ...], dtype: Any) -> core.ShapedArray:
    """A type of this shape that lives where ``aval`` does: varying over the same mesh axes."""
    if aval.manual_axis_type.empty:
        return core.ShapedArray(shape, dtype)
    place = NamedSharding(aval.sharding.mesh, PartitionSpec())
    varying = core.ManualAxisType(varying=aval.manual_axis_type.varying)
    return core.ShapedArray(shape, dtype, sharding=place, manual_axis_type=varying)
