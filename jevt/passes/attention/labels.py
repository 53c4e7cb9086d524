"""Names for the axes of every value in a region.

Two dimensions get one name, an *atom*, where an equation makes them run together; a reshape splits
and joins names. What remains of the region is arithmetic on named axes: transpositions, reshapes
and broadcasts say nothing any more, so that one description fits every layout.

An operand of a product has names of its own at each use, because one array may play several parts:
in ``softmax(x·xᵀ)·x``, the rows of x are queries, keys and values.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from jax.extend.core import JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.lowering.axes import Axes, Factor, flat, fresh, unify
from jevt.lowering.errors import NotFusible
from jevt.passes._facts import shape_of
from jevt.passes.attention.operations import REDUCTIONS, NoMatch
from jevt.passes.attention.region import Program, Region, is_renaming, is_upcast


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """An operand of a product, from outside the region.

    Attributes:
      root: what it is a view of.
      axes: of the root.
      seen: axes of the operand itself.
    """

    root: Var
    axes: Axes
    seen: Axes

    def atoms(self) -> list[Factor]:
        """The root's atoms in row-major order."""
        return atoms(self.axes)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The names.

    Attributes:
      axes: of each value of the region, of its leaves, and of what only renames its results.
      uses: for the products, by position and operand, the operands from outside.
    """

    axes: dict[Var, Axes]
    uses: dict[tuple[int, int], Use]

    def of(self, atom: Atom) -> list[Factor]:
        """The atoms of a value in row-major order; none for a literal."""
        return [] if isinstance(atom, Literal) else atoms(self.axes[atom])


def atoms(axes: Axes) -> list[Factor]:
    """Atoms in row-major order."""
    return [atom.find() for factor in flat(axes) for atom in factor.atoms()]


def label(region: Region) -> Labels:
    """Names the axes of a region's values.

    Raises:
      NoMatch: two reshapes cut an axis differently, or an equation is not what it seems.
    """
    labels = Labels({}, {})
    try:
        for position in region.positions():
            _label(position, region, labels)
        for position in region.products:
            (out,) = region.program.eqns[position].outvars
            _follow(position, labels.axes[out], region.program, labels)
    except NotFusible as error:
        raise NoMatch(str(error)) from None
    return labels


def _label(position: int, region: Region, labels: Labels) -> None:
    eqn = region.program.eqns[position]
    if eqn.primitive is p.dot_general_p:
        operands = [_product_operand(position, i, region, labels) for i in (0, 1)]
        labels.axes[eqn.outvars[0]] = _product(eqn, *operands)
        return
    name_result(eqn, labels)


def name_result(eqn: JaxprEqn, labels: Labels) -> None:
    """Names the axes of the result of an equation that is not a product.

    Raises:
      NotFusible: two reshapes cut an axis differently.
    """
    operands = [_operand(atom, labels) for atom in eqn.invars]
    labels.axes[eqn.outvars[0]] = _result(eqn, operands)


def _operand(atom: Atom, labels: Labels) -> Axes:
    if isinstance(atom, Literal):
        return fresh(shape_of(atom))
    if atom not in labels.axes:
        labels.axes[atom] = fresh(shape_of(atom))
    return labels.axes[atom]


def _product_operand(position: int, index: int, region: Region, labels: Labels) -> Axes:
    atom = region.program.eqns[position].invars[index]
    if isinstance(atom, Literal):
        raise NoMatch("a product with a number")
    if atom in region.derived:
        return labels.axes[atom]
    use = _use(atom, region.program)
    labels.uses[position, index] = use
    return use.seen


def _use(operand: Var, program: Program) -> Use:
    """An operand with fresh axes, followed to what it is a view of."""
    seen = axes = fresh(shape_of(operand))
    var = operand
    while (eqn := program.definition(var)) is not None and (is_renaming(eqn) or is_upcast(eqn)):
        (source,) = eqn.invars
        if not isinstance(source, Var):
            break
        if eqn.primitive is p.transpose_p:
            moved = list(axes)
            for new, old in enumerate(eqn.params["permutation"]):
                moved[old] = axes[new]
            axes = tuple(moved)
        elif not is_upcast(eqn):
            old_axes = fresh(shape_of(source))
            unify(flat(old_axes), flat(axes), "reshape")
            axes = old_axes
        var = source
    return Use(var, axes, seen)


def _product(eqn: JaxprEqn, left: Axes, right: Axes) -> Axes:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    for a, b in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        unify(left[a], right[b], "dot_general")
    free = [axis for i, axis in enumerate(left) if i not in lc and i not in lb]
    free += [axis for i, axis in enumerate(right) if i not in rc and i not in rb]
    return (*(left[i] for i in lb), *free)


def _result(eqn: JaxprEqn, operands: Sequence[Axes]) -> Axes:
    shape = shape_of(eqn.outvars[0])
    if eqn.primitive in REDUCTIONS:
        gone = {int(a) for a in eqn.params["axes"]}
        return tuple(axis for i, axis in enumerate(operands[0]) if i not in gone)
    if eqn.primitive is p.transpose_p:
        return tuple(operands[0][i] for i in eqn.params["permutation"])
    result = fresh(shape)
    if eqn.primitive in (p.reshape_p, p.squeeze_p):
        unify(flat(operands[0]), flat(result), eqn.primitive.name)
    elif eqn.primitive is p.broadcast_in_dim_p:
        for axis, place in zip(operands[0], eqn.params["broadcast_dimensions"], strict=True):
            if axis:
                unify(axis, result[int(place)], "broadcast_in_dim")
    else:
        for operand in operands:
            # Scalars and axes of size 1 are repeated.
            for source, target in zip(operand, result, strict=False):
                if source:
                    unify(source, target, eqn.primitive.name)
    return result


def _follow(position: int, axes: Axes, program: Program, labels: Labels) -> None:
    """Names the axes of what only renames a product's result."""
    (out,) = program.eqns[position].outvars
    labels.axes[out] = axes
    for reader in program.readers.get(out, ()):
        eqn = program.eqns[reader]
        if is_renaming(eqn):
            # A reshape that cuts axes in its own way ends the chain.
            with contextlib.suppress(NotFusible):
                _follow(reader, _result(eqn, [axes]), program, labels)


def identify(use: Use, other: Use, shared: set[Factor]) -> bool:
    """Gives ``use`` the names of ``other``, if they can be the same use of the same array.

    ``shared`` are the names of ``use`` that it has from elsewhere: these must agree already.
    """
    if use.root is not other.root:
        return False
    pairs = list(zip(use.atoms(), other.atoms(), strict=False))
    if len(use.atoms()) != len(other.atoms()) or any(a.size != b.size for a, b in pairs):
        return False
    if any(a is not b and a in shared for a, b in pairs):
        return False
    for a, b in pairs:
        unify([a], [b], "use")
    return True
