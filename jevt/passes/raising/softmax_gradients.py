"""The gradient that belongs to a softmax's statistics.

As a norm's (``gradients.py``): from a sum's terms back, each value through which all goes that x
and its statistics do not explain may be the cotangent g; evaluation tells whether the terms are
``p·(g - Σ p·g)``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jax.extend.core import JaxprEqn, Var

from jevt.lowering.axes import Factor
from jevt.passes._facts import is_float
from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import root
from jevt.passes.attention.values import Named
from jevt.passes.raising import search
from jevt.passes.raising.cones import Cone, Origins
from jevt.passes.raising.norms import same_mesh
from jevt.passes.raising.small import Evaluation, same, times
from jevt.passes.raising.softmaxes import Softmax, forms
from jevt.passes.raising.terms import Sum


@dataclasses.dataclass(frozen=True)
class SoftmaxGradient:
    """The gradient of a softmax, found.

    Attributes:
      softmax: whose.
      sum: in which it ends.
      g: the cotangent.
      inside: its equations.
      source: an equation of it, for place and scopes.
    """

    softmax: Softmax
    sum: Sum
    g: Var
    inside: frozenset[int]
    source: JaxprEqn


def find(softmax: Softmax) -> SoftmaxGradient | None:
    """The gradient of a softmax; None if nothing looks like one.

    Raises:
      NoMatch: something looks like one and is none, or it would not pay to replace it.
    """
    return search.first(_candidates(softmax), functools.partial(_of_cotangent, softmax))


def _candidates(softmax: Softmax) -> Iterator[tuple[Origins, Sum]]:
    origin = root(softmax.program, softmax.cone.source)
    assert isinstance(origin, Var)
    statistics, masks = softmax.statistics(), softmax.masks
    # A cotangent that is computed from x alone is not seen as one until only the forward pass is.
    for forward in (None, softmax.forward()):
        origins = Origins(softmax.program, origin, statistics, masks=masks, forward=forward)
        for total in search.totals(origins, statistics):
            for part in _parts(total):
                yield origins, part


def _parts(total: Sum) -> Iterator[Sum]:
    """All terms of a sum together, then each by itself: x may have come other ways too."""
    yield total
    if len(total.terms) > 1:
        for term in total.terms[: search.MAX_SUMS]:
            rest = tuple(other for other in total.terms if other is not term)
            yield Sum(total.root, (term,), (*rest, *total.others), total.positions)


def _of_cotangent(softmax: Softmax, origins: Origins, total: Sum, cone: Cone) -> SoftmaxGradient:
    program, g = softmax.program, cone.source
    if not is_float(g.aval):
        raise NoMatch("a cotangent that is not of floating-point type")
    positions = set(cone.positions)
    origins.expand(softmax.x, positions)
    run = Evaluation(program, sorted(positions), alike=[var for _, var in total.terms])
    softmax.draw_masks(run)
    run.run()
    x = run.value(softmax.x)
    axes = run.axes(softmax.x)
    over = [name for axis in softmax.axes for name in axes[axis]]
    if any(set(x.names) != set(run.names(v)) for v in (g, *(v for _, v in total.terms))):
        raise NoMatch("a cotangent with other axes")
    got = sum(sign * run.value(var).along(x.names) for sign, var in total.terms)
    if not same(Named(x.names, np.asarray(got)), _formula(run, softmax, x, run.value(g), over)):
        raise NoMatch("not the gradient of this softmax")
    if any(list(run.names(v)) != list(x.names) for v in (g, total.root) if v in run.labels.axes):
        raise NoMatch("a cotangent whose axes are in another order")
    inside = search.inside(origins, total, positions)
    if not same_mesh(softmax.x, g, total.root):
        raise NoMatch("values that vary over different axes of a mesh, or are sharded")
    search.check_sums(origins, inside, {total.root}, 1)
    last = program.eqns[search.last_sum(program, inside)]
    return SoftmaxGradient(softmax, total, g, frozenset(inside), last)


def _formula(run: Evaluation, softmax: Softmax, x: Named, g: Named, over: list[Factor]) -> Named:
    p = forms(run, x, over, guarded=softmax.guarded)["softmax"]
    inner = run.sum(times(p, g), over).along(x.names)
    return Named(x.names, p.array * (g.along(x.names) - inner))
