"""Which product gives what, and from what: the parts of an attention.

By the names of the axes: of the score's two operands, k has the axes over which the softmax sums.
A product that contracts these gives out or d_q, one that contracts the queries' gives d_v or d_k;
the gradients of q and k come from values that d_out·Vᵀ has gone into, out and d_v do not.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jax.extend.core import Var

from jevt.lowering.axes import Factor
from jevt.passes.attention.labels import Labels, Use, identify
from jevt.passes.attention.operations import NoMatch
from jevt.passes.attention.region import Region

type Part = Literal["out", "d_q", "d_k", "d_v"]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The names of the axes by their part, each in the order in which q or k has them.

    Attributes:
      batch: of q, k and v: batch and key heads.
      rows: of q alone: queries, and query heads that share a key head.
      keys: of k and v alone.
      width, value_width: of the head dimension of q and k, and of v.
    """

    batch: tuple[Factor, ...]
    rows: tuple[Factor, ...]
    keys: tuple[Factor, ...]
    width: tuple[Factor, ...]
    value_width: tuple[Factor, ...]


@dataclasses.dataclass(frozen=True)
class Roles:
    """Operands and results of an attention.

    Attributes:
      axes: their axes.
      q, k, v: operands.
      d_out: the gradient of out; None without a backward pass.
      results: the products' results: position of each by its part.
    """

    axes: Axes
    q: Use
    k: Use
    v: Use
    d_out: Use | None
    results: dict[Part, int]


def assign(region: Region, labels: Labels) -> Roles | None:
    """The parts of a region's products.

    None if it has no values: a softmax whose only products are with its own operands, as a loss.

    Raises:
      NoMatch: a product that attention does not have.
    """
    eqns = region.program.eqns
    total = eqns[region.total]
    summed = set(labels.of(total.invars[0])) - set(labels.of(total.outvars[0]))
    q, k = (labels.uses[region.score, i] for i in (0, 1))
    if not summed <= set(k.atoms()):
        q, k = k, q
    if _is_loss(region, labels, q, k):
        return None
    results = _results(region, labels, summed)
    values = _operand_with(region, labels, results, summed, of_values=True)
    if values is None:
        return None
    if region.obstacles:
        raise NoMatch(region.obstacles[0])
    gradient = _operand_with(region, labels, results, summed, of_values=False)
    _unite(region, labels, summed, results, q, k, values, gradient)
    return _roles(region, labels, summed, q, k, values, gradient, results)


def _is_loss(region: Region, labels: Labels, q: Use, k: Use) -> bool:
    """Whether the products are those of the score's own gradient, as of a loss on logits."""
    if region.gradients or len(region.products) < 2:
        return False
    roots = {use.root for (i, _), use in labels.uses.items() if i in region.products}
    return roots == {q.root, k.root}


def _results(region: Region, labels: Labels, summed: set[Factor]) -> dict[Part, int]:
    late = _late(region)
    results: dict[Part, int] = {}
    for position in region.products:
        eqn = region.program.eqns[position]
        inside = [a for a in eqn.invars if a in region.derived]
        if len(inside) != 1:
            raise NoMatch("a product of two values computed from the scores")
        gone = set(labels.of(inside[0])) - set(labels.of(eqn.outvars[0]))
        is_gradient = inside[0] in late
        part: Part
        if gone == summed:
            part = "d_q" if is_gradient else "out"
        else:
            part = "d_k" if is_gradient else "d_v"
        if part in results:
            raise NoMatch(f"two products that could be {part}")
        results[part] = position
    return results


def _late(region: Region) -> set[Var]:
    """Derived values that a product of the gradient has gone into."""
    late: set[Var] = {region.program.eqns[i].outvars[0] for i in region.gradients}
    for position in region.inner:
        eqn = region.program.eqns[position]
        if any(isinstance(a, Var) and a in late for a in eqn.invars):
            late.update(eqn.outvars)
    return late


def _operand_with(
    region: Region,
    labels: Labels,
    results: dict[Part, int],
    summed: set[Factor],
    *,
    of_values: bool,
) -> Use | None:
    """The use of v (which has the keys' axes), or of d_out (which has not)."""
    part: Part = "out" if of_values else "d_v"
    if part in results:
        return _outer(results[part], labels)
    for position in region.gradients:
        for index in (0, 1):
            use = labels.uses.get((position, index))
            if use is not None and summed.issubset(use.atoms()) == of_values:
                return use
    return None


