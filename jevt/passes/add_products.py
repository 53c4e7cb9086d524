"""Products that are added up become one sum of products. For GPUs.

Purpose: what several layers read has as its gradient a sum of products: that of the input of
queries, keys and values is ``dq·Wq' + dk·Wk' + dv·Wv'``. As products they are kernels that write,
and read again, the sums so far. One kernel multiplies one after the other into the same
accumulators, and rounds once.

Invariant: the same sum, in another order, rounded once and not after each product. What else is
added, as the gradient of a residual connection, is added behind the products.

Taken together are products of one shape, of operands of one type and of 16 bits, that only the sum
reads, if one kernel is predicted to be faster than cuBLAS with all but one and a kernel with that.
Their operands must agree in whether they are contiguous along what is contracted, because one
kernel's buffers hold all of them.

    before  { lambda ; a:bf16[4096,512] b:bf16[512,512] c:bf16[4096,512] d:bf16[512,512]. let
                e:bf16[4096,512] = dot_general[(([1], [1]), ([], []))] a b
                f:bf16[4096,512] = dot_general[(([1], [1]), ([], []))] c d
                g:bf16[4096,512] = add e f in (g,) }
    after   { lambda ; a:bf16[4096,512] b:bf16[512,512] c:bf16[4096,512] d:bf16[512,512]. let
                g:bf16[4096,512] = product_sum[dimension_numbers=…] a b c d in (g,) }
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._context import Context, Device
from jevt._jaxpr import Atom, aval
from jevt.partition.graph import nbytes
from jevt.partition.products import cublas_us, mainloop_us
from jevt.passes._facts import shape_of
from jevt.passes._readers import Readers, has_known_cost
from jevt.passes._replace import Replacements, replace
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph, on_same_mesh
from jevt.primitives.product_sum import product_sum_p
from jevt_kernels.mainloops.terms import MOST_TERMS


def run(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """Adds up the products of ``jaxpr`` and of its bodies for the device of ``context``."""
    return replace(jaxpr, context, _replacements)


def _replacements(jaxpr: Jaxpr, context: Context, outermost: bool) -> Replacements:
    del outermost
    readers = Readers(jaxpr)
    result: dict[Var, functools.partial[Atom]] = {}
    for eqn in jaxpr.eqns:
        if not _is_sum(eqn) or _inside_another(eqn, readers):
            continue
        terms = _terms(eqn, readers, context.device)
        if any(isinstance(term, _Together) for term in terms):
            result[eqn.outvars[0]] = functools.partial(_emit, eqn, terms)
    return result


@dataclasses.dataclass(frozen=True)
class _Together:
    """Products that can be one sum."""

    eqns: tuple[JaxprEqn, ...]

    def pays(self, device: Device) -> bool:
        """Whether they may be, and one kernel is predicted to be faster."""
        *others, last = self.eqns
        if not others or not on_same_mesh([a for eqn in self.eqns for a in eqn.invars]):
            return False
        passed = 2 * nbytes(last.outvars[0].aval) / device.bytes_per_us
        apart = sum(cublas_us(eqn, device) + passed for eqn in others) + mainloop_us(last, device)
        return apart > mainloop_us(self._whole(), device)

    def _whole(self) -> JaxprEqn:
        first = self.eqns[0]
        return first.replace(
            primitive=product_sum_p,
            invars=[a for eqn in self.eqns for a in eqn.invars],
            params=self._params(),
        )

    def _params(self) -> dict[str, object]:
        first = self.eqns[0].params
        return {
            "dimension_numbers": tuple(eqn.params["dimension_numbers"] for eqn in self.eqns),
            "precision": first["precision"],
            "preferred_element_type": np.dtype(aval(self.eqns[0].outvars[0]).dtype),
        }

    def emit(self, graph: Graph) -> Atom:
        operands = [read(graph.env, a) for eqn in self.eqns for a in eqn.invars]
        graph.place(self.eqns[-1])
        return graph.emit(product_sum_p, *operands, **self._params())


def _emit(eqn: JaxprEqn, terms: Sequence[_Together | Atom], graph: Graph) -> Atom:
    """A sum of what is multiplied together and of other values."""
    values = [t.emit(graph) if isinstance(t, _Together) else read(graph.env, t) for t in terms]
    graph.place(eqn)
    total = values[0]
    for value in values[1:]:
        total = graph.emit(p.add_p, total, value)
    return total


def _is_sum(eqn: JaxprEqn) -> bool:
    """Whether an equation adds arrays of one shape."""
    shape = shape_of(eqn.outvars[0]) if eqn.primitive is p.add_p else ()
    return bool(shape) and all(shape_of(a) == shape for a in eqn.invars)


def _inside_another(eqn: JaxprEqn, readers: Readers) -> bool:
    """Whether a sum is added to another one, and read by nobody else."""
    (out,) = eqn.outvars
    found = readers.of(out)
    return not readers.is_output(out) and len(found) == 1 and _adds_once(found[0], out)


def _adds_once(reader: JaxprEqn, var: Var) -> bool:
    return _is_sum(reader) and reader.invars.count(var) == 1


def _terms(eqn: JaxprEqn, readers: Readers, device: Device) -> list[_Together | Atom]:
    """What a sum adds up, with the sums that are only a part of it; products first."""
    alike: dict[Hashable, list[JaxprEqn]] = {}
    others: list[Atom] = []
    stack = list(reversed(eqn.invars))
    while stack:
        atom = stack.pop()
        maker = readers.maker(atom)
        if maker is None or not _is_read_once(atom, readers):
            others.append(atom)
        elif _is_sum(maker):
            stack += reversed(maker.invars)
        elif _may_be_added(maker):
            alike.setdefault(_key(maker), []).append(maker)
        else:
            others.append(atom)
    products: list[_Together | Atom] = []
    for found in alike.values():
        for i in range(0, len(found), MOST_TERMS):
            together = _Together(tuple(found[i : i + MOST_TERMS]))
            one = together.pays(device)
            products += [together] if one else [each.outvars[0] for each in together.eqns]
    return [*products, *others]


def _is_read_once(atom: Atom, readers: Readers) -> bool:
    if not isinstance(atom, Var) or readers.is_output(atom):
        return False
    found = readers.of(atom)
    return len(found) == 1 and found[0].invars.count(atom) == 1


def _may_be_added(eqn: JaxprEqn) -> bool:
    """Whether an equation is a product that a kernel adds to others as fast as it multiplies."""
    if eqn.primitive is not p.dot_general_p or not has_known_cost(eqn):
        return False
    return all(aval(a).dtype.itemsize == 2 for a in eqn.invars)


def _key(product: JaxprEqn) -> Hashable:
    """What products of one sum have in common."""
    contracted, batch = product.params["dimension_numbers"]
    lhs, rhs = (aval(a) for a in product.invars)
    last = lhs.ndim - 1 in contracted[0], rhs.ndim - 1 in contracted[1]
    free = lhs.ndim - len(contracted[0])
    types = lhs.dtype, aval(product.outvars[0]).dtype, product.params["precision"]
    return (*types, len(batch[0]), free, *last)
