"""``jevt.lazy``: marks an output of a step as wanted on demand; ``compute_lazy`` wants it now.

The mark is a primitive that is the identity under every transformation and in every program.
Only ``jevt.jit`` gives it a meaning, to marks on the outputs of a step that is called directly:
see ``jevt/_on_demand.py``.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

lazy_p: Primitive = Primitive("lazy")
lazy_p.def_impl(lambda x: x)
lazy_p.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(lazy_p, lambda ctx, x: [x])
batching.defvectorized(lazy_p)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    # A derivative is not what was marked.
    return lazy_p.bind(*primals), tangents[0]


ad.primitive_jvps[lazy_p] = _jvp

_computing = contextvars.ContextVar("jevt.compute_lazy", default=False)


def lazy[T](x: T) -> T:
    """Marks a value that a step returns as wanted on demand; otherwise the identity.

    A step under ``@jevt.jit`` does not compute what only its marked outputs need: a loss, for
    example, whose gradient does not need its value. The caller gets a ``jevt.LazyArray`` in the
    place of each, which runs a second program when it is read for the first time, from the step's
    inputs. Until then it keeps those of them alive that it needs; inputs that are NumPy arrays are
    copied, as they can be overwritten. What the step computes for another reason too is returned as
    an array, as ever; and, with a warning, what depends on a callback or a mutable array.

    Under ``jax.jit``, under transformations, eagerly, in programs that are compiled ahead of time
    (``.lower``, ``.trace``), and in a step that is called inside another jitted function (unless
    that is a ``jevt.jit`` which returns the value), it is the identity. So it is for a value that
    is not returned as it is: of ``{"loss": 2 * jevt.lazy(loss)}`` the product is computed, and so
    is what the body of a loop, a branch or a ``shard_map`` marks. Mark last: what the step returns.

    Args:
      x: a pytree of arrays.

    Returns:
      ``x``, marked.

    Example::

        @jevt.jit
        def train_step(state, batch):
            loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
            return state.apply_gradients(grads=grads), {"loss": jevt.lazy(loss)}
    """
    # What is no tracer is known: there is nothing to put off.
    return cast(T, jax.tree.map(lambda a: lazy_p.bind(a) if isinstance(a, Tracer) else a, x))


@contextlib.contextmanager
def compute_lazy(enabled: bool = True) -> Iterator[None]:
    """Within it, steps compute their lazy outputs in the same program and return arrays.

    For the calls whose lazy outputs will be read, above all where the inputs are donated, so that
    they cannot be computed any more afterwards::

        with jevt.compute_lazy(i % 100 == 0):
            state, loss = train_step(state, batch)

    ``train_step.compute_lazy(state, batch)`` is the same for one call.

    Args:
      enabled: False leaves lazy outputs lazy.

    Raises:
      TypeError: ``enabled`` is not a bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"jevt.compute_lazy expects True or False, got {enabled!r}.")
    token = _computing.set(enabled)
    try:
        yield
    finally:
        _computing.reset(token)


def is_computing() -> bool:
    """Whether lazy outputs are to be computed with the step."""
    return _computing.get()
