"""Whether a region computes attention: its values at small sizes, and attention's.

A region on named axes does not depend on their sizes. So it is evaluated on random numbers with two
or three elements an axis, in float64, whatever the sizes and types of the program are, and every
result compared with the formulas of attention. What this accepts is attention in exact arithmetic,
however it is spelled; where roundings happen is judged elsewhere.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt.lowering.axes import Factor
from jevt.passes.attention import scores
from jevt.passes.attention.labels import Labels, Use
from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import Region
from jevt.passes.attention.roles import Part, Roles
from jevt.passes.attention.scores import Scores
from jevt.passes.attention.values import Named, Values, distinct

#: Numbers of the program, such as the scale, may have been rounded to bfloat16 in one place and
#: their inverses in another.
TOLERANCE = 4e-3


# What draws random bits where `expose_random_bits` has not made them arithmetic, with an `xor` in
# every round; and how far back from a mask to look for that.
_GENERATORS = ("threefry2x32", "random_bits", "rng_bit_generator")
_EQUATIONS_OF_A_GENERATOR = 64


def confirm(region: Region, labels: Labels, roles: Roles, how: Scores) -> None:
    """Compares a region's results with those of attention.

    Raises:
      NoMatch: they differ, or the region cannot be evaluated.
    """
    with np.errstate(all="ignore"):
        run = _Evaluation(region, labels, roles)
        leaves = _seen_keys(region, labels, how)
        for var in region.leaves():
            run.draw_leaf(var, leaves.get(var))
        for position in region.positions():
            run.evaluate(position)
        want = run.attention(how)
    for part, position in roles.results.items():
        got = run.values[region.program.eqns[position].outvars[0]]
        expected = want[part].along(got.names)
        error = np.abs(got.array - expected).max()
        if not error <= TOLERANCE * np.abs(expected).max():
            raise NoMatch(f"{part} is not that of an attention ({_suspect(region, labels, how)})")


def _seen_keys(region: Region, labels: Labels, how: Scores) -> Mapping[Var, bool]:
    """What the parts of the masks are where a key is seen."""
    return {v: s for mask, seen in how.masks for v, s in scores.parts(region, mask, seen)}


def _suspect(region: Region, labels: Labels, how: Scores) -> str:
    known = {*_seen_keys(region, labels, how), *(value for _, value in how.biases)}
    strange = [var for var in region.leaves() if var not in known]
    if any(_is_random(var, region) for var in strange):
        return "dropout on the probabilities: cuDNN would draw other random bits than JAX"
    avals: list[Any] = [var.aval for var in strange]
    if any(aval.dtype == np.dtype(bool) for aval in avals):
        return "dropout, or a mask that is not of the scores"
    return "an unfamiliar computation between the products"


def _is_random(var: Var, region: Region) -> bool:
    """Whether the generator of random bits is near behind a value."""
    seen, waiting = set[int](), [var]
    while waiting and len(seen) < _EQUATIONS_OF_A_GENERATOR:
        position = region.program.maker.get(waiting.pop())
        if position is None or position in seen:
            continue
        seen.add(position)
        eqn = region.program.eqns[position]
        if eqn.primitive is p.xor_p or eqn.primitive.name in _GENERATORS:
            return True
        waiting += [a for a in eqn.invars if isinstance(a, Var)]
    return False


class _Evaluation(Values):
    """The values of a region."""

    def __init__(self, region: Region, labels: Labels, roles: Roles) -> None:
        super().__init__(region.program, labels)
        self.roles = roles
        self.used: dict[tuple[Var, tuple[Factor, ...]], Named] = {}

    def new_size(self, name: Factor, known: int) -> int:
        """Two or three, by turns, so that axes that are taken for one another are noticed."""
        del name
        return 2 + known % 2

    def given(self, var: Var) -> Named:
        del var
        raise NoMatch("a value from outside that is no leaf of the region")

    def draw_leaf(self, var: Var, seen: bool | None) -> None:
        """Random numbers; for a mask, random bits that let every query see one key at least."""
        value = self.draw(self.names(var))
        aval: Any = var.aval
        if aval.dtype == np.dtype(bool):
            keys = [i for i, name in enumerate(value.names) if name in self.roles.axes.keys]
            bits = value.array < 0.5
            bits[tuple(0 if i in keys else slice(None) for i in range(bits.ndim))] = True
            value = Named(value.names, bits if seen is None or seen else ~bits)
        elif not jax.dtypes.issubdtype(aval.dtype, np.floating):
            raise NoMatch(f"{aval.dtype} among the scores")
        self.values[var] = value

    def use(self, use: Use) -> Named:
        """The random numbers of a product's operand, the same wherever it is used in that part."""
        key = use.root, tuple(use.atoms())
        if key not in self.used:
            self.used[key] = self.draw(use.atoms())
        return self.used[key]

    def evaluate(self, position: int) -> None:
        eqn = self.program.eqns[position]
        if eqn.primitive is not p.dot_general_p:
            super().evaluate(position)
            return
        (out,) = eqn.outvars
        a, b = (self.operand(position, i, eqn) for i in (0, 1))
        self.values[out] = product(distinct(self.names(out)), a, b)

    def operand(self, position: int, index: int, eqn: JaxprEqn) -> Named:
        use = self.labels.uses.get((position, index))
        return self.value(eqn.invars[index]) if use is None else self.use(use)

    def attention(self, how: Scores) -> dict[Part, Named]:
        """The formulas of attention on the same random numbers."""
        axes = self.roles.axes
        names = (*axes.batch, *axes.rows, *axes.keys)
        rows = (*axes.batch, *axes.rows)
        keys = tuple(range(len(rows), len(names)))
        q, k, v = (self.use(use) for use in (self.roles.q, self.roles.k, self.roles.v))
        scores = how.scale * product(names, q, k).array
        for factor, bias in how.biases:
            scores = scores + factor * self.values[bias].along(names)
        for mask, seen in how.masks:
            scores = np.where(self.values[mask].along(names) == seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(keys, keepdims=True))
        p = Named(names, weights / weights.sum(keys, keepdims=True))
        result: dict[Part, Named] = {"out": product((*rows, *axes.value_width), p, v)}
        if self.roles.d_out is None:
            return result
        d_out = self.use(self.roles.d_out)
        d_p = product(names, d_out, v).array
        d_s = Named(names, p.array * (d_p - (p.array * d_p).sum(keys, keepdims=True)))
        d_q = product((*rows, *axes.width), d_s, k)
        d_k = product((*axes.batch, *axes.keys, *axes.width), d_s, q)
        result["d_v"] = product((*axes.batch, *axes.keys, *axes.value_width), p, d_out)
        result["d_q"] = Named(d_q.names, how.scale * d_q.array)
        result["d_k"] = Named(d_k.names, how.scale * d_k.array)
        return result


def product(names: Sequence[Factor], a: Named, b: Named) -> Named:
    """The sum of products over all names but these."""
    letters: dict[Factor, str] = {}
    for name in (*a.names, *b.names):
        letters.setdefault(name, string.ascii_letters[len(letters)])
    terms = ["".join(letters[name] for name in x) for x in (a.names, b.names, names)]
    return Named(tuple(names), np.einsum(f"{terms[0]},{terms[1]}->{terms[2]}", a.array, b.array))
