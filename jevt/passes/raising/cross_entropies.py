"""The parts of a cross entropy around a softmax's statistics.

Σ target·x, or Σ target·log_softmax(x)  ─▶ … ─▶ loss               forward
(k / total)·exp(x - maximum)  ─▶ + or - target·g ─▶ dx             backward
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from jax.extend.core import JaxprEqn, Primitive, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.passes._facts import shape_of
from jevt.passes._rewrite import read, substitute
from jevt.passes._rules import Graph
from jevt.passes.attention.operations import VIEWS, is_known
from jevt.passes.attention.region import Program, number, root
from jevt.passes.raising import smoothed_labels
from jevt.passes.raising.cones import size
from jevt.passes.raising.norms import same_mesh
from jevt.passes.raising.rows import along, of_row
from jevt.passes.raising.write import cast
from jevt.passes.raising.write import number as literal
from jevt.passes.reductions.known import known_sum
from jevt.passes.reductions.tools import is_wide
from jevt.primitives.norms import kept

ADDITIONS = frozenset({p.add_p, p.add_jaxvals_p, p.sub_p})

#: Equations between the target's x and the loss: guards, signs, views.
_MANY = 10


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """What stands for the result of the equation at a position."""

    position: int
    write: Callable[[Graph], None]


class Logits:
    """What is normalised by a softmax, and what the program computes with its statistics."""

    def __init__(self, program: Program, eqn: JaxprEqn) -> None:
        self.program = program
        (self.x,) = eqn.invars
        self.maximum, self.total = eqn.outvars
        self.axes: tuple[int, ...] = eqn.params["axes"]
        self.rows = kept(shape_of(self.x), self.axes)

    def is_x(self, atom: Atom) -> bool:
        same = root(self.program, atom) is root(self.program, self.x)
        return same and shape_of(atom) == shape_of(self.x)

    def is_shifted(self, atom: Atom) -> bool:
        eqn = self._made_by(atom, p.sub_p)
        return eqn is not None and eqn.invars[0] is self.x and self.is_row(eqn.invars[1])

    def is_exponential(self, atom: Atom) -> bool:
        eqn = self._made_by(atom, p.exp_p)
        return eqn is not None and self.is_shifted(eqn.invars[0])

    def is_softmax(self, atom: Atom) -> bool:
        eqn = self._made_by(atom, p.div_p)
        return eqn is not None and self.is_exponential(eqn.invars[0])

    def is_log_softmax(self, atom: Atom) -> bool:
        eqn = self._made_by(atom, p.sub_p)
        if eqn is None or not self.is_shifted(eqn.invars[0]):
            return False
        return self.is_logarithm(self.behind(eqn.invars[1]))

    def is_logsumexp(self, atom: Atom) -> bool:
        eqn = self._made_by(self.behind(atom), p.add_p)
        if eqn is None:
            return False
        a, b = (self.behind(operand) for operand in eqn.invars)
        return (self.is_logarithm(a) and b is self.maximum) or (
            self.is_logarithm(b) and a is self.maximum
        )

    def is_logarithm(self, atom: Atom) -> bool:
        eqn = self._made_by(atom, p.log_p)
        return eqn is not None and eqn.invars[0] is self.total

    def is_normaliser(self, atom: Atom) -> bool:
        """Whether this is a logsumexp or the total's logarithm, perhaps times something."""
        eqn = self._made_by(atom, p.mul_p)
        factors = (atom,) if eqn is None else eqn.invars
        return any(self.is_logsumexp(a) or self.is_logarithm(a) for a in factors)

    def is_row(self, atom: Atom) -> bool:
        """Whether this is the maximum, placed along the rows."""
        return self.behind(atom) is self.maximum

    def multiple(self, atom: Atom) -> tuple[Atom, Atom] | None:
        """The k and the exponential of a value ``(k / total)·exp(x - maximum)``."""
        eqn = self._made_by(atom, p.mul_p)
        if eqn is None:
            return None
        for row, exponential in (eqn.invars, eqn.invars[::-1]):
            quotient = self._made_by(self.behind(row), p.div_p)
            if quotient is None or not self.is_exponential(exponential):
                continue
            k, total = quotient.invars
            if total is self.total and shape_of(k) in ((), self.rows) and self.repeats(row):
                return k, exponential
        return None

    def readers_of_multiples(self) -> Iterator[int]:
        """The additions that read a multiple of the softmax, ascending, each once."""
        found: set[int] = set()
        for shifted in self._readers(self.x):
            for exponential in self._readers(shifted):
                if not self.is_exponential(exponential):
                    continue
                for value in self._readers(exponential):
                    if self.multiple(value) is not None:
                        found.update(self.program.readers.get(value, ()))
        for position in sorted(found):
            if self.program.eqns[position].primitive in ADDITIONS:
                yield position

    def sums(self) -> Iterator[int]:
        """The sums of rows of the logarithm of the softmax, all of it or times something."""
        for shifted in self._readers(self.x):
            for logarithm in filter(self.is_log_softmax, self._readers(shifted)):
                products = (v for v in self._readers(logarithm) if self._made_by(v, p.mul_p))
                for summed in (logarithm, *products):
                    for total in self._readers(summed):
                        eqn = self._made_by(total, p.reduce_sum_p)
                        if eqn is not None and tuple(eqn.params["axes"]) == self.axes:
                            yield self.program.maker[total]

    def behind(self, atom: Atom) -> Atom:
        """What an atom is a view of."""
        while (eqn := self.program.definition(atom)) is not None and eqn.primitive in VIEWS:
            atom = eqn.invars[0]
        return atom

    def repeats(self, row: Atom) -> bool:
        """Whether a row's values are repeated along the axes, and in no other way."""
        eqn = self.program.definition(row)
        if eqn is None or not eqn.invars or shape_of(eqn.invars[0]) != self.rows:
            return False
        if eqn.primitive is p.broadcast_in_dim_p:
            rest = [i for i in range(len(shape_of(self.x))) if i not in self.axes]
            return list(eqn.params["broadcast_dimensions"]) == rest
        placed = tuple(1 if i in self.axes else n for i, n in enumerate(shape_of(self.x)))
        return eqn.primitive is p.reshape_p and shape_of(row) == placed

    def _readers(self, atom: Atom) -> Iterator[Var]:
        if isinstance(atom, Var):
            for position in self.program.readers.get(atom, ()):
                yield from self.program.eqns[position].outvars

    def _made_by(self, atom: Atom, primitive: Primitive) -> JaxprEqn | None:
        eqn = self.program.definition(atom)
        return eqn if eqn is not None and eqn.primitive is primitive else None