def _outer(position: int, labels: Labels) -> Use:
    return next(labels.uses[position, i] for i in (0, 1) if (position, i) in labels.uses)


def _unite(
    region: Region,
    labels: Labels,
    summed: set[Factor],
    results: dict[Part, int],
    q: Use,
    k: Use,
    v: Use,
    d_out: Use | None,
) -> None:
    """Gives all uses of one array in one part the same names.

    Raises:
      NoMatch: the gradients multiply something else than the forward pass.
    """
    same: list[tuple[int, int, Use]] = []
    parts: tuple[tuple[Part, Use | None], ...] = (
        ("d_q", k),
        ("d_k", q),
        ("out", v),
        ("d_v", d_out),
    )
    for part, use in parts:
        if part in results and use is not None:
            position = results[part]
            same.append((position, 0 if (position, 0) in labels.uses else 1, use))
    if region.gradients and (d_out is None or len(region.gradients) > 1):
        raise NoMatch("a product among the scores that is not of the output's gradient")
    for position in region.gradients:
        assert d_out is not None
        if (position, 0) not in labels.uses or (position, 1) not in labels.uses:
            raise NoMatch("a product among the scores that is not of the output's gradient")
        for index in (0, 1):
            has_keys = summed.issubset(labels.uses[position, index].atoms())
            same.append((position, index, v if has_keys else d_out))
    for position, index, use in same:
        mine = labels.uses[position, index]
        if mine is not use and not identify(mine, use, _shared(position, index, labels, region)):
            raise NoMatch("the gradients multiply other arrays than the forward pass")


def _shared(position: int, index: int, labels: Labels, region: Region) -> set[Factor]:
    """The names of an operand that it has from the rest of the region.

    Those that it shares with a derived value; for the product of d_out and v, with its result.
    """
    eqn = region.program.eqns[position]
    other = eqn.invars[1 - index]
    if other in region.derived:
        return set(labels.of(other))
    return set(labels.of(eqn.outvars[0]))


def _roles(
    region: Region,
    labels: Labels,
    summed: set[Factor],
    q: Use,
    k: Use,
    v: Use,
    d_out: Use | None,
    results: dict[Part, int],
) -> Roles:
    # The names have changed meanwhile.
    total = region.program.eqns[region.total]
    kept = set(labels.of(total.outvars[0]))
    summed = set(labels.of(total.invars[0])) - kept
    scores = set(labels.of(region.program.eqns[region.score].outvars[0]))
    q_atoms, k_atoms, v_atoms = q.atoms(), k.atoms(), v.atoms()
    axes = Axes(
        batch=tuple(a for a in q_atoms if a in k_atoms and a in scores),
        rows=tuple(a for a in q_atoms if a not in k_atoms),
        keys=tuple(a for a in k_atoms if a in summed),
        width=tuple(a for a in q_atoms if a in k_atoms and a not in scores),
        value_width=tuple(a for a in v_atoms if a not in scores),
    )
    parts = (
        ("q", q_atoms, (axes.batch, axes.rows, axes.width)),
        ("k", k_atoms, (axes.batch, axes.keys, axes.width)),
        ("v", v_atoms, (axes.batch, axes.keys, axes.value_width)),
        (
            "d_out",
            None if d_out is None else d_out.atoms(),
            (axes.batch, axes.rows, axes.value_width),
        ),
    )
    for name, have, want in parts:
        if have is None:
            continue
        names = [atom for group in want for atom in group]
        if len(have) != len(names) or set(have) != set(names) or len(set(have)) != len(have):
            raise NoMatch(f"{name} has not the axes that attention expects")
    if not (axes.rows and axes.keys and axes.width and axes.value_width):
        raise NoMatch("one query, one key, or heads of size 1")
    if set(axes.batch) | set(axes.rows) | set(axes.keys) != scores:
        raise NoMatch("the softmax does not sum over all keys")
    return Roles(axes, q, k, v, d_out, results)
