"""The only file of ``jevt`` that touches private parts of JAX.

(``jevt_kernels/compat.py`` is the one of the kernel library.) Everything here exists under the
same name in JAX 0.11 and 0.12.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax._src import (
    ad_checkpoint,
    callback,
    checkify,
    config,
    core,
    custom_batching,
    custom_derivatives,
    dtypes,
    flattree,
    named_sharding,
    pjit,
    shard_map,
    tree_util,
)
from jax._src import effects as _effects
from jax._src.api import Inline
from jax._src.array import ArrayImpl as ArrayImpl
from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax._src.interpreters import pxla
from jax._src.lax import control_flow, parallel
from jax._src.lib import cuda_versions
from jax._src.random import prng
from jax.extend.core import Jaxpr, JaxprEqn, Primitive, primitives
from jax.extend.random import threefry_prng_impl
from jax.sharding import NamedSharding, PartitionSpec

remat_p: Primitive = ad_checkpoint.remat_p
custom_vmap_call_p: Primitive = custom_batching.custom_vmap_p
remat_opt_p: Primitive = custom_derivatives.remat_opt_p
shard_map_p: Primitive = shard_map.shard_map_p
pvary_p: Primitive = core.pvary_p
random_wrap_p: Primitive = prng.random_wrap_p
random_unwrap_p: Primitive = prng.random_unwrap_p
iota_2x32_shape_p: Primitive = prng.iota_2x32_shape_p
pure_callback_p: Primitive = callback.pure_callback_p
platform_index_p: Primitive = control_flow.platform_index_p

#: What JAX's own tracing puts into programs of many devices, under names that it does not export.
distribution: frozenset[Primitive] = frozenset(
    {core.pvary_p, core.reduced_vary_cast_p, pjit.reshard_p}
).union(
    value
    for name, value in vars(parallel).items()
    if name.endswith("_p") and isinstance(value, Primitive)
)

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


def scan_operands(eqn: JaxprEqn) -> tuple[int, int, int]:
    """Numbers of a ``scan``'s operands: constants, what is carried, and inputs by step."""
    constants, carry, inputs = (len(list(part)) for part in eqn.params["ft_in"].unpack())
    return constants, carry, inputs


def scan_like(
    eqn: JaxprEqn,
    body: Jaxpr,
    operands: Sequence[Any],
    counts: tuple[int, int, int],
    outvars: Sequence[Any],
) -> JaxprEqn:
    """A ``scan`` as ``eqn``, with another body, operands and results.

    Args:
      eqn: gives everything else.
      body: of constants, carry and inputs to carry and outputs.
      operands: constants, carry and inputs.
      counts: how many of each.
      outvars: carry and outputs.
    """
    constants, carry, inputs = map(flattree.nones, counts)
    outputs = flattree.nones(len(outvars) - counts[1])
    params = {
        **eqn.params,
        "jaxpr": body,
        "ft_in": flattree.pack((constants, carry, inputs)),
        "ft_out": flattree.pack((carry, outputs)),
    }
    return eqn.replace(invars=list(operands), outvars=list(outvars), params=params)


def touches_refs(eqns: Iterable[JaxprEqn]) -> bool:
    """Whether an equation reads or writes a mutable reference, which must not be renamed."""
    return any(isinstance(e, _effects.JaxprInputEffect) for eqn in eqns for e in eqn.effects)


def is_threefry(key_aval: Any) -> bool:
    """Whether an array of keys belongs to JAX's default generator."""
    return key_aval.dtype._impl is threefry_prng_impl  # noqa: SLF001


def manual_axes_of(aval: Any) -> frozenset[Any]:
    """Mesh axes over which a value varies inside ``shard_map``."""
    return frozenset(aval.manual_axis_type.vur)


def keeping_manual_axes() -> Any:
    """A context in which types of results say over which mesh axes they vary, as operands do."""
    return config._check_vma(True)  # noqa: SLF001


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


def argument_names(jaxpr: Jaxpr) -> tuple[str, ...]:
    """Names of the inputs of a traced function: "state['w']"."""
    names: tuple[str, ...] = jaxpr.debug_info.safe_arg_names(len(jaxpr.invars))
    return tuple(name or f"input {i}" for i, name in enumerate(names))


def is_called_directly() -> bool:
    """Whether what is called now runs now: nothing is being traced, transformed or batched."""
    return core.trace_state_clean()


def placement(traced: Any) -> tuple[list[Any], list[Any]]:
    """Shardings that ``jax.jit``'s options demand, for the flat inputs and outputs; None: any."""
    params = traced._params  # noqa: SLF001
    return _given(params["in_shardings"]), _given(params["out_shardings"])