def losses(logits: Logits) -> list[int]:
    """The sums of the target times x, or times the logarithm of its softmax, of cross entropies."""
    return [
        position
        for position, eqn in enumerate(logits.program.eqns)
        if eqn.primitive is p.reduce_sum_p
        and tuple(eqn.params["axes"]) == logits.axes
        and _is_loss(logits, eqn)
    ]


def _is_loss(logits: Logits, eqn: JaxprEqn) -> bool:
    product = logits.program.definition(eqn.invars[0])
    if product is None or product.primitive not in (p.select_n_p, p.mul_p):
        return False
    if any(map(logits.is_log_softmax, product.invars)):
        return not any(map(logits.is_softmax, product.invars))  # that is an entropy
    if not any(logits.is_x(a) or logits.is_shifted(a) for a in product.invars):
        return False
    # The x of the target is a cross entropy's if it meets the logsumexp, or the total's logarithm.
    stack, seen = list(eqn.outvars), set(eqn.outvars)
    while stack and len(seen) <= _MANY:
        for position in logits.program.readers.get(stack.pop(), ()):
            reader = logits.program.eqns[position]
            if reader.primitive in ADDITIONS and any(map(logits.is_normaliser, reader.invars)):
                return True
            if is_known(reader) and reader.primitive is not p.reduce_sum_p:
                new = [v for v in reader.outvars if v not in seen and size(v) < size(logits.x)]
                seen.update(new)
                stack.extend(new)
    return False


def has_gradient(logits: Logits) -> bool:
    """Whether a multiple of the softmax is added to something, as in a cross entropy's gradient."""
    return any(True for _ in logits.readers_of_multiples())


