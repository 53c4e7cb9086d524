"""The statistics of a softmax, found from the sum of an exponential.

    x ─▶ (max, guards) ─▶ exp ─▶ Σ = total ─▶ log, ÷, … = softmax, its logarithm, logsumexp

From the sum back, each value through which all of the way goes may be the x of whose row it is the
softmax's total; the nearest is taken. Then everything that is computed from x and the total alone
is compared with what a softmax has to give. Both are done by evaluation, on random numbers and on
rows with infinities, by which guards differ.

Where the exponentials are masked (``where=``), x is what the maximum is taken of: -inf where the
mask drops an element. The program's total is 0 where it drops a whole row, and the composite's NaN,
as is the softmax of such a row in both; so nobody else may read that total.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.lowering.axes import Factor
from jevt.passes._facts import is_float, shape_of
from jevt.passes.attention.operations import VIEWS, NoMatch, is_known
from jevt.passes.attention.region import Program, is_renaming, number
from jevt.passes.attention.values import Named
from jevt.passes.raising import masks as masks_of
from jevt.passes.raising.cones import Cone, dominators, size
from jevt.passes.raising.norms import in_order, living, same_mesh, sums
from jevt.passes.raising.rows import on_chip
from jevt.passes.raising.small import Evaluation, dimensions

#: Dominators that are tried, and values that are compared with what a softmax has to give.
_TRIES = 6
_MANY = 60

#: What says nothing of how a softmax is guarded.
_ROWS = frozenset({"maximum"})

#: Literals are rounded to float32.
_TOLERANCE = 2e-6


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The statistics of a softmax, found.

    Attributes:
      program: whose.
      cone: x, or what it is a masked version of, and the equations from there to the total.
      x: of which it is the softmax.
      total: the sum of exponentials, as the program has it.
      axes: of x, over which it runs.
      guarded: whether 0 is subtracted where the maximum is not finite.
      after: the equations that compute something from x and the total alone, ascending.
      results: values of the program that x and the statistics give, by what they are.
      masks: of exponentials, each with the value of it for which an element counts.
    """

    program: Program
    cone: Cone
    x: Var
    total: Var
    axes: tuple[int, ...]
    guarded: bool
    after: tuple[int, ...]
    results: dict[Var, str]
    masks: dict[Var, bool]

    def forward(self) -> set[Var]:
        """The values of x's size on the way to the total, and those that a softmax gives."""
        values = {v for i in self.cone.positions for v in self.program.eqns[i].outvars}
        return values | {v for v in self.results if size(v) == size(self.x)}

    def draw_masks(self, run: Evaluation) -> None:
        """Gives the masks random values that keep something of every row."""
        masks_of.draw(run, self.masks)

    def statistics(self) -> list[Var]:
        """Values that are smaller than x, and computed from it alone."""
        eqns = [self.program.eqns[i] for i in (*self.cone.positions, *self.after)]
        return [v for eqn in eqns for v in eqn.outvars if size(v) < size(self.x)]

    def name(self) -> str:
        """What it is called: by the last of what the program computes of it."""
        return "softmax" if "softmax" in self.results.values() else "logsumexp"


def find(program: Program, exponential: int) -> Softmax | None:
    """The softmax of an exponential; None if this does not look like one.

    Raises:
      NoMatch: it looks like one and is none.
    """
    total, masks = _total(program, exponential)
    if total is None:
        return None

    def resolve(var: Var, positions: set[int]) -> bool:
        chain = number(program, var) is not None
        positions.update(_constant(program, var) if chain else ())
        return chain or var in masks

    unshifted: Cone | None = None
    alike = False
    for tries, cone in enumerate(dominators(program, [total], resolve)):
        if tries == _TRIES:
            break
        if size(cone.source) <= size(total) or not is_float(cone.source.aval):
            continue
        if not _has_maximum(program, cone):
            if cone.source is program.eqns[exponential].invars[0]:
                unshifted = cone
            continue
        softmax = _confirm(program, cone, total, masks)
        if softmax is not None:
            return softmax
        alike = alike or bool(masks and masks_of.operand(program, cone, masks))
    if masks and alike:
        raise NoMatch("a row that is masked as a whole has another value than its softmax")
    if masks:
        if _is_shifted(program, program.eqns[exponential].invars[0]):
            raise NoMatch("the exponential is masked, but not what the maximum is taken of")
        return None
    if unshifted is None or _is_shifted(program, unshifted.source):
        raise NoMatch("a sum of exponentials, but not of differences from the maximum")
    softmax = _confirm(program, unshifted, total, masks)
    if softmax is None:
        raise NoMatch("a sum of exponentials, but not that of a softmax")
    if not on_chip(shape_of(softmax.x), softmax.axes):
        raise NoMatch("the maximum is not subtracted, and would need a pass of its own")
    return softmax


