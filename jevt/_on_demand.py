"""Calling a step whose outputs are wanted on demand.

``jevt.jit`` keeps two ``jax.jit`` objects of a step: *complete*, which computes all outputs, and
*reduced*, which leaves out what ``jevt.lazy`` marks. The complete one serves transformations,
enclosing programs, ahead-of-time compilation, ``jevt.compute_lazy``, and every step without marks.
Whether a step has marks is known when it has been traced, which is what the complete one's slow
path does; so a direct call starts there, and is left (``Marked``) before anything is compiled.

    call ─▶ C++ ─▶ compiled program                                   no marks, called before
              └──▶ OnDemand.slow_path ─▶ complete                     no marks, or all is wanted now
                                 └─────▶ reduced ─▶ LazyArray(s)      marks
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Var
from jax.interpreters import partial_eval

from jevt import _call, _lazy, tracing
from jevt import _jax_internals as internals
from jevt._lazy_array import Deferred, LazyArray
from jevt.passes import lazy_outputs


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Rest:
    """What the reduced program of one signature does not compute. A pytree without leaves.

    Attributes:
      out_tree: structure of the step's result.
      positions: of the lazy outputs in it, ascending.
      avals: their types.
      names: of them, for messages.
      program: computes them, of ``inputs``.
      inputs: positions of the operands of ``program`` among the leaves of the call's arguments.
      input_names: names of these.
      step: name of the step.
    """

    out_tree: Any
    positions: tuple[int, ...]
    avals: tuple[ShapedArray, ...]
    names: tuple[str, ...]
    program: Callable[..., Sequence[jax.Array]]
    inputs: tuple[int, ...]
    input_names: tuple[str, ...]
    step: str

    def result(self, computed: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """The step's result: what it computed, and lazy outputs that refer to its inputs."""
        outputs = list(computed)
        if self.positions:
            deferred = Deferred(self.program, [leaves[i] for i in self.inputs], self.describe)
            for i, position in enumerate(self.positions):
                lazy = LazyArray(deferred, i, self.avals[i], self.names[i])
                outputs.insert(position, lazy)
        return jax.tree.unflatten(self.out_tree, outputs)

    def describe(self, deleted: Sequence[int]) -> str:
        """Message of a ``DonatedInputError``."""
        first = self.input_names[deleted[0]]
        others = f" and {len(deleted) - 1} more of its inputs" if len(deleted) > 1 else ""
        argument = first.split(".")[0].split("[")[0]
        return (
            f"jevt: {', '.join(self.names)} of {self.step} was left to be computed on demand, by"
            f" jevt.lazy. Reading it for the first time expected the inputs of the call, but"
            f" {first}{others} has been deleted since, as a donated input is. Either\n"
            f"  1. compute it with the step when you are going to read it:"
            f" `with jevt.compute_lazy(): ... = {self.step}(...)` or"
            f" `{self.step}.compute_lazy(...)`; or\n"
            f"  2. read it before the input is deleted, that is, do not donate {argument!r}"
            f" (donate_argnums, donate_argnames); or\n"
            f"  3. mark fewer outputs: without jevt.lazy it is always computed."
        )


