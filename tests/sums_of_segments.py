"""What tests of sums of segments share: graphs, the passes with no lower limit, comparisons."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np

from jevt.passes import (
    canonicalize,
    cse,
    dce,
    fold_constants,
    hoist_orders,
    inline,
    row_products,
    segment_sums,
    sparse_products,
)

# Compiled fast rather than well.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

NODES, EDGES, FEATURES = 30, 200, 6


def draw(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def ends(shape=(EDGES,), low=0, high=NODES, dtype=jnp.int32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape), dtype)


def rewritten(jaxpr):
    """The jaxpr after the passes that put in kernels, and their notes."""
    notes = []
    jaxpr = fold_constants.run(cse.run(dce.run(inline.run(jaxpr))))
    jaxpr = dce.run(cse.run(canonicalize.run(jaxpr)))
    jaxpr = cse.run(sparse_products.run(jaxpr, notes.append))
    jaxpr = segment_sums.run(jaxpr, 90, notes.append, smallest=1)
    return dce.run(cse.run(hoist_orders.run(row_products.run(jaxpr, 90, smallest=1)))), notes


def with_gradients(function):
    """``function`` of arrays, and its gradients with respect to those of floating point."""

    def both(*args):
        floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in args]

        def of_floating(*values):
            values = iter(values)
            return function(
                *(next(values) if f else a for f, a in zip(floating, args, strict=True))
            )

        out, pull = jax.vjp(of_floating, *(a for f, a in zip(floating, args, strict=True) if f))
        return (out, *pull(jnp.cos(out)))

    return both


def check(function, *args, tolerance=1e-5):
    """Values and gradients are those under ``jax.jit``; counts of the primitives, and the notes."""
    both = with_gradients(function)
    jaxpr, notes = rewritten(jax.make_jaxpr(both)(*args))
    # One by one: equations of the same shapes are compiled once for all tests.
    got = jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)
    want = jax.jit(both, compiler_options=_QUICK)(*args)
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        scale = float(np.abs(np.asarray(w, np.float64)).max(initial=1e-30))
        np.testing.assert_allclose(
            np.asarray(g, np.float64), np.asarray(w, np.float64), rtol=0, atol=tolerance * scale
        )
    return collections.Counter(eqn.primitive.name for eqn in jaxpr.eqns), jaxpr, notes


def largest_made(jaxpr):
    """The most elements of floating point that an equation makes for each edge and feature."""
    return max(
        eqn.outvars[0].aval.size
        for eqn in jaxpr.eqns
        if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    )
