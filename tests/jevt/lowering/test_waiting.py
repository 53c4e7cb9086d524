"""Kernels that overwrite a weight wait for what reads it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jevt
from jevt.lowering import emit


def step(weight: Any, x: Any, dy: Any) -> Any:
    """A layer backward: the weight after an update, which comes first, and the input's gradient."""
    weight_gradient = jnp.einsum("bi,bo->io", x, dy)
    updated = weight - 0.125 * weight_gradient
    dx = dy @ weight.T
    return updated, dx


def operands(rows: int = 64, inputs: int = 1024, outputs: int = 1536) -> list[Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((inputs, outputs), (rows, inputs), (rows, outputs))
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def kernels(function: Any, *args: Any, donated: tuple[int, ...] = (0,)) -> tuple[list[Any], Any]:
    trace = jevt.jit(function, backend="triton", donate_argnums=donated).explain(*args)
    jaxpr = trace.stages[-1].jaxpr
    return [e for e in jaxpr.eqns if e.primitive is emit.kernel_p], jaxpr


def test_an_update_follows_the_other_reader() -> None:
    (dx, update), jaxpr = kernels(step, *operands())
    assert update.params["spec"].aliases and not dx.params["spec"].aliases
    assert update.invars[-1] is dx.outvars[0]
    assert len(update.params["spec"].inputs) == len(update.invars) == 4
    weight, x, dy = operands()
    got = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, weight, x, dy)
    for mine, theirs in zip(got, jax.jit(step)(weight, x, dy), strict=True):
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), np.asarray(theirs, np.float32), rtol=2e-2, atol=2e-1
        )


@pytest.mark.interpret
def test_values() -> None:
    weight, x, dy = operands()
    got = jevt.jit(step, backend="interpret", donate_argnums=0)(weight.copy(), x, dy)
    for mine, theirs in zip(got, jax.jit(step)(weight, x, dy), strict=True):
        a, b = (np.asarray(v, np.float32) for v in (mine, theirs))
        assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)


def test_what_is_kept_is_waited_for_by_nobody() -> None:
    update, dx = kernels(step, *operands(), donated=())[0]
    assert not update.params["spec"].aliases
    assert len(update.invars) == 3 and len(dx.invars) == 2


def test_small_weights_are_copied() -> None:
    for kernel in kernels(step, *operands(512, 256, 128))[0]:
        assert len(kernel.invars) <= 3


def test_a_reader_that_the_update_depends_on_is_not_waited_for() -> None:
    def forward_too(weight: Any, x: Any, scale: Any) -> Any:
        y = x @ weight
        return weight - 0.125 * jnp.einsum("bi,bo->io", x, y * scale)

    weight, x, dy = operands()
    for kernel in kernels(forward_too, weight, x, dy)[0]:
        made = {v for e in [kernel] for v in e.outvars}
        assert made.isdisjoint(kernel.invars)
        assert len(kernel.invars) == len({id(v) for v in kernel.invars})


def test_what_reads_the_update_stays_behind_it() -> None:
    def read_at_once(weight: Any, x: Any, dy: Any) -> Any:
        updated = weight - 0.125 * jnp.einsum("bi,bo->io", x, dy)
        return updated, (dy @ updated.T) @ weight

    args = operands()
    found, jaxpr = kernels(read_at_once, *args)
    defined = set(jaxpr.jaxpr.invars) | set(jaxpr.jaxpr.constvars)
    for eqn in jaxpr.eqns:
        assert all(v in defined for v in eqn.invars if hasattr(v, "count") or v in defined)
        defined |= set(eqn.outvars)
    assert not any(kernel.params["spec"].aliases for kernel in found)
