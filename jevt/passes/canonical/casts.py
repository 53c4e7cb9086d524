"""Canonical forms of conversions between types: those that cancel go, chains become one.

``A → B → C`` is ``A → C`` where B holds every value of A (bfloat16 → float32, float32 → float64,
int8 → float16, …): the first step changes nothing.

``float32 → bfloat16 → float32`` stays, although XLA's default (``xla_allow_excess_precision``)
would drop it. Inside a kernel the pair is free and not rounded, as kernels compute bfloat16 in
float32; between kernels the bfloat16 value is what is stored, in half the bytes, and reading the
float32 value in its place would make two tensors of one. So dropping it gains nothing and can only
cost memory traffic.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import kind
from jevt.passes._rules import Graph, Rules


@functools.cache
def holds(wide: Any, narrow: Any) -> bool:
    """Whether every value of type ``narrow`` is one of type ``wide``."""
    if wide == narrow:
        return True
    kinds = kind(np.empty(0, wide)), kind(np.empty(0, narrow))
    if kinds == ("f", "f"):
        a, b = jax.numpy.finfo(wide), jax.numpy.finfo(narrow)
        # Types without infinities (some 8-bit ones) map them to something else.
        is_ieee = all(np.isinf(np.asarray(np.inf, t)) for t in (wide, narrow))
        smallest = float(a.smallest_subnormal) <= float(b.smallest_subnormal)
        return is_ieee and a.nmant >= b.nmant and float(a.max) >= float(b.max) and smallest
    if kinds[1] == "b":
        return kinds[0] in ("f", "i")
    if kinds[1] == "i":
        limits = jax.numpy.iinfo(narrow)
        if kinds[0] == "i":
            bounds = jax.numpy.iinfo(wide)
            return int(bounds.min) <= int(limits.min) and int(limits.max) <= int(bounds.max)
        bits = max(-int(limits.min), int(limits.max)).bit_length()
        info = jax.numpy.finfo(wide) if kinds[0] == "f" else None
        return info is not None and bits <= info.nmant + 1 and int(limits.max) < float(info.max)
    return False


def _chain(eqn: JaxprEqn, graph: Graph) -> Atom | None:
    """``convert (convert x) = convert x``, or x itself."""
    params = eqn.params
    (x,) = eqn.invars
    if _dtype(x) == params["new_dtype"] and not isinstance(x, Literal):
        return x
    inner = graph.definition(x, p.convert_element_type_p)
    if inner is None or inner.params.get("sharding") is not None:
        return None
    source = inner.invars[0]
    if isinstance(source, Literal) or not holds(_dtype(x), _dtype(source)):
        return None
    if _dtype(source) == params["new_dtype"]:
        return source
    return graph.emit(eqn.primitive, source, **params)


def _dtype(atom: Atom) -> np.dtype[Any]:
    aval: Any = atom.aval
    return aval.dtype


RULES: Rules = {p.convert_element_type_p: (_chain,)}
