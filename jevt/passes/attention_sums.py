"""Sums of attention's gradients over all tokens come out of the gradients' kernel. For GPUs.

Purpose: where queries, keys and values had biases added, their gradients are the sums of d_q, d_k
and d_v over batch and tokens, for which a kernel reads all three once more. Our kernel of the
backward pass has them at hand (:mod:`jevt_kernels.attention_backward`)::

    Σ d_q, Σ d_v = attention_backward[sums=True]
    Σ d_k ≈ Σ d_q − Σ d_q           0, but NaN where Σ d_q is NaN or infinite

The sum of d_k is 0 because the gradients of a query's scores add up to 0, as its probabilities add
up to 1: a bias of all keys changes no probability. What a program computes of it is rounding.

Invariant: sums of values that are rounded less, in float32, and rounded once. Sums are replaced
that are over batch and tokens exactly, of the gradients or of views of them, in their own type or
in float32, where the backward pass is our kernel. Sums over some tokens, over heads too, and of
products with the gradients stay.

    before  { lambda ; a:bf16[64,256,8,64] …. let
                g:bf16[64,256,8,64] h:bf16[64,256,8,64] i:bf16[64,256,8,64] =
                    attention_backward[capability=90 …] a b c d e f
                j:bf16[64,256,512] = reshape g; k:bf16[512] = reduce_sum[axes=(0, 1)] j
                in (g, h, i, k) }
    after   { lambda ; a:bf16[64,256,8,64] …. let
                g:bf16[64,256,8,64] h:bf16[64,256,8,64] i:bf16[64,256,8,64] l:f32[8,64] m:f32[8,64]
                    = attention_backward[capability=90 sums=True …] a b c d e f
                n:bf16[8,64] = convert_element_type l; k:bf16[512] = reshape n
                in (g, h, i, k) }
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._context import Context
from jevt._jaxpr import Atom, aval
from jevt.lowering.axes import Axes, Factor, flat, fresh
from jevt.lowering.errors import NotFusible
from jevt.passes._facts import shape_of
from jevt.passes._ranges import factors_of, is_view, seen, unsplit
from jevt.passes._readers import Readers
from jevt.passes._replace import Replacements, replace
from jevt.passes._rewrite import substitute
from jevt.passes._rules import Abandon, Graph, check_same_mesh
from jevt.primitives import attention_kernel
from jevt.primitives.attention import Shape, attention_backward_p

_FLOAT = np.dtype("float32")


def run(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """Takes sums of attention's gradients from its kernel, in ``jaxpr`` and in its bodies."""
    return replace(jaxpr, context, _replacements)


def _replacements(jaxpr: Jaxpr, context: Context, outermost: bool) -> Replacements:
    del context, outermost
    readers = Readers(jaxpr)
    result: dict[Var, Callable[[Graph], Atom]] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive is not attention_backward_p or not _may_give_sums(eqn):
            continue
        sums = [s for number in range(3) for s in _sums(eqn, number, readers)]
        if sums:
            totals = _totals(eqn)
            result[eqn.outvars[0]] = functools.partial(_emit_with, totals, eqn)
            result |= {s.eqn.outvars[0]: functools.partial(s.emit, totals) for s in sums}
    return result


def _may_give_sums(eqn: JaxprEqn) -> bool:
    """Whether a backward pass is a kernel that gives sums, and does not yet."""
    params = eqn.params
    if params.get("sums", False):
        return False
    try:
        check_same_mesh(eqn.invars)
    except Abandon:
        return False
    q, k, v, *rest = map(aval, eqn.invars)
    return attention_kernel.is_taken(
        (q, k, v, *rest),
        Shape.of(q, k, v, params["layout"]),
        causal=params["causal"],
        capability=params.get("capability", 0),
    )


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A sum of a gradient over batch and tokens.

    Attributes:
      eqn: the ``reduce_sum``.
      number: of the gradient: that of q, k or v.
      kept: what the gradient's axes of heads and width consist of.
      result: the axes of the sum, of the same factors.
    """

    eqn: JaxprEqn
    number: int
    kept: list[Factor]
    result: Axes

    def emit(self, totals: tuple[Var, Var], graph: Graph) -> Atom:
        """The sum, from those of d_q and d_v."""
        graph.place(self.eqn)
        out = aval(self.eqn.outvars[0])
        of_q, of_v = totals
        total: Atom = of_v if self.number == 2 else of_q
        if self.number == 1:
            total = graph.emit(p.sub_p, total, total)
        if out.dtype != _FLOAT:
            total = graph.emit(
                p.convert_element_type_p,
                total,
                new_dtype=out.dtype,
                weak_type=False,
                sharding=None,
            )
        order = flat(self.result)
        if order != self.kept:
            total = graph.reshape(total, [f.size for f in self.kept])
            permutation = tuple(self.kept.index(f) for f in order)
            total = graph.emit(p.transpose_p, total, permutation=permutation)
        return graph.reshape(total, out.shape)


def _sums(eqn: JaxprEqn, number: int, readers: Readers) -> Iterator[_Sum]:
    """The sums of a gradient over batch and tokens."""
    gradient = eqn.outvars[number]
    heads, tokens = (2, 1) if eqn.params["layout"] == "BTNH" else (1, 2)
    for views, reader in _ways(gradient, readers):
        first = axes = fresh(shape_of(gradient))
        try:
            for view in views:
                axes = seen(view, axes)
        except NotFusible:  # reshapes that cut axes differently
            continue
        first, axes = unsplit(first), unsplit(axes)
        reduced = reader.params["axes"]
        if set(factors_of(axes, reduced)) == set(factors_of(first, (0, tokens))):
            result = tuple(axis for d, axis in enumerate(axes) if d not in reduced)
            yield _Sum(reader, number, factors_of(first, (heads, 3)), result)


def _ways(gradient: Var, readers: Readers) -> Iterator[tuple[tuple[JaxprEqn, ...], JaxprEqn]]:
    """The views and casts to float32 on the way to a sum, and the sum."""
    stack: list[tuple[Var, tuple[JaxprEqn, ...]]] = [(gradient, ())]
    while stack:
        var, views = stack.pop()
        for reader in readers.of(var):
            if reader.primitive is p.reduce_sum_p:
                if reader.params["out_sharding"] is None:
                    yield views, reader
            elif is_view(reader) or _widens(reader):
                stack.append((reader.outvars[0], (*views, reader)))


def _widens(eqn: JaxprEqn) -> bool:
    return eqn.primitive is p.convert_element_type_p and eqn.params["new_dtype"] == _FLOAT


def _totals(eqn: JaxprEqn) -> tuple[Var, Var]:
    """Variables for the sums of d_q and d_v that a backward pass may give."""
    operands: list[Any] = [a.aval for a in eqn.invars]
    inside_mesh = any(not each.sharding.mesh.empty for each in operands)
    with eqn.ctx.manager if inside_mesh else contextlib.nullcontext():
        types, _ = attention_backward_p.abstract_eval(*operands, **eqn.params | {"sums": True})
    *_, of_q, of_v = types
    return Var(of_q), Var(of_v)


def _emit_with(totals: tuple[Var, Var], eqn: JaxprEqn, graph: Graph) -> Atom:
    """A backward pass with its sums; gives its first result."""
    eqn = substitute(graph.env, eqn)
    params = {**eqn.params, "sums": True}
    graph.add(eqn.replace(outvars=[*eqn.outvars, *totals], params=params))
    return eqn.outvars[0]
