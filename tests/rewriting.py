"""What the tests of graph passes share: running one, comparing values, and printing jaxprs."""

from __future__ import annotations

import collections
import itertools
import string
from collections.abc import Callable

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Literal

from jevt.passes import (
    canonicalize,
    cse,
    dce,
    eliminate_reductions,
    fold_constants,
    inline,
    one_hot,
)

# Zeros of both signs, infinities and NaN among plain numbers.
EDGES = np.array(
    [[0.0, -0.0, 1.0, -1.0], [np.inf, -np.inf, np.nan, 2.5], [-3.0, 1e30, -1e-30, 0.5]], np.float32
)

# The passes of this directory in the order of the pipeline.
ALGEBRA = (
    canonicalize.run,
    one_hot.run,
    eliminate_reductions.run,
    canonicalize.run,
    fold_constants.run,
    cse.run,
    dce.run,
)


# Programs that run once: most of their time would be spent in LLVM.
_QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}


def traced(fun: Callable, *args) -> Jaxpr:
    """The inlined jaxpr of ``fun``, without dead and repeated equations."""
    jaxpr = jax.make_jaxpr(fun)(*args)
    for graph_pass in (inline.run, dce.run, cse.run, fold_constants.run, dce.run):
        jaxpr = graph_pass(jaxpr)
    return jaxpr


def rewritten(passes, jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr after ``passes`` (or one), which must leave it well-typed and be idempotent."""
    passes = passes if isinstance(passes, tuple) else (passes,)
    result = jaxpr
    for graph_pass in passes:
        result = graph_pass(result)
        jax.extend.core.check_jaxpr(result)
        assert graph_pass(result) is result, f"{graph_pass.__module__} is not idempotent"
    assert result.in_avals == jaxpr.in_avals
    assert result.out_avals == jaxpr.out_avals
    return dce.run(cse.run(result))


def cleaned(graph_pass: Callable[[Jaxpr], Jaxpr], jaxpr: Jaxpr, *cleaning) -> Jaxpr:
    """The jaxpr after a pass and ``cleaning``, after which there is nothing left for the pass."""
    after = graph_pass(jaxpr)
    jax.extend.core.check_jaxpr(after)
    assert after.out_avals == jaxpr.out_avals
    for other in cleaning:
        after = other(after)
    assert graph_pass(after) is after
    return after


def largest(jaxpr: Jaxpr, size: Callable[[JaxprEqn], int]) -> int:
    """The largest size of an equation, bodies included."""
    found = [0, *map(size, jaxpr.eqns)]
    for eqn in jaxpr.eqns:
        found += [largest(body, size) for body in jax.extend.core.jaxprs_in_params(eqn.params)]
    return max(found)


def evaluate(jaxpr: Jaxpr, *args, compiled: bool = False):
    def fun(*args):
        return jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)

    if compiled:
        fun = jax.jit(fun, compiler_options=_QUICKLY_COMPILED)
    return fun(*jax.tree.leaves(args))


def same(got, want, *, signs: bool = True):
    """The same numbers; NaN where NaN is, and zeros of the same sign."""
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = a.astype(np.float64), b.astype(np.float64)
            if signs:
                numbers = ~np.isnan(b)
                np.testing.assert_array_equal(np.signbit(a[numbers]), np.signbit(b[numbers]))
        np.testing.assert_array_equal(a, b)


def near(got, want, tolerance: float = 1e-5, *, kinds: bool = True):
    """Equal up to ``tolerance`` times the largest element, and not finite where that is not.

    Args:
      kinds: whether infinities and NaN must be the same.
    """
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        if not jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b)
            continue
        if jnp.finfo(a.dtype).bits < 32:
            tolerance = 2e-2
        a, b = a.astype(np.float64), b.astype(np.float64)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        finite = np.isfinite(b)
        if kinds:
            np.testing.assert_array_equal(a[~finite], b[~finite])
        scale = max(np.abs(b[finite]).max(initial=0.0), 1e-20)
        np.testing.assert_allclose(a[finite], b[finite], rtol=0, atol=tolerance * scale)


def relative_norm(got, want) -> float:
    """The largest distance of two lists of arrays, in the norm and by it; NaN is infinitely far."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
        norm = np.linalg.norm(b)
        distance = float(np.linalg.norm(a - b) / norm) if norm else float(np.abs(a).max(initial=0))
        worst = max(worst, distance if np.isfinite(distance) else np.inf)
    return worst


def count(jaxpr: Jaxpr, name: str) -> int:
    """Equations of a primitive, bodies included."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple) else (value,):
                total += count(item, name) if isinstance(item, Jaxpr) else 0
    return total


def before_and_after(cases, passes) -> str:
    """The text of a golden file: each case before and after the passes."""
    sections = []
    for name, (fun, *args) in cases.items():
        jaxpr = traced(fun, *args)
        sections.append(
            f"{name}\n  before\n{text(jaxpr)}\n  after\n{text(rewritten(passes, jaxpr))}\n"
        )
    return "\n".join(sections)


# The parameters that are printed; others depend on JAX's version.
_PRINTED = (
    "axes",
    "broadcast_dimensions",
    "dimension",
    "new_dtype",
    "new_sizes",
    "permutation",
    "y",
)


def text(jaxpr: Jaxpr) -> str:
    """One line an equation, in few words."""
    letters = itertools.chain(
        string.ascii_lowercase, map("".join, itertools.product(string.ascii_lowercase, repeat=2))
    )
    names = collections.defaultdict(lambda: next(letters))

    def atom(a):
        return str(a.val) if isinstance(a, Literal) else names[a]

    def typed(v):
        return (
            "_" if isinstance(v, DropVar) else f"{names[v]}:{v.aval.str_short(short_dtypes=True)}"
        )

    lines = ["    in   " + " ".join(map(typed, jaxpr.invars))]
    for eqn in jaxpr.eqns:
        params = []
        for key in _PRINTED:
            value = eqn.params.get(key)
            if value is not None:
                params.append(
                    f"{key}={tuple(map(int, value)) if isinstance(value, tuple) else value}"
                )
        given = f"[{' '.join(params)}]" if params else ""
        results = " ".join(map(typed, eqn.outvars))
        lines.append(
            f"    {results} = {eqn.primitive}{given} {' '.join(map(atom, eqn.invars))}".rstrip()
        )
    lines.append("    out  " + " ".join(map(atom, jaxpr.outvars)))
    return "\n".join(lines)
