"""Asks ``lowering.spec.build`` about sets of equations, each shape of set once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from jax.extend.core import Jaxpr, Var

from jevt import _jaxpr
from jevt.lowering.errors import NotFusible
from jevt.lowering.products import PRODUCTS
from jevt.partition.canonical import Keys
from jevt.partition.graph import Graph, elements
from jevt_kernels.spec import KernelSpec

type Build = Callable[[Jaxpr, str], KernelSpec]


class Builder:
    """Memory of what ``build`` said: equal sets of equations get the same answer."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self.keys = Keys()
        self._refusals: dict[Hashable, str] = {}
        self._specs: dict[Hashable, KernelSpec] = {}

    def accepts(self, jaxpr: Jaxpr) -> bool:
        """Whether a group can be one kernel."""
        return not self.refusal(jaxpr)

    def refusal(self, jaxpr: Jaxpr) -> str:
        """Why a group cannot be one kernel, "" if it can."""
        key = self.keys.key(jaxpr)
        if key not in self._refusals:
            try:
                self._build(jaxpr, "candidate")
            except NotFusible as refusal:
                self._refusals[key] = str(refusal) or "not fusible"
            else:
                self._refusals[key] = ""
        return self._refusals[key]

    def spec(self, jaxpr: Jaxpr, name: str) -> KernelSpec:
        """The kernel of a group; one object, with the first one's name, for all equal groups.

        Raises:
          NotFusible: it cannot be one.
        """
        key = self.keys.key(jaxpr)
        if key not in self._specs:
            if self._refusals.get(key):
                raise NotFusible(self._refusals[key])
            self._specs[key] = self._build(jaxpr, name)
        return self._specs[key]


def part(graph: Graph, positions: Iterable[int], stored: Iterable[Var] = ()) -> Jaxpr:
    """Equations with the largest of those results as outputs that none of them reads.

    ``stored`` are outputs too. Whether ``build`` takes them says whether they can be *part* of a
    kernel: smaller results may need what else is in it, a reduction that gives the kernel its rows
    or a reader that hides them. If nothing is left of what a matrix product makes, the largest of
    that are outputs too, because without the product it would be another kernel.
    """
    eqns = [graph.jaxpr.eqns[p] for p in sorted(positions)]
    defined = {v for e in eqns for v in e.outvars}
    read = {v: None for e in eqns for v in e.invars if isinstance(v, Var)}
    inputs = [v for v in read if v not in defined]
    ends = [v for e in eqns for v in e.outvars if v not in read and v in graph.uses]
    outputs = {*_largest(ends), *stored}
    multiplied: set[Var] = set()
    for e in eqns:
        product = e.primitive in PRODUCTS
        if product or any(isinstance(v, Var) and v in multiplied for v in e.invars):
            multiplied.update(e.outvars)
    if outputs.isdisjoint(multiplied):
        outputs.update(_largest([v for v in ends if v in multiplied]))
    return _jaxpr.make(inputs, [v for e in eqns for v in e.outvars if v in outputs], eqns)


def _largest(found: Sequence[Var]) -> Iterable[Var]:
    most = max((elements(v.aval) for v in found), default=0)
    return (v for v in found if elements(v.aval) == most)