def picked(logits: Logits, position: int) -> Iterator[Rewrite]:
    """The rewrites of a sum that picks an element of the logarithm of the softmax.

    Where no position of the row is the label, the sum is 0 and stays so. A program that has NaN
    there chooses between it and x rather than the loss: ptxas has registers for that.
    """
    program = logits.program
    eqn = program.eqns[position]
    product = program.definition(eqn.invars[0])
    assert product is not None
    index = next((i for i, a in enumerate(product.invars) if logits.is_log_softmax(a)), None)
    if index is None or len(logits.axes) != 1:
        return
    label = label_of(logits, mask_of(program, product, index))
    if label is None or not same_mesh(logits.x, label, *product.invars):
        return
    logarithm = program.definition(product.invars[index])
    assert logarithm is not None
    log_total = logits.behind(logarithm.invars[1])

    (out,) = eqn.outvars
    last = shape_of(logits.x)[logits.axes[0]] - 1
    guarded = _is_guarded(program, out, label, last)

    def write(graph: Graph) -> None:
        operands = [read(graph.env, a) for a in product.invars]
        operands[index] = read(graph.env, logits.x)
        terms = graph.emit(product.primitive, *operands, **product.params)
        target = graph.emit(p.reduce_sum_p, terms, **eqn.params)
        hit: Atom | None = None
        if guarded:
            targets.append(target)
        else:
            hit = _inside(read(graph.env, label), target, last, graph)
        if hit is None or product.primitive is p.select_n_p:
            loss = less_normaliser(target, graph)
            nothing = graph.broadcast(literal(0.0, loss, graph), shape_of(loss), ())
            graph.env[out] = loss if hit is None else graph.emit(p.select_n_p, hit, nothing, loss)
        else:
            graph.env[out] = less_normaliser(target, graph, cast(hit, target, graph))

    def less_normaliser(target: Atom, graph: Graph, times: Atom | None = None) -> Atom:
        for row in (logits.maximum, log_total):
            value = read(graph.env, row)
            value = value if times is None else graph.mul(value, times)
            target = graph.emit(p.sub_p, target, value)
        return target

    def write_guard(guard: JaxprEqn, graph: Graph) -> None:
        which, other, _ = (read(graph.env, a) for a in guard.invars)
        target = graph.emit(p.select_n_p, which, other, targets[0])
        graph.env[guard.outvars[0]] = less_normaliser(target, graph)

    targets: list[Atom] = []
    yield Rewrite(position, write)
    for reader in program.readers.get(out, ()) if guarded else ():
        guard = program.eqns[reader]
        other = number(program, guard.invars[1])
        if other is not None and math.isnan(other):
            yield Rewrite(reader, functools.partial(write_guard, guard))


def weighted(logits: Logits, position: int) -> Rewrite | None:
    """The rewrite of a sum of the logarithm of the softmax, all of it or times soft labels.

    ``Σ t·(x - maximum - log total) = Σ t·(x - maximum) - log total·Σ t`` where Σ t is known.
    Smoothed labels are chosen by their mask rather than computed from it.
    """
    program = logits.program
    eqn = program.eqns[position]
    (summed,), (out,) = eqn.invars, eqn.outvars
    factor: Atom | None = None
    product = program.definition(summed)
    if product is not None and product.primitive is p.mul_p and not logits.is_log_softmax(summed):
        factor = next((a for a in product.invars if not logits.is_log_softmax(a)), None)
        summed = next((a for a in product.invars if logits.is_log_softmax(a)), summed)
    logarithm = program.definition(summed)
    if logarithm is None or not logits.is_log_softmax(summed) or not is_wide(out):
        return None
    if factor is not None and shape_of(factor) != shape_of(logits.x):
        return None
    if factor is not None and not same_mesh(logits.x, factor):
        return None
    shifted, log_total = logarithm.invars[0], logits.behind(logarithm.invars[1])
    choice = None if factor is None else smoothed_labels.find(program, factor)

    def write(graph: Graph) -> None:
        terms, log = read(graph.env, shifted), read(graph.env, log_total)
        if factor is None:
            count = math.prod(shape_of(logits.x)[axis] for axis in logits.axes)
            labels = literal(count, log, graph)
        else:
            labels = read(graph.env, factor)
            known = known_sum(labels, logits.axes, graph)
            if known is None:
                graph.add(substitute(graph.env, eqn))
                return
            chosen = labels if choice is None else choice.write(labels, graph)
            terms, labels = graph.mul(chosen, terms), known()
        total = graph.emit(p.reduce_sum_p, terms, **eqn.params)
        graph.env[out] = graph.emit(p.sub_p, total, graph.mul(log, labels))

    return Rewrite(position, write)


def multiples_of_labels(logits: Logits, position: int) -> Iterator[Rewrite]:
    """The rewrites of multiples of smoothed labels, which a loss and its gradient share."""
    program = logits.program
    product = program.definition(program.eqns[position].invars[0])
    for labels in product.invars if product is not None else ():
        if smoothed_labels.find(program, labels) is None:
            continue
        for reader, choice in smoothed_labels.multiples(program, labels):
            yield Rewrite(reader, functools.partial(write_choice, program.eqns[reader], choice))


def write_choice(eqn: JaxprEqn, choice: smoothed_labels.Choice, graph: Graph) -> None:
    """Writes a choice in place of the equation that computes it."""
    (out,) = eqn.outvars
    like = next(a for a in eqn.invars if shape_of(a) == shape_of(out))
    graph.env[out] = choice.write(read(graph.env, like), graph)