def _total(program: Program, exponential: int) -> tuple[Var | None, dict[Var, bool]]:
    """The sum of an exponential over some axes, cast or seen differently before it.

    One of all elements rather than of a mask's; with the mask, and its value where they count.
    """
    masked: tuple[Var | None, dict[Var, bool]] = None, {}
    stack: list[tuple[Var, dict[Var, bool]]] = [(program.eqns[exponential].outvars[0], {})]
    while stack:
        var, masks = stack.pop()
        for position in program.readers.get(var, ()):
            eqn = program.eqns[position]
            (out, *_) = eqn.outvars
            if eqn.primitive is p.reduce_sum_p:
                if not masks:
                    return out, {}
                masked = out, masks
            elif eqn.primitive is p.convert_element_type_p or is_renaming(eqn):
                stack.append((out, masks))
            elif eqn.primitive is p.select_n_p and not masks:
                stack.extend(
                    (out, {mask: keeps}) for mask, keeps in masks_of.choices(program, eqn, 0.0)
                )
    return masked


def _has_maximum(program: Program, cone: Cone) -> bool:
    return any(program.eqns[i].primitive is p.reduce_max_p for i in cone.positions)


def _is_shifted(program: Program, x: Atom) -> bool:
    """Whether something that depends on a maximum is subtracted from each row already."""
    stack: list[tuple[Atom, int]] = [(x, 6)]
    while stack:
        atom, left = stack.pop()
        eqn = program.definition(atom)
        if eqn is None or not is_known(eqn) or left == 0:
            continue
        if eqn.primitive is p.reduce_max_p:
            return True
        if atom is x or size(atom) < size(x) or eqn.primitive in VIEWS:
            stack.extend((a, left - 1) for a in eqn.invars)
    return False


def _confirm(program: Program, cone: Cone, total: Var, masks: dict[Var, bool]) -> Softmax | None:
    """The softmax of a cone; None if the total is another one."""
    x = masks_of.operand(program, cone, masks) if masks else cone.source
    if x is None or size(x) != size(cone.source):
        return None
    after = tuple(_after(program, cone, total))
    try:
        runs = tuple(_runs(program, cone, after, masks))
    except NoMatch:
        return None
    run = runs[0]
    over = {r: [n for n in r.names(x) if n not in r.names(total)] for r in runs}
    shifts = _has_maximum(program, cone)
    # What is not shifted is shifted by 0, as a guarded one is where the maximum is not finite.
    for guarded in (False, True) if shifts else (True,):
        known = [forms(r, r.value(x), over[r], guarded=guarded) for r in runs]
        results = _results(program, (*cone.positions, *after), x, runs, known)
        if results.get(total) == "total":
            break
        # The total of a row that is masked as a whole may be 0, where the composite's is NaN.
        if masks and agree(run.value(total), known[0]["total"]) and {*results.values()} - _ROWS:
            break
    else:
        if shifts or not all(_is_unshifted(r, x, total, over[r]) for r in runs):
            return None
    axes = run.axes(x)
    rest = dimensions([name for name in run.names(x) if name not in over[run]], axes)
    if rest is None:
        return None
    over_axes = tuple(i for i, axis in enumerate(axes) if axis and i not in rest)
    return Softmax(program, cone, x, total, over_axes, guarded, after, results, masks)


def _after(program: Program, cone: Cone, total: Var) -> Iterator[int]:
    """The equations that compute something from a total, and from what it is computed from."""
    pure = {v for i in cone.positions for v in program.eqns[i].outvars} | {cone.source}
    late = {total}
    inside = set(cone.positions)
    heap = sorted(set(program.readers.get(total, ())))
    seen = set(heap)
    while heap and len(seen) < _MANY:
        position = heap.pop(0)
        eqn = program.eqns[position]
        if position in inside or not is_known(eqn) or eqn.primitive is p.reduce_sum_p:
            continue
        if not all(a in pure or number(program, a) is not None for a in _values(eqn.invars)):
            continue
        for atom in _values(eqn.invars):
            if atom not in pure:
                constants = set(_constant(program, atom)) - inside
                inside |= constants
                yield from constants
        (out,) = eqn.outvars
        pure.add(out)
        late.add(out)
        inside.add(position)
        yield position
        more = set(program.readers.get(out, ())) - seen
        seen |= more
        heap = sorted([*heap, *more])


def _values(atoms: Sequence[Atom]) -> Iterator[Var]:
    return (a for a in atoms if isinstance(a, Var))