class OnDemand:
    """The calls of one step.

    Args:
      fun: the user's function.
      complete: the ``jax.jit`` object that computes everything.
      owner: of the step.
      options: of ``jax.jit``.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        complete: Any,
        owner: _call.Owner,
        options: Mapping[str, Any],
    ) -> None:
        self._fun = fun
        self._complete = complete
        self._miss = internals.cache_miss(complete)
        self._owner = owner
        self._options = options
        self._static = internals.static_arguments(complete)

        @functools.wraps(fun, updated=())
        def reduced(*args: Any, **kwargs: Any) -> Any:
            return self._reduce(*args, **kwargs)

        reduced.__name__ = owner.name
        if "out_shardings" in options:
            options = {**options, "out_shardings": (options["out_shardings"], None)}
        self.reduced = _jit(reduced, options)

    def slow_path(self, *args: Any, **kwargs: Any) -> Any:
        """What C++ calls when it has no program for these arguments; always, if there are marks.

        See ``jevt._jax_internals.with_slow_path``.
        """
        if not internals.is_called_directly():
            return self._miss(*args, **kwargs)
        if not self._owner.has_lazy:
            try:
                with _call.called_directly(None if _lazy.is_computing() else self._owner):
                    result = self._miss(*args, **kwargs)
            except _call.Marked:
                pass
            else:
                # C++ must not give this result to calls that do not want all outputs.
                return internals.not_cached(result[0]) if self._owner.has_lazy else result
        call = self._complete if _lazy.is_computing() else self._call
        return internals.not_cached(call(*args, **kwargs))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves(self._dynamic(args, kwargs))
        if any(isinstance(x, (np.ndarray, LazyArray)) for x in leaves):
            args, kwargs = self._map_dynamic(_fixed, args, kwargs)
            leaves = jax.tree.leaves(self._dynamic(args, kwargs))
        computed, rest = self.reduced(*args, **kwargs)
        return rest.result(jax.tree.leaves(computed), leaves)

    def _dynamic(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments that are not static."""
        nums, names = self._static
        if nums or names:
            args = tuple(x for i, x in enumerate(args) if i not in nums)
            kwargs = {k: x for k, x in kwargs.items() if k not in names}
        return args, kwargs

    def _map_dynamic(
        self, function: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nums, names = self._static
        return (
            tuple(x if i in nums else jax.tree.map(function, x) for i, x in enumerate(args)),
            {k: x if k in names else jax.tree.map(function, x) for k, x in kwargs.items()},
        )

    def _reduce(self, *args: Any, **kwargs: Any) -> Any:
        """What ``reduced`` is traced from: the result, None for lazy outputs, and a ``Rest``."""
        if tracing.is_nan_hunt(args, kwargs):
            return self._fun(*args, **kwargs)
        whole = self._complete.trace(*args, **kwargs)
        (call,) = (e for e in whole.jaxpr.eqns if e.primitive is _call.jevt_call_p)
        split = lazy_outputs.split(call.params["call_jaxpr"])
        names = _paths(whole.out_tree)
        for i, eqn in split.effectful.items():
            message = _warning(names[i], self._owner.name, eqn)
            warnings.warn(message, _call.JevtWarning, stacklevel=2)

        leaves = jax.tree.leaves(self._dynamic(args, kwargs))
        values = dict(zip(whole.jaxpr.invars, leaves, strict=True))
        values |= zip(whole.jaxpr.constvars, whole.jaxpr.consts, strict=True)
        operands = [values[a] if isinstance(a, Var) else a.val for a in call.invars]
        lazy = tuple(names[i] for i in split.lazy)
        outputs = _call.jevt_call_p.bind(
            *split.step.consts,
            *operands,
            call_jaxpr=split.step.with_consts(()),
            recorder=_call.Recorder(self._owner, call.params["recorder"].donated, lazy),
        )
        rest = self._rest(split, lazy, [*split.rest.consts, *operands], leaves, whole)
        for i in split.lazy:
            outputs.insert(i, None)
        return jax.tree.unflatten(whole.out_tree, outputs), rest

    def _rest(
        self,
        split: lazy_outputs.Split,
        names: tuple[str, ...],
        operands: Sequence[Any],
        leaves: Sequence[Any],
        whole: jax.stages.Traced,
    ) -> Rest:
        """The second program of a signature.

        Args:
          split: of the step.
          names: of the lazy outputs.
          operands: of ``split.rest``; leaves of the arguments, and what is known.
          leaves: of the arguments.
          whole: the complete program, traced.
        """
        jaxpr, needed = partial_eval.dce_jaxpr(
            split.rest.with_consts(()), [True] * len(split.lazy), instantiate=False
        )
        position = {id(leaf): i for i, leaf in enumerate(leaves)}
        slots = [(position.get(id(x)), x) for x, n in zip(operands, needed, strict=True) if n]
        inputs = [i for i, _ in slots if i is not None]
        known = [None if i is not None else x for i, x in slots]
        recorder = _call.Recorder(_call.Owner(f"{self._owner.name}.lazy", self._owner.options))

        def rest(*arguments: Any) -> tuple[Any, ...]:
            given = iter(arguments)
            values = [next(given) if x is None else x for x in known]
            return tuple(_call.jevt_call_p.bind(*values, call_jaxpr=jaxpr, recorder=recorder))

        rest.__name__ = f"{self._owner.name}_lazy"
        options = {k: v for k, v in self._options.items() if k in ("device", "compiler_options")}
        if options.get("device") is None:
            in_shardings, out_shardings = internals.placement(whole)
            options["in_shardings"] = tuple(in_shardings[i] for i in inputs)
            options["out_shardings"] = tuple(out_shardings[i] for i in split.lazy)
        program = _jit(rest, options)
        x64 = jax.config.jax_enable_x64

        def run(*arguments: Any) -> Sequence[jax.Array]:
            with jax.enable_x64(x64):
                results: Sequence[jax.Array] = program(*arguments)
            return results

        argument_names = internals.argument_names(whole.jaxpr)
        return Rest(
            out_tree=whole.out_tree,
            positions=split.lazy,
            avals=tuple(jaxpr.out_avals),
            names=names,
            program=run,
            inputs=tuple(inputs),
            input_names=tuple(argument_names[i] for i in inputs),
            step=self._owner.name,
        )


def _jit(function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """``jax.jit`` with options about which it has said what it has to, when it got them first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax.jit(function, **options)


def _fixed(x: Any) -> Any:
    """An argument that nobody can change any more, as NumPy's arrays can be."""
    if isinstance(x, LazyArray):
        return x.value
    if not isinstance(x, np.ndarray) or x.dtype.kind in "OSTUMm":  # jax.jit rejects these
        return x
    # A program of several processes takes arrays of the host, but none of one process's devices.
    return jnp.array(x) if jax.process_count() == 1 else x.copy()


def _paths(tree: Any) -> list[str]:
    """Names of the leaves of a result: "result[1]['loss']"."""
    paths, _ = jax.tree.flatten_with_path(jax.tree.unflatten(tree, range(tree.num_leaves)))
    return [f"result{jax.tree_util.keystr(path)}" for path, _ in paths]


def _warning(name: str, step: str, eqn: JaxprEqn) -> str:
    return (
        f"jevt.lazy: {name} of {step} is computed with the step. It depends on {eqn.primitive} at"
        f" {source_info_util.summarize(eqn.source_info)}, whose effect would happen again if it"
        " were computed later."
    )