def _is_guarded(program: Program, out: Var, label: Atom, last: int) -> bool:
    """Whether a value is read only where the label is between 0 and the last."""

    def is_bound(atom: Atom, primitive: Primitive, bound: int) -> bool:
        eqn = program.definition(atom)
        if eqn is None or eqn.primitive is not primitive or eqn.invars[0] is not label:
            return False
        return number(program, eqn.invars[1]) == bound

    def is_guard(position: int) -> bool:
        eqn = program.eqns[position]
        if eqn.primitive is not p.select_n_p or len(eqn.invars) != 3 or eqn.invars[1] is out:
            return False
        test = program.definition(eqn.invars[0])
        if test is None or test.primitive is not p.and_p:
            return False
        low, high = test.invars
        return is_bound(low, p.ge_p, 0) and is_bound(high, p.le_p, last)

    return out not in program.outputs and all(map(is_guard, program.readers.get(out, ())))


def _inside(label: Atom, loss: Atom, last: int, graph: Graph) -> Atom:
    """Whether the label of each loss is between 0 and the last."""
    row = graph.reshape(label, shape_of(loss))
    return graph.emit(
        p.and_p,
        graph.emit(p.ge_p, row, literal(0, row, graph)),
        graph.emit(p.le_p, row, literal(last, row, graph)),
    )


def mask_of(program: Program, product: JaxprEqn, index: int) -> Atom | None:
    """The mask of a sum of masked values, None if it is another one."""
    if product.primitive is p.select_n_p:
        mask, other = product.invars[0], product.invars[3 - index]
        return mask if index == 2 and number(program, other) == 0.0 else None
    factor = product.invars[1 - index]
    eqn = program.definition(factor)
    if eqn is None or eqn.primitive is not p.convert_element_type_p:
        return None
    return eqn.invars[0]


def label_of(logits: Logits, mask: Atom | None) -> Atom | None:
    """The label of a mask that is true where the position is a row's label, if it is one."""
    eqn = logits.program.definition(mask) if mask is not None else None
    if mask is None or eqn is None or eqn.primitive is not p.eq_p:
        return None
    if shape_of(mask) != shape_of(logits.x):
        return None
    shape, (axis,) = shape_of(logits.x), logits.axes
    for positions, labels in (eqn.invars, eqn.invars[::-1]):
        iota = logits.program.definition(positions)
        if iota is None or iota.primitive is not p.iota_p or iota.params["dimension"] != axis:
            continue
        if len(shape_of(positions)) != len(shape) or shape_of(positions)[axis] != shape[axis]:
            continue
        view = logits.program.definition(labels)
        if view is not None and logits.repeats(labels):
            return view.invars[0]
        if shape_of(labels) == tuple(1 if i == axis else n for i, n in enumerate(shape)):
            return labels
    return None


def merged(logits: Logits, position: int) -> Rewrite | None:
    """The rewrite of the sum of two multiples of one softmax: their numbers a row are added."""
    program = logits.program
    eqn = program.eqns[position]
    for first, second in (eqn.invars, eqn.invars[::-1]):
        one = logits.multiple(first)
        if one is None or not _is_read_once(program, first):
            continue
        inner = program.definition(second)
        others: tuple[Atom, ...] = ()
        two = logits.multiple(second)
        if two is None and inner is not None and inner.primitive in (p.add_p, p.add_jaxvals_p):
            for a, b in (inner.invars, inner.invars[::-1]):
                two, others = logits.multiple(a), (b,)
                if two is not None:
                    break
        if two is None or not _is_read_once(program, second):
            continue
        if not same_mesh(logits.x, one[0], two[0], *others):
            continue
        write = functools.partial(_write_merged, logits, eqn, one, two[0], others)
        return Rewrite(position, write)
    return None


def _is_read_once(program: Program, atom: Atom) -> bool:
    if not isinstance(atom, Var) or atom in program.outputs:
        return False
    return len(program.readers.get(atom, ())) == 1


def _write_merged(
    logits: Logits,
    eqn: JaxprEqn,
    one: tuple[Atom, Atom],
    other_k: Atom,
    others: tuple[Atom, ...],
    graph: Graph,
) -> None:
    total, exponential = read(graph.env, logits.total), read(graph.env, one[1])
    ks = [of_row(read(graph.env, k), total, graph) for k in (one[0], other_k)]
    row = graph.emit(p.div_p, graph.emit(p.add_p, *ks), total)
    value = graph.mul(along(row, logits.x, logits.axes, graph), exponential)
    for other in others:
        value = graph.emit(p.add_p, read(graph.env, other), value)
    graph.env[eqn.outvars[0]] = value