def _constant(program: Program, atom: Atom) -> Iterator[int]:
    """The equations that repeat a number."""
    while isinstance(atom, Var):
        yield program.maker[atom]
        (atom,) = program.eqns[program.maker[atom]].invars


def _runs(
    program: Program, cone: Cone, after: tuple[int, ...], masks: Mapping[Var, bool]
) -> Iterator[Evaluation]:
    """The values on random numbers, and where a row has infinities, or is masked as a whole."""
    for special in (None, -np.inf, np.inf):
        run = Evaluation(program, sorted({*cone.positions, *after}))
        masks_of.draw(run, masks)
        x = run.value(cone.source)
        if special is not None:
            array = np.array(x.array)
            array[... if special < 0 else (0,) * array.ndim] = special
            run.values[cone.source] = Named(x.names, array)
        run.run()
        yield run
    if masks:
        run = Evaluation(program, sorted({*cone.positions, *after}))
        masks_of.drop(run, masks)
        run.run()
        yield run


def forms(run: Evaluation, x: Named, over: list[Factor], *, guarded: bool) -> Mapping[str, Named]:
    """What a softmax has to give, of small values."""
    places = tuple(x.names.index(name) for name in over)
    rows = tuple(name for name in x.names if name not in over)
    with np.errstate(all="ignore"):
        maximum = Named(rows, x.array.max(places))
        if guarded:
            maximum = Named(rows, np.where(np.isfinite(maximum.array), maximum.array, 0.0))
        shifted = x.array - maximum.along(x.names)
        exponential = Named(x.names, np.exp(shifted))
        total = run.sum(exponential, over)
        logarithm = Named(rows, np.log(total.array))
        return {
            "maximum": maximum,
            "total": total,
            "logsumexp": Named(rows, logarithm.array + maximum.array),
            "softmax": Named(x.names, exponential.array / total.along(x.names)),
            "log_softmax": Named(x.names, shifted - logarithm.along(x.names)),
            "exponential": exponential,
        }


def _results(
    program: Program,
    positions: tuple[int, ...],
    x: Var,
    runs: Sequence[Evaluation],
    known: Sequence[Mapping[str, Named]],
) -> dict[Var, str]:
    """The values that are what a softmax gives, with axes in the order of x."""
    results: dict[Var, str] = {}
    for position in sorted(set(positions)):
        (out,) = program.eqns[position].outvars
        if not is_float(out.aval):
            continue
        for name in known[0]:
            pairs = [(r.value(out), k[name]) for r, k in zip(runs, known, strict=True)]
            if all(agree(got, want) for got, want in pairs):
                if in_order(runs[0].names(out), runs[0].names(x)):
                    results[out] = name
                break
    return results


def agree(got: Named, want: Named) -> bool:
    """Whether two values are the same numbers, infinities and NaN included."""
    if set(got.names) != set(want.names):
        return False
    expected = want.along(got.names)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return np.allclose(got.array, expected, rtol=0, atol=_TOLERANCE * largest, equal_nan=True)


def _is_unshifted(run: Evaluation, x: Var, total: Var, over: list[Factor]) -> bool:
    """Whether a total is the sum of the exponentials of x itself."""
    with np.errstate(all="ignore"):
        exponential = Named(run.value(x).names, np.exp(run.value(x).array))
    return agree(run.value(total), run.sum(exponential, over))


def check(softmax: Softmax, gradients: set[int], replaced: set[Var]) -> None:
    """Raises :class:`NoMatch` where it would not pay, or could not be written.

    Args:
      softmax: what has been found.
      gradients: the equations of its gradients.
      replaced: of these, the values that will be written anew.
    """
    program, x = softmax.program, softmax.x
    if not same_mesh(x):
        raise NoMatch("it is sharded")
    if 0 in shape_of(x):
        raise NoMatch("it is empty")
    inside = {*softmax.cone.positions, *softmax.after, *gradients}
    left = living(program, inside, {*softmax.results, *replaced})
    cone = {id(program.eqns[i]) for i in softmax.cone.positions}
    left = [eqn for eqn in left if id(eqn) in cone and not _is_maximum(softmax, eqn)]
    if sums(left, size(x)) or any(eqn.primitive is p.exp_p for eqn in left):
        raise NoMatch("values of the softmax that others read")


def _is_maximum(softmax: Softmax, eqn: JaxprEqn) -> bool:
    """Whether an equation takes the maximum as the composite does: then it is taken once."""
    aval: Any = softmax.x.aval
    return (
        eqn.primitive is p.reduce_max_p
        and eqn.invars[0] is softmax.x
        and tuple(eqn.params["axes"]) == softmax.axes
        and aval.dtype.itemsize >= 4
    )
