"""Sums of the gradients of an attention's keys over all tokens are 0.

Purpose: where queries, keys and values have biases, the biases' gradients are the sums of d_q, d_k
and d_v over batch and tokens. That of d_k is 0, as the gradients of a query's scores add up to 0: a
bias of all keys changes every score of a query by the same, and no probability. Nobody has to read
d_k for what is only rounding, and an optimizer that divides by its size does not walk with it.

Invariant: NaN where the sum of d_q over the same axes is NaN or infinite, as Σ d_k would be: the
sum is written as ``Σ d_q − Σ d_q``. So it is taken where the program adds up d_q in the same way,
through the same views and casts. Left alone are sums over some tokens, over heads, and attentions
whose keys have other numbers of tokens or heads than their queries.

    before  { lambda ; a:bf16[64,256,8,64] …. let
                g:bf16[64,256,8,64] h:bf16[64,256,8,64] i:bf16[64,256,8,64] = attention_backward …
                j:bf16[8,64] = reduce_sum[axes=(0, 1)] g; k:bf16[8,64] = reduce_sum[axes=(0, 1)] h
                in (g, h, i, j, k) }
    after   { lambda ; a:bf16[64,256,8,64] …. let
                g:bf16[64,256,8,64] h:bf16[64,256,8,64] i:bf16[64,256,8,64] = attention_backward …
                j:bf16[8,64] = reduce_sum[axes=(0, 1)] g; k:bf16[8,64] = sub j j
                in (g, h, i, j, k) }
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._context import Context
from jevt._jaxpr import Atom
from jevt.lowering.axes import fresh
from jevt.lowering.errors import NotFusible
from jevt.passes._facts import shape_of
from jevt.passes._ranges import factors_of, is_view, seen, unsplit
from jevt.passes._readers import Readers
from jevt.passes._replace import Replacements, replace
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph, on_same_mesh
from jevt.primitives.attention import attention_backward_p

_FLOAT = np.dtype("float32")


def run(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """Writes sums of keys' gradients as what they are, in ``jaxpr`` and in its bodies."""
    return replace(jaxpr, context, _replacements)


def _replacements(jaxpr: Jaxpr, context: Context, outermost: bool) -> Replacements:
    del context, outermost
    readers = Readers(jaxpr)
    result: dict[Var, Callable[[Graph], Atom]] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive is not attention_backward_p or not _are_alike(eqn):
            continue
        of_queries = {sum_.how for sum_ in _sums(eqn, 0, readers)}
        for sum_ in _sums(eqn, 1, readers):
            if sum_.how in of_queries:
                queries = eqn.outvars[0]
                result[sum_.chain[-1].outvars[0]] = functools.partial(sum_.nothing, queries)
    return result


def _are_alike(eqn: JaxprEqn) -> bool:
    """Whether the gradients of queries and keys are arrays of one shape, on one device."""
    d_q, d_k, _ = eqn.outvars
    return on_same_mesh(eqn.invars) and shape_of(d_q) == shape_of(d_k)


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A sum of a gradient over batch and tokens: views, casts to float32, and ``reduce_sum``."""

    chain: tuple[JaxprEqn, ...]

    @property
    def how(self) -> Hashable:
        """What is done to the gradient."""
        return tuple((e.primitive, tuple(sorted(map(repr, e.params.items())))) for e in self.chain)

    def nothing(self, queries: Var, graph: Graph) -> Atom:
        """The same of the gradient of queries, less itself."""
        total = read(graph.env, queries)
        for eqn in self.chain:
            graph.place(eqn)
            total = graph.emit(eqn.primitive, total, **eqn.params)
        return graph.emit(p.sub_p, total, total)


def _sums(eqn: JaxprEqn, number: int, readers: Readers) -> Iterator[_Sum]:
    """The sums of a result over batch and tokens."""
    gradient = eqn.outvars[number]
    tokens = 1 if eqn.params["layout"] == "BTNH" else 2
    for chain in _ways(gradient, readers):
        first = axes = fresh(shape_of(gradient))
        try:
            for view in chain[:-1]:
                axes = seen(view, axes)
        except NotFusible:  # reshapes that cut axes differently
            continue
        first, axes = unsplit(first), unsplit(axes)
        reduced = chain[-1].params["axes"]
        if set(factors_of(axes, reduced)) == set(factors_of(first, (0, tokens))):
            yield _Sum(chain)


def _ways(gradient: Var, readers: Readers) -> Iterator[tuple[JaxprEqn, ...]]:
    """The equations from a gradient to sums of it."""
    stack: list[tuple[Var, tuple[JaxprEqn, ...]]] = [(gradient, ())]
    while stack:
        var, views = stack.pop()
        for reader in readers.of(var):
            chain = (*views, reader)
            if reader.primitive is p.reduce_sum_p:
                if reader.params["out_sharding"] is None:
                    yield chain
            elif is_view(reader) or _widens(reader):
                stack.append((reader.outvars[0], chain))


def _widens(eqn: JaxprEqn) -> bool:
    return eqn.primitive is p.convert_element_type_p and eqn.params["new_dtype"] == _FLOAT