def static_arguments(jitted: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of the static arguments of a ``jax.jit`` object."""
    info = jitted._jit_info  # noqa: SLF001
    return frozenset(info.static_argnums), frozenset(info.static_argnames)


def _given(shardings: Iterable[Any]) -> list[Any]:
    return [None if s is named_sharding.UNSPECIFIED else s for s in shardings]


def with_slow_path(jitted: Any, slow_path: Callable[..., Any]) -> Any:
    """A twin of a ``jax.jit`` object: what its C++ has no compiled program for goes elsewhere.

    Args:
      jitted: what ``jax.jit`` returned.
      slow_path: called with the arguments, as ``jitted._cache_miss`` is. Returns that function's
        result, with which C++ answers later calls of the signature by itself, or ``not_cached`` of
        a value.
    """

    @functools.wraps(jitted, updated=())
    def function(*args: Any, **kwargs: Any) -> Any:  # called under `jax.disable_jit`
        return jitted(*args, **kwargs)

    # Programs are cached by function: it must be another one than that of `jitted`.
    state = {**jitted.__getstate__(), "fun": function, "cache_miss": slow_path}
    cls: Any = type(jitted)
    twin = cls.__new__(cls)
    twin.__setstate__(state)
    twin.__dict__.update(jitted.__dict__)
    twin.__dict__["_jevt_function"] = function  # C++ refers to it weakly
    return twin


def cache_miss(jitted: Any) -> Callable[..., Any]:
    """What C++ calls when it has no compiled program for the arguments of a ``jax.jit`` object."""
    miss: Callable[..., Any] = jitted._cache_miss  # noqa: SLF001
    return miss


def not_cached(value: Any) -> tuple[Any, None, bool]:
    """Result of a cache miss that the next call with the signature is to be again."""
    return value, None, False


def register_array_like(cls: type, read: Callable[[Any], Any]) -> None:
    """Makes JAX's functions accept objects of ``cls``, which has an ``aval``, as arrays.

    Args:
      cls: a leaf of pytrees.
      read: returns the array.
    """

    def shard(xs: Any, shardings: Any, layouts: Any, copy_semantics: Any) -> Any:
        return pxla.shard_args(shardings, layouts, copy_semantics, [read(x) for x in xs])

    core.pytype_aval_mappings[cls] = lambda x: x.aval
    dtypes.register_canonicalize_value_handler(cls, read)
    pxla.shard_arg_handlers[cls] = shard
    tree_util.dispatch_registry.register_node(
        cls, lambda x: ((read(x),), None), lambda _, children: children[0]
    )


def cudnn_version() -> int | None:
    """Version of the cuDNN that JAX runs, major * 10000 + minor * 100 + patch; None without one."""
    if cuda_versions is None:
        return None
    try:
        return int(cuda_versions.cudnn_get_version())
    except RuntimeError:  # the plugin is here, the library is not
        return None


def cudnn_attention(
    q: Any, k: Any, v: Any, *bias: Any, scale: float, causal: bool, layout: str
) -> Any:
    """cuDNN's fused attention: out, and the logsumexp of the scores ``[B, N, T]``."""
    params = _cudnn_params(scale, causal, layout, bool(bias))
    operands = (q, k, v, *_cudnn_extras(q, bias))
    return fused_attention._dot_product_attention_fwd_p.bind(  # noqa: SLF001
        *operands, **params, is_training=True
    )


def cudnn_attention_backward(
    q: Any, k: Any, v: Any, *rest: Any, scale: float, causal: bool, layout: str
) -> Any:
    """Its gradients: d_q, d_k and d_v from ``(q, k, v, [bias], out, statistics, d_out)``."""
    *bias, out, statistics, d_out = rest
    params = _cudnn_params(scale, causal, layout, bool(bias))
    operands = (q, k, v, *_cudnn_extras(q, bias), statistics, out, d_out)
    return fused_attention._dot_product_attention_bwd_p.bind(*operands, **params)  # noqa: SLF001


# What JAX 0.12 asks besides: a function of the scores.
_NO_SCORE_MODIFICATION: dict[str, Any] = dict.fromkeys(
    {"score_mod_name", "score_mod_jaxpr"}.intersection(
        inspect.signature(fused_attention._dot_product_attention_fwd_cuda_lowering).parameters  # noqa: SLF001
    )
)


def _cudnn_params(scale: float, causal: bool, layout: str, biased: bool) -> dict[str, Any]:
    masks = fused_attention.MaskType
    return {
        "scale": scale,
        "seed": 42,  # of dropout, at rate 0
        "dropout_rate": 0.0,
        "variadic_args": (biased, False),  # a bias, and its gradient
        "mask_type": masks.CAUSAL if causal else masks.NO_MASK,
        "layout": fused_attention.AttentionLayout[layout].value,
        "sliding_window_length": None,
        **_NO_SCORE_MODIFICATION,
    }


def _cudnn_extras(q: Any, bias: Sequence[Any]) -> tuple[Any, ...]:
    """Bias, lengths and offsets of sequences (of queries and of keys), page tables (of k, of v)."""
    unused = jnp.zeros(0, q.dtype)
    return (*(bias or (unused,)), *(unused,) * 6)
